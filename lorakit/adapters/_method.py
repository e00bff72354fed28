"""What a method is: settings, layers, and how they get onto a model and off again.

A method's file defines one subclass of `Method`. Everything here works for all of them: wrapping
sites, whole copies of modules (`modules_to_save`), and asking a model what belongs to its adapter.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from lorakit import adapters
from lorakit.adapters._layer import Layer, layers_of, trainable, wrap
from lorakit.adapters._peft import Found, PeftConfig
from lorakit.errors import BadInput, one_of
from lorakit.model.sites import Kind, Site, match
from lorakit.recipe.sections import SHORTEST_ROW, Adapter, Names

Targets = (
    Literal["all-linear", "attention", "mlp"]
    | Annotated[str, Field(pattern="^re:.", examples=["re:PATTERN"])]
    | Annotated[Names, Field(min_length=1)]
)
Layers = (
    Literal["all"]
    | Annotated[str, Field(pattern=r"^[0-9]{1,6}-[0-9]{1,6}$", examples=["8-31"])]
    | Annotated[
        tuple[Annotated[int, Field(ge=0, strict=True)], ...], Field(min_length=1, strict=False)
    ]
)


class MethodSettings(Adapter):
    """What a method can be told; without sites of its own to choose, only that."""

    def saved_whole(self) -> tuple[str, ...]:
        """Return the entries of modules that are trained whole."""
        return ()

    def choose(self, candidates: Sequence[Site]) -> list[Site]:
        """Return the sites that these settings name."""
        raise NotImplementedError


class SiteSettings(MethodSettings):
    """What every method can be told that adapts the modules which the recipe names."""

    target_modules: Targets = Field(
        "all-linear",
        description="all-linear, attention, mlp, a re: pattern, or a list of names; "
        "every entry must match",
    )
    exclude_modules: Names = Field((), description="targets to leave out: names, or re: patterns")
    layers: Layers = Field(
        "all", description='decoder layers to adapt, from 0: all, "8-31" with both ends, or a list'
    )
    modules_to_save: Names = Field(
        (), description="modules that are trained whole, as copies: names, or re: patterns"
    )

    def saved_whole(self) -> tuple[str, ...]:
        """Return the entries of modules that are trained whole."""
        return self.modules_to_save

    def choose(self, candidates: Sequence[Site]) -> list[Site]:
        """Return the sites that these settings name.

        Raises:
            BadInput: `target.no-match` when an entry names no site.
        """
        return match(candidates, self.target_modules, self.exclude_modules, self.layers)


class Method:
    """A method with its settings. A file of this folder defines exactly one subclass.

    Class attributes: `Settings`, the recipe's adapter section; `mergeable` and `packs`, whether the
    adapter can become part of the weights and whether packed rows may be trained; `kinds`, what it
    can adapt. Of PEFT's file: `PEFT_TYPE`; `PREFIX`, what stands before the name of each tensor;
    `PARTS`, the sets of tensors that a module may have; `PEFT_KEYS`, the settings that the method
    reads, and `PEFT_FIXED`, others with the only values that are right.
    """

    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    mergeable: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv1d"})
    PEFT_TYPE: ClassVar[str] = ""
    PREFIX: ClassVar[str] = "base_model.model."
    PARTS: ClassVar[tuple[frozenset[str], ...]] = ()
    PEFT_KEYS: ClassVar[frozenset[str]] = frozenset()
    PEFT_FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __init__(self, settings: Adapter) -> None:
        if not isinstance(settings, self.Settings):
            raise TypeError(f"{self.name()} got the settings of {settings.method}")
        self.settings = settings

    @classmethod
    def name(cls) -> str:
        """Return the method's name: that of its file."""
        return cls.__module__.rpartition(".")[2]

    def sites(self, candidates: Sequence[Site]) -> list[Site]:
        """Return the sites to adapt, by default those that `target_modules` names.

        Of two modules that share a weight one stands for both.

        Raises:
            BadInput: `target.no-match`, `target.unsupported` or `target.nothing-trainable`.
        """
        chosen = one_of_tied(self.settings.choose(candidates), candidates)
        for site in chosen:
            if site.kind not in self.kinds:
                raise BadInput(
                    "target.unsupported",
                    f"{site.name} is of kind {site.kind}, not {one_of(sorted(self.kinds))}",
                    help="take it out of adapter.target_modules",
                )
        if not chosen:
            raise BadInput(
                "target.nothing-trainable",
                "the adapter section leaves no module to adapt",
                help="name at least one in adapter.target_modules",
            )
        return chosen

    def shared(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Return the tensors that all sites share."""
        return {}

    def rank_of(self, site: Site) -> int | None:
        """Return the rank at one of the chosen sites; None for methods without ranks."""
        return None

    def layer(self, site: Site, shared: Mapping[str, Tensor]) -> Layer:
        """Return the layer of one site, its tensors still without values."""
        raise NotImplementedError

    def layers(self, sites: Sequence[Site]) -> dict[str, Layer]:
        """Return the layers of all sites by the module that they adapt."""
        shared = self.shared(sites)
        return with_tied(sites, [self.layer(site, shared) for site in sites])

    def attach(self, model: PreTrainedModel, sites: Sequence[Site]) -> None:
        """Put the layers onto a model, by default by wrapping each site."""
        for name, layer in self.layers(sites).items():
            wrap(model, name, layer)

    def start(self, model: PreTrainedModel, sites: Sequence[Site], batches: Iterable[Any]) -> None:
        """Set the initial values that need the base's weights or data; not called on a reload."""

    def refresh(self, model: PreTrainedModel) -> None:
        """Compute again what depends on trained tensors; called whenever they have changed."""

    def param_groups(self, model: PreTrainedModel, lr: float) -> list[dict[str, Any]]:
        """Return the optimizer's groups."""
        return [{"params": list(trainable(model).values()), "lr": lr}]

    def penalty(self, model: PreTrainedModel) -> Tensor | None:
        """Return a term of the loss, back-propagated once per step."""
        return None

    def after_step(self, model: PreTrainedModel, step: int, total: int) -> None:
        """Act after step `step` of `total`; the gradients are still there."""
        self.refresh(model)

    def state(self) -> dict[str, Any]:
        """Return what the method itself must remember in a checkpoint, as JSON values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""

    def tensors(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return what the file holds, by module path and tensor name."""
        named: dict[str, Tensor] = {}
        for layer in layers_of(model):
            named.update(layer.tensors())
        return named

    def positions(self) -> int:
        """Return how many of the model's positions the adapter itself takes."""
        return 0

    def context(self, positions: int | None) -> int | None:
        """Return how many of a model's positions are left for tokens; None where it has no limit.

        Raises:
            BadInput: `model.context-too-short` when they are too few for the shortest rows.
        """
        taken = self.positions()
        if positions is None or not taken:
            return positions
        if positions - taken < SHORTEST_ROW:
            raise BadInput(
                "model.context-too-short",
                f"{self.name()} takes {taken:,} positions before each row; the model has "
                f"{positions:,}",
                help=f"make the {self.name()} shorter",
            )
        return positions - taken

    def servable(self, sites: Sequence[Site]) -> dict[str, str]:
        """Return for each program that serves adapters `yes`, with what it needs, or `no: why`."""
        served = adapters.servable(self.name())
        if self.settings.saved_whole():
            others = [reader for reader in served if reader != "PEFT"]
            served |= dict.fromkeys(others, "no: it takes no modules that are saved whole")
        return served

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether PEFT's settings describe an adapter of this method."""
        raise NotImplementedError

    @classmethod
    def from_peft(cls, config: PeftConfig, found: Found) -> MethodSettings:
        """Return the settings of an adapter that PEFT describes.

        Raises:
            BadInput: when a setting is wrong or does not fit the tensors that were found.
        """
        raise NotImplementedError

    def to_peft(self, model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, Any]:
        """Return the method's own part of PEFT's settings."""
        raise NotImplementedError


def with_tied(sites: Sequence[Site], layers: Sequence[Layer]) -> dict[str, Layer]:
    """Return the layers by module, those of the modules that share a weight included."""
    named: dict[str, Layer] = {}
    for site, layer in zip(sites, layers, strict=True):
        named[site.name] = layer
        if site.tied is not None:
            named[site.tied] = layer.tied(site.tied)
    return named


def one_of_tied(chosen: Sequence[Site], candidates: Sequence[Site]) -> list[Site]:
    """Replace each site that shares its weight by the embedding of the two; each site once."""
    known = {site.name: site for site in candidates}

    def owner(site: Site) -> Site:
        other = known.get(site.tied or "")
        return other if other is not None and other.kind == "embedding" else site

    return list(dict.fromkeys(map(owner, chosen)))
