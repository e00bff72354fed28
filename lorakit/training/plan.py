"""What a run will do, worked out before any weight is read.

Recipe, `config.json`, tokenizer, data and machine go in; sites, counts, steps, memory by part
and warnings come out. `train` runs exactly the plan that `plan` prints.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit import adapters
from lorakit.adapters import Method
from lorakit.data.batches import Packing, Steps
from lorakit.data.prepare import Dataset, prepare
from lorakit.environment import cache_folder
from lorakit.errors import BadInput, Notice
from lorakit.model import base as base_models
from lorakit.model.attention import can_pack
from lorakit.model.base import Base
from lorakit.model.quantized import Quantization
from lorakit.model.quantizer import notices_of
from lorakit.model.sites import Site, find_sites, uneven
from lorakit.recipe.rules import unusual
from lorakit.recipe.sections import Recipe
from lorakit.runtime import Runtime, resolve_dtype
from lorakit.training import memory
from lorakit.training.memory import GIB, Memory
from lorakit.training.optim import warmup_steps


@dataclass(frozen=True)
class Permissions:
    """What the command line allows beyond reading files."""

    offline: bool = False
    local_code: bool = False
    remote_code: bool = False


@dataclass(frozen=True)
class Group:
    """Sites of one name and shape: what one line of the coverage table says."""

    target: str
    sites: int
    inputs: int
    outputs: int
    rank: int | None


@dataclass(frozen=True)
class Plan:
    """A run before it costs anything; `loop.train` needs nothing else but the weights."""

    recipe: Recipe
    base: Base
    tokenizer: PreTrainedTokenizerBase
    method: Method
    sites: tuple[Site, ...]
    groups: tuple[Group, ...]
    dataset: Dataset
    steps: Steps
    packing: Packing
    dtype: torch.dtype
    checkpointing: bool
    trainable: int
    total: int
    memory: Memory
    free_bytes: int
    notices: tuple[Notice, ...]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.free_bytes

    @property
    def quantization(self) -> Quantization | None:
        """How the base's weights are held; None where they are dense."""
        return self.base.stored or Quantization.of(self.recipe.model)

    @property
    def servable(self) -> dict[str, str]:
        """What serves the adapter when it is trained, or why not, while it can be changed."""
        return self.method.servable(self.sites)

    def facts(self) -> dict[str, Any]:
        """Return the plan as `plan.json` and `--json` hold it."""
        report = self.dataset.report
        return {
            "base": self.base.name,
            "method": self.recipe.adapter.method,
            "sites": [
                {"name": s.name, "kind": s.kind, "inputs": s.inputs, "outputs": s.outputs}
                for s in self.sites
            ],
            "trainable": self.trainable,
            "total": self.total,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantization": str(self.quantization or "none"),
            "gradient_checkpointing": self.checkpointing,
            "rows": len(self.dataset.train),
            "eval_rows": len(self.dataset.eval),
            "data": report.facts(),
            "steps_per_epoch": self.steps.per_epoch,
            "steps": self.steps.total,
            "tokens": self.steps.tokens,
            "memory": self.memory.parts | {"total": self.memory.total},
            "free_bytes": self.free_bytes,
            "fits": self.fits,
            "servable": self.servable,
        }

    def lines(self) -> list[tuple[str, str]]:
        """Return the plan for people: a label and what it says, a pair a line."""
        recipe, report = self.recipe, self.dataset.report
        share = 100 * self.trainable / self.total
        groups = [
            f"{g.target}  {g.sites} {'site' if g.sites == 1 else 'sites'}  {g.inputs}→{g.outputs}"
            + (f"  rank {g.rank}" if g.rank else "")
            for g in self.groups
        ]
        parts = "  ".join(f"{name} {size / GIB:.2f}" for name, size in self.memory.parts.items())
        fits = "yes" if self.fits else "NO"
        dtype = str(self.dtype).removeprefix("torch.")
        held = f"  {self.quantization}" if self.quantization else ""
        return [
            ("Recipe", f"{recipe.origin.path} (valid)"),
            ("Base", f"{self.base.name}  {self.total / 1e6:,.1f} M parameters  {dtype}{held}"),
            ("Adapter", f"{recipe.adapter.method}  {groups[0]}"),
            *(("", line) for line in groups[1:]),
            (
                "Trained",
                f"{self.trainable:,} of {self.total:,} ({share:.3f} %), "
                f"file {4 * self.trainable / 2**20:.1f} MiB",
            ),
            *(("Data" if k == 0 else "", line) for k, line in enumerate(report.lines())),
            ("Steps", self._steps_line()),
            ("Memory", f"{parts}  = {self.memory.total / GIB:.2f} GiB (estimate)"),
            ("Fits", f"{fits}, {self.free_bytes / GIB:.1f} GiB free"),
            ("Servable", " · ".join(" ".join(one) for one in self.servable.items())),
            ("Output", str(recipe.run_folder)),
        ]

    def _steps_line(self) -> str:
        train = self.recipe.train
        stop = f", stops at {train.max_steps}" if train.max_steps else ""
        warm = warmup_steps(train, self.steps.total)
        return (
            f"{self.steps.total} ({self.steps.per_epoch} an epoch x {train.epochs:g}{stop}), "
            f"batch {train.batch_size}, {train.schedule} {train.learning_rate:g} "
            f"after {warm} warm-up"
        )


def make(
    recipe: Recipe, runtime: Runtime, permissions: Permissions, *, data: Dataset | None = None
) -> Plan:
    """Work out everything that can be known without weights; `data` stands in for the recipe's.

    Raises:
        BadInput: when the recipe, the model's files or the data cannot be used.
        EnvironmentLacks: when a hub id needs the network, or the device lacks the dtype.
    """
    folder = recipe.origin.folder
    base = base_models.find(
        recipe.model,
        folder,
        offline=permissions.offline,
        allow_remote_code=permissions.remote_code,
        cache=cache_folder(),
    )
    skeleton = base_models.skeleton(base, recipe.task)
    method, sites, coverage = choose(recipe, skeleton)
    dtype = resolve_dtype(recipe.model.dtype, runtime.device)
    base_models.check_attention(recipe.model.attention)
    tokenizer = base_models.load_tokenizer(base)
    dataset = data or prepare_data(recipe, base, tokenizer, permissions)
    # What is saved beside the adapter is the template that its rows were rendered with.
    tokenizer.chat_template = dataset.chat_template
    notices = [*base.notices, *unusual(recipe), *coverage, *dataset.notices]
    if how := base.stored or Quantization.of(recipe.model):
        notices += notices_of(skeleton, how, runtime.device)
    packing: Packing = recipe.data.packing
    if packing and (reason := _cannot_pack(method, skeleton)):
        if "packing" in recipe.data.model_fields_set:
            raise BadInput(
                "recipe.conflict",
                f"data.packing: {reason}",
                where=recipe.origin.place("data", "packing"),
            )
        packing = False
        notices.append(Notice("run.packing-off", f"rows are padded, not packed: {reason}"))
    steps = Steps.of(
        dataset, recipe.train, packing, recipe.seed, runtime, max_length=recipe.data.max_length
    )
    total = sum(p.numel() for p in skeleton.parameters())
    adapters.attach(method, skeleton, sites, seed=recipe.seed)
    trainable = sum(p.numel() for p in adapters.trainable(skeleton).values())
    shape = memory.Shape.of(base.config)
    free = runtime.free_bytes()
    estimates = {
        flag: memory.estimate(
            shape, total, trainable, dtype, steps.micro_batch_tokens, checkpointing=flag
        )
        for flag in (False, True)
    }
    chosen = recipe.train.gradient_checkpointing
    checkpointing = estimates[False].total > free if chosen == "auto" else chosen
    return Plan(
        recipe,
        base,
        tokenizer,
        method,
        tuple(sites),
        _groups(sites, skeleton),
        dataset,
        steps,
        packing,
        dtype,
        checkpointing,
        trainable,
        total,
        estimates[checkpointing],
        free,
        tuple(notices),
    )


def choose(recipe: Recipe, skeleton: PreTrainedModel) -> tuple[Method, list[Site], list[Notice]]:
    """Make the method and find its sites, with a notice where layers are covered unevenly.

    Raises:
        BadInput: when a target matches nothing, a rank does not fit, or a merge is asked of a
            method that has none.
    """
    method = adapters.get(recipe.adapter.method)(recipe.adapter)
    if recipe.merge.enabled and not method.mergeable:
        raise BadInput(
            "recipe.conflict",
            f"merge.enabled: {method.name()} changes no weights, so there is nothing to merge",
            where=recipe.origin.place("merge", "enabled"),
            help="set merge.enabled: false; the adapter works beside its base",
        )
    candidates = find_sites(skeleton)
    try:
        chosen = method.sites(candidates)
    except BadInput as error:
        error.where = error.where or recipe.origin.place("adapter", "target_modules")
        raise
    return method, chosen, uneven(candidates, chosen)


def prepare_data(
    recipe: Recipe, base: Base, tokenizer: PreTrainedTokenizerBase, permissions: Permissions
) -> Dataset:
    """Read, render and count the rows of a recipe."""
    return prepare(
        recipe.data,
        tokenizer,
        base.context,
        folder=recipe.origin.folder,
        seed=recipe.seed,
        offline=permissions.offline,
        allow_local_code=permissions.local_code,
    )


def _cannot_pack(method: Method, skeleton: PreTrainedModel) -> str | None:
    return can_pack(skeleton) if method.packs else f"{method.name()} does not train on packed rows"


def _groups(sites: list[Site], adapted: PreTrainedModel) -> tuple[Group, ...]:
    """Count sites by the last part of their name, their shape and their rank."""
    updates = {layer.name: layer.low_rank() for layer in adapters.layers_of(adapted)}
    ranks = {name: len(update.A) for name, update in updates.items() if update}
    counts = Counter(
        (site.name.rpartition(".")[2], site.inputs, site.outputs, ranks.get(site.name))
        for site in sites
    )
    return tuple(Group(name, n, i, o, rank) for (name, i, o, rank), n in counts.items())
