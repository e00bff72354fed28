"""Choose what makes a run fit: how a step is split, and how many layers are computed again."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from lorakit.data.batches import Steps
from lorakit.model.quantized import Quantization
from lorakit.recipe.sections import Recipe
from lorakit.training.memory import Memory, Setup, Shape, estimate

# Products of fewer tokens leave a GPU idle, and on a CPU (SmolLM2-135M, two cores: 13 % more time
# at 512 than at 1,024) cost as much as recomputing: rather recompute a layer than go below.
ENOUGH_TOKENS, ENOUGH_TOKENS_CPU = 2048, 512
# More tokens make no product faster.
MOST_TOKENS = 8192
# Free memory changes while a run goes on, and an allocator cannot use the last of it.
MARGIN = 0.95

# Rows shorter than this are not proposed.
SHORTEST = 128

Checkpointing = bool | Literal["auto", "offload"]


def needed(shape: Shape, setup: Setup, scale: float = 1.0) -> float:
    """Return the bytes of a step whose activations take so many times what is estimated."""
    memory = estimate(shape, setup)
    return memory.total + (scale - 1) * _moving(memory)


def scale_of(shape: Shape, setup: Setup, peak: int) -> float:
    """Return how many times what is estimated the activations of a step with this peak took."""
    memory = estimate(shape, setup)
    still = memory.total - _moving(memory) - memory.parts["overhead"]
    return (peak - still) / _moving(memory)


def _moving(memory: Memory) -> int:
    return memory.parts["activations"] + memory.parts["logits"]


def settle(
    shape: Shape,
    setup: Setup,
    steps: Steps,
    free: int,
    checkpointing: Checkpointing,
    scale: float = 1.0,
) -> tuple[Steps, Setup]:
    """Return steps and setup that fit into so many bytes, at the least cost in time.

    What the recipe leaves open: first micro-batches down to enough tokens; then recomputed
    layers, as few as that needs; then smaller micro-batches. Where nothing fits, the smallest.
    Activations take `scale` times what is estimated.
    """
    most = shape.layers if checkpointing else 0
    least = 0 if checkpointing == "auto" else most

    def tried(split: Steps, recomputed: int) -> Setup:
        return replace(setup, tokens=split.micro_batch_tokens, recomputed=recomputed)

    def fits(split: Steps, recomputed: int) -> bool:
        return needed(shape, tried(split, recomputed), scale) <= MARGIN * free

    splits = list(_splits(steps, setup))
    enough = ENOUGH_TOKENS if setup.gpu else ENOUGH_TOKENS_CPU
    large = [s for s in splits if s.micro_batch_tokens >= enough] or splits[:1]
    for split in large:
        if fits(split, least):
            return split, tried(split, least)
    for split in splits[len(large) - 1 :]:
        if fits(split, most):
            counts = range(most)
            found = bisect_left(counts, True, lo=least, key=lambda count: fits(split, count))
            return split, tried(split, found)
    return splits[-1], tried(splits[-1], most)


def _splits(steps: Steps, setup: Setup) -> Iterator[Steps]:
    """Yield the steps in ever smaller micro-batches, where the recipe leaves their size open."""
    if not steps.by_tokens:
        yield steps
        return
    split: Steps | None = steps.limited(MOST_TOKENS) if setup.gpu else steps
    while split:
        yield split
        split = split.halved()


@dataclass(frozen=True)
class Change:
    """Recipe keys that make a run fit, with their values, and what it then needs."""

    keys: dict[str, Any]
    memory: Memory

    @property
    def overrides(self) -> list[str]:
        """The change as values of `--set`."""
        return [f"{key}={str(value).lower()}" for key, value in self.keys.items()]

    @property
    def options(self) -> str:
        """The change as options of the command line."""
        return " ".join(f"-s {one}" for one in self.overrides)

    @property
    def exact(self) -> bool:
        """Whether the result stays what it is."""
        return not any(key.startswith(("model.", "data.")) for key in self.keys)


def cheapest(
    shape: Shape,
    setup: Setup,
    steps: Steps,
    free: int,
    recipe: Recipe,
    *,
    stored: bool = False,
    ran_out: bool = False,
) -> Change | None:
    """Return the change that costs least and makes a run fit into so many bytes, None if none does.

    Tried in order, each with all that come before it: smaller micro-batches, recomputed layers,
    their inputs in host memory, a base in 4 bits, shorter rows. A form that the base is `stored` in
    stays. With `ran_out` the setup is what did not fit although it had been expected to, so `auto`
    would choose it again.
    """
    quantizations = dict.fromkeys([setup.quantization])
    if not stored:
        held = setup.quantization
        quantizations[Quantization("fp4" if held and held.form == "fp4" else "nf4")] = None
    asked = recipe.train.gradient_checkpointing
    longest = steps.max_length
    lengths = [length for n in range(10) if (length := longest >> n) >= SHORTEST or n == 0]
    first: Checkpointing = asked
    if ran_out and asked == "auto":  # no layer, as `auto` had it, or all
        first = setup.recomputed > 0
    ways: dict[Checkpointing, None] = dict.fromkeys([first, True])
    if setup.gpu:
        ways["offload"] = None
    for length, how, checkpointing in product(lengths, quantizations, ways):
        split: Steps | None = steps.shortened(length)
        offload = setup.gpu and checkpointing == "offload"
        while split:
            tried = replace(setup, quantization=how, offload=offload)
            split, tried = settle(shape, tried, split, free, checkpointing)
            memory = estimate(shape, tried)
            if memory.total <= MARGIN * free:
                keys: dict[str, Any] = {}
                if split.limit < steps.limit:
                    rows = split.limit // split.longest if split.by_tokens else split.limit
                    keys["train.micro_batch_size"] = max(1, rows)
                if checkpointing and checkpointing != asked:
                    keys["train.gradient_checkpointing"] = checkpointing
                if how and how != setup.quantization:
                    if how.form != recipe.model.quantization:
                        keys["model.quantization"] = how.form
                    if not recipe.model.double_quant:
                        keys["model.double_quant"] = True
                if length != longest:
                    keys["data.max_length"] = length
                    if steps.longest > length and recipe.data.too_long != "truncate":
                        keys["data.too_long"] = "truncate"
                return Change(keys, memory)
            split = None if split.by_tokens else split.halved()
    return None
