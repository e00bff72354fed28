"""What a run will do, worked out before any weight is read.

Recipe, `config.json`, tokenizer, data and machine go in; sites, counts, steps, memory by part
and warnings come out. `train` runs exactly the plan that `plan` prints.
"""

from collections import Counter
from dataclasses import dataclass, replace
from shutil import which

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit import adapters
from lorakit.adapters import Method
from lorakit.data.batches import Packing, Steps
from lorakit.data.cache import prepared
from lorakit.data.items import Request
from lorakit.data.prepare import Dataset
from lorakit.devices import capability, resolve_dtype
from lorakit.environment import cache_folder
from lorakit.errors import BadInput, Notice
from lorakit.model import base as base_models
from lorakit.model.attention import LIKE_FLASH, NAME, can_pack
from lorakit.model.base import Base
from lorakit.model.families import is_llama_like
from lorakit.model.quantized import Quantization
from lorakit.model.quantizer import notices_of, quantizable
from lorakit.model.sites import Site, find_sites, uneven
from lorakit.recipe.rules import unusual, without_effect
from lorakit.recipe.sections import Recipe
from lorakit.runtime import Runtime
from lorakit.training import checks, optim
from lorakit.training.fitting import Change, cheapest, settle
from lorakit.training.memory import Memory, Setup, Shape, estimate
from lorakit.training.speed import Card
from lorakit.training.trace import Trace, plain_trace, trace

META = torch.device("meta")
# FLOPs of a run that gains more on two cores than compiling takes there: 7 to 35 seconds, for an
# eighth of the time of a step.
WORTH_COMPILING = 2e14


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
    shape: Shape
    setup: Setup
    free_bytes: int
    local_processes: int
    notices: tuple[Notice, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.shape.dtype

    @property
    def memory(self) -> Memory:
        """The estimated peak of a step."""
        return estimate(self.shape, self.setup)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.free_bytes

    @property
    def lean(self) -> bool:
        """Whether lean twins stand in for the layers."""
        return is_llama_like(self.base.config) and self.recipe.model.attention == "auto"

    @property
    def compiled(self) -> bool:
        """Whether what runs between the products is to be compiled."""
        asked = self.recipe.train.compile
        if asked != "auto" or not is_llama_like(self.base.config):
            return asked is True
        # In fp32 the products are nearly all of a CPU's time, and the compiled sums are less exact:
        # gradients 3e-5 from PEFT's, not 3e-6.
        worth = 4 * self.shape.parameters * self.steps.tokens >= WORTH_COMPILING
        narrow = self.dtype.itemsize == 2
        return self.setup.gpu or (worth and narrow and which("g++") is not None)

    def with_choices(self, limit: int, recomputed: int) -> "Plan":
        """Return the plan with another limit of micro-batches and count of recomputed layers."""
        steps = self.steps.limited(limit)
        setup = replace(self.setup, tokens=steps.micro_batch_tokens, recomputed=recomputed)
        return replace(self, steps=steps, setup=setup)

    def change(self, free: int, *, ran_out: bool = False) -> Change | None:
        """Return the change to the recipe that costs least and makes it fit into so many bytes."""
        stored = self.base.stored is not None
        return cheapest(
            self.shape, self.setup, self.steps, free, self.recipe, stored=stored, ran_out=ran_out
        )

    @property
    def quantization(self) -> Quantization | None:
        """How the base's weights are held; None where they are dense."""
        return self.base.stored or Quantization.of(self.recipe.model)

    @property
    def servable(self) -> dict[str, str]:
        """What serves the adapter when it is trained, or why not, while it can be changed."""
        return self.method.servable(self.sites)


def make(
    recipe: Recipe,
    runtime: Runtime,
    permissions: Permissions,
    *,
    data: Dataset | None = None,
    card: Card | None = None,
    weights: bool = True,
) -> Plan:
    """Work out everything that can be known without weights.

    Args:
        recipe: what is planned.
        runtime: where it would run.
        permissions: of the command line.
        data: stands in for the recipe's.
        card: a GPU that stands in for the device that is here.
        weights: whether the base's weights must be there, since they are to be loaded.

    Raises:
        BadInput: when the recipe, the model's files or the data cannot be used.
        EnvironmentLacks: when a hub id needs the network, or the device lacks the dtype.
    """
    base = base_models.find(
        recipe.model,
        recipe.origin.folder,
        offline=permissions.offline,
        allow_remote_code=permissions.remote_code,
        cache=cache_folder(),
        weights=weights,
    )
    device = META if card else runtime.device
    dtype = card.takes(recipe.model.dtype) if card else resolve_dtype(recipe.model.dtype, device)
    skeleton = base_models.skeleton(base, recipe.task, dtype)
    method, sites, coverage = choose(recipe, skeleton)
    base_models.check_attention(recipe.model.attention)
    optimizer, replaced = optim.resolve(recipe.train, device)
    tokenizer = base_models.load_tokenizer(base)
    how = base.stored or Quantization.of(recipe.model)
    checks.check_after(recipe, base, method, how)
    with runtime.main_first():
        dataset = data or _prepared(recipe, base, method, tokenizer, permissions)
    # What is saved beside the adapter is the template that its rows were rendered with.
    tokenizer.chat_template = dataset.chat_template
    gpu = card.capability if card else capability(device)
    packing, unpacked = _packing(recipe, method, skeleton)
    notices = [*base.notices, *unusual(recipe), *without_effect(recipe), *coverage]
    notices += [*dataset.notices, *replaced, *unpacked]
    notices += [*(notices_of(skeleton, how, device) if how else []), *_not_here(recipe, gpu)]
    linears = [(site.outputs, site.inputs) for site in quantizable(skeleton)]
    steps = Steps.of(dataset, recipe, packing, runtime)
    _attach(recipe, method, skeleton, sites)
    longest = max(len(example.ids) for example in dataset.train)
    shape = Shape.of(skeleton, _traced(skeleton, recipe, longest, packing, gpu, notices), linears)
    free = card.memory if card else runtime.least_free_bytes()
    setup = Setup(
        steps.micro_batch_tokens,
        steps.trained_share,
        quantization=how,
        optimizer=optimizer,
        offload=bool(gpu) and recipe.train.gradient_checkpointing == "offload",
        gpu=bool(gpu),
    )
    steps, setup = settle(shape, setup, steps, free, recipe.train.gradient_checkpointing)
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
        shape,
        setup,
        free,
        runtime.local_processes,
        (*notices, *_warmup(recipe, steps.total), *checks.slow_dtype(recipe, dtype, device)),
    )


def _attach(recipe: Recipe, method: Method, skeleton: PreTrainedModel, sites: list[Site]) -> None:
    """Put the adapter on the skeleton, as it is in training; what may fail are whole copies."""
    try:
        adapters.attach(method, skeleton, sites, seed=recipe.seed)
    except BadInput as error:
        error.where = error.where or recipe.origin.place("adapter", "modules_to_save")
        raise
    adapters.set_training(skeleton, True)


def choose(recipe: Recipe, skeleton: PreTrainedModel) -> tuple[Method, list[Site], list[Notice]]:
    """Make the method and find its sites, with a notice where layers are covered unevenly.

    Raises:
        BadInput: when a target matches nothing, or a rank does not fit.
    """
    method = adapters.get(recipe.adapter.method)(recipe.adapter)
    candidates = find_sites(skeleton)
    try:
        chosen = method.sites(candidates)
    except BadInput as error:
        named = recipe.place_of(error.message)
        error.where = error.where or named or recipe.origin.place("adapter", "target_modules")
        raise
    return method, chosen, uneven(candidates, chosen)


def _prepared(
    recipe: Recipe,
    base: Base,
    method: Method,
    tokenizer: PreTrainedTokenizerBase,
    permissions: Permissions,
) -> Dataset:
    """Read, render and count the rows of a recipe, for the positions that its method leaves."""
    request = Request.of(
        recipe, offline=permissions.offline, allow_local_code=permissions.local_code
    )
    return prepared(cache_folder(), request, tokenizer, method.context(base.context))


def _traced(
    skeleton: PreTrainedModel,
    recipe: Recipe,
    longest: int,
    packing: Packing,
    gpu: tuple[int, int] | None,
    notices: list[Notice],
) -> Trace:
    """Count what the layers keep; roughly, with a notice, where a model cannot be run on meta."""
    attention = recipe.model.attention
    try:
        if attention != "auto" or can_pack(skeleton) is None:
            names = {"auto": NAME, "flash": LIKE_FLASH}
            skeleton.set_attn_implementation(names.get(attention, attention))
        return trace(skeleton, longest, packed=bool(packing), gpu=gpu)
    except Exception as error:  # anything that a family's own code may raise
        kind = skeleton.config.model_type
        message = f"{kind} cannot be run without its weights, so its activations are a rough guess"
        notices.append(Notice("plan.rough-estimate", f"{message} ({type(error).__name__})"))
        return plain_trace(skeleton.config, skeleton.dtype)


def _packing(
    recipe: Recipe, method: Method, skeleton: PreTrainedModel
) -> tuple[Packing, list[Notice]]:
    """Return how rows are packed; not, with a notice, where that cannot be and nobody asked.

    Raises:
        BadInput: when the recipe asks for what cannot be.
    """
    asked, reason = recipe.data.packing, _cannot_pack(method, skeleton)
    if not asked or reason is None:
        return True if asked == "auto" else asked, []
    if asked != "auto":
        where = recipe.origin.place("data", "packing")
        raise BadInput("recipe.conflict", f"data.packing: {reason}", where=where)
    return False, [Notice("run.packing-off", f"rows are padded, not packed: {reason}")]


def _warmup(recipe: Recipe, steps: int) -> list[Notice]:
    """Return a notice where the run ends before the rate has come to its highest."""
    warm = optim.warmup_steps(recipe.train, steps)
    if warm <= steps:
        return []
    message = f"train.warmup: {warm:,} steps of warm-up in a run of {steps:,}"
    where = recipe.origin.place("train", "warmup")
    help = "the rate never comes to train.learning_rate; 0.03 warms up over 3% of the steps"
    return [Notice("recipe.unusual-value", message, where, help)]


def _not_here(recipe: Recipe, gpu: tuple[int, int] | None) -> list[Notice]:
    """Return notices on what a device cannot do for a recipe."""
    if gpu or recipe.train.gradient_checkpointing != "offload":
        return []
    message = "train.gradient_checkpointing: offload is `true` here: there is no GPU to relieve"
    return [Notice("run.no-offload", message)]


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
