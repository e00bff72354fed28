"""(IA)³: a trained factor per output of keys and values, and per input of the MLP's last layer.

Keys and values: y = l ⊙ base(x), l (outputs, 1). Feed-forward: y = base(l ⊙ x), l (1, inputs). l
starts at one. Merged, l multiplies the rows of W and the bias, or the columns of W alone.
Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning", arXiv 2205.05638.

Deviation: a projection that computes queries, keys and values at once is scaled as a whole. It
needs a learning rate well above LoRA's.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters._layer import ALL, Layer, parameter
from lorakit.adapters._method import Method, SiteSettings, Targets, with_tied
from lorakit.adapters._peft import Found, PeftConfig
from lorakit.errors import BadInput
from lorakit.model.sites import Role, Site, match
from lorakit.recipe.sections import Names

SERVABLE = {
    "PEFT": "",
    "vLLM": "it serves low-rank updates alone, so merge instead",
    "llama.cpp": "its converter takes low-rank updates alone, so merge instead",
}
FOREIGN = ("(ia)3", "ia_3", "ia³")

OUTPUTS: frozenset[Role] = frozenset({"k", "v", "qkv"})
FEEDFORWARD: frozenset[Role] = frozenset({"down"})


class Ia3Settings(SiteSettings):
    """Where the factors go."""

    target_modules: Targets | None = Field(  # type: ignore[assignment]  # null: by their roles
        None,
        description="null: keys, values and the MLP's last layer; or all-linear, attention, mlp, "
        "a re: pattern, or a list of names",
    )
    feedforward_modules: Names | None = Field(
        None, description="targets whose inputs are scaled; null: the MLP's last layers among them"
    )

    def choose(self, candidates: Sequence[Site]) -> list[Site]:
        """Return the sites that these settings name."""
        if self.target_modules is not None:
            return super().choose(candidates)
        known = [site for site in candidates if site.role in OUTPUTS | FEEDFORWARD]
        if not known:
            raise BadInput(
                "target.no-match",
                "no module is known to compute keys, values or the end of an MLP",
                help="name adapter.target_modules and adapter.feedforward_modules",
            )
        return match(known, "all-linear", self.exclude_modules, self.layers)


class Ia3Layer(Layer):
    """The factors of one site."""

    def __init__(self, site: Site, feedforward: bool) -> None:
        super().__init__(site.name)
        self.feedforward = feedforward
        self.factors = parameter(1, site.inputs) if feedforward else parameter(site.outputs, 1)

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return base(l ⊙ x), or l ⊙ base(x).

        The product is fp32: in bf16 every factor within 0.4 % of one would be one.
        """
        factors = self.factors.flatten()
        if self.feedforward:
            y: Tensor = base((x * factors).to(x.dtype))
            return y
        y = base(x)
        return (y * factors).to(y.dtype)

    def merged(self, base: Mapping[str, Tensor], rows: slice = ALL) -> dict[str, Tensor]:
        """Return l ⊙ W, and l ⊙ bias where outputs are scaled."""
        factors = self.factors if self.feedforward else self.factors[rows]
        merged = {**base, "weight": base["weight"] * factors}
        if "bias" in base and not self.feedforward:
            merged["bias"] = base["bias"] * factors.flatten()
        return merged

    def tensors(self) -> dict[str, Tensor]:
        """Return the factors."""
        return {f"{self.name}.ia3_l": self.factors}

    def reset(self, generator: torch.Generator) -> None:
        """Set every factor to one."""
        with torch.no_grad():
            self.factors.fill_(1.0)

    def untouched(self) -> bool:
        """Tell whether every factor is one."""
        return bool((self.factors == 1).all())


class Ia3(Method):
    """Factors on keys, values and the MLP's last layer."""

    Settings = Ia3Settings
    settings: Ia3Settings
    PEFT_TYPE: ClassVar[str] = "IA3"
    PARTS: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"ia3_l"}),)
    PEFT_KEYS: ClassVar[frozenset[str]] = frozenset(
        {"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"}
    )

    def layers(self, sites: Sequence[Site]) -> dict[str, Layer]:
        """Return the factors by the module that they scale."""
        feedforward = self._feedforward(sites)
        return with_tied(sites, [Ia3Layer(site, site.name in feedforward) for site in sites])

    def param_groups(self, model: PreTrainedModel, lr: float) -> list[dict[str, Any]]:
        """Return one group without weight decay, which would pull factors towards zero."""
        return [{**group, "weight_decay": 0.0} for group in super().param_groups(model, lr)]

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether PEFT's settings are those of (IA)³."""
        return config.get("peft_type") == cls.PEFT_TYPE

    @classmethod
    def from_peft(cls, config: PeftConfig, found: Found) -> Ia3Settings:
        """Return the settings of an adapter that PEFT describes."""
        feedforward = config.named("feedforward_modules", found.modules)
        return cls.Settings(
            method=cls.name(),
            target_modules=found.modules,
            modules_to_save=found.copies,
            feedforward_modules=tuple(sorted(feedforward)),
        )

    def to_peft(self, model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, Any]:
        """Return PEFT's settings."""
        return {
            "peft_type": self.PEFT_TYPE,
            "feedforward_modules": sorted(self._feedforward(sites)),
            "fan_in_fan_out": any(site.kind == "conv1d" for site in sites),
            "init_ia3_weights": True,
        }

    def _feedforward(self, sites: Sequence[Site]) -> set[str]:
        """Return the sites whose inputs are scaled."""
        named = self.settings.feedforward_modules
        if named is None:
            return {site.name for site in sites if site.role in FEEDFORWARD}
        return {site.name for site in match(sites, named)} if named else set()
