"""Choose what makes a run fit: how a step is split, and how many layers are computed again."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from lorakit.data.batches import Steps
from lorakit.training.memory import Setup, Shape, estimate

# Products of fewer tokens leave a GPU idle: rather recompute a layer than go below.
ENOUGH_TOKENS = 2048
# More tokens make no product faster.
MOST_TOKENS = 8192
# Free memory changes while a run goes on, and an allocator cannot use the last of it.
MARGIN = 0.95

Checkpointing = bool | Literal["auto"]


def settle(
    shape: Shape, setup: Setup, steps: Steps, free: int, checkpointing: Checkpointing
) -> tuple[Steps, Setup]:
    """Return steps and setup that fit into so many bytes, at the least cost in time.

    What the recipe leaves open: first micro-batches down to `ENOUGH_TOKENS`; then recomputed
    layers, as few as that needs; then smaller micro-batches. Where nothing fits, the smallest.
    """
    most = shape.layers if checkpointing else 0
    least = most if checkpointing is True else 0

    def tried(split: Steps, recomputed: int) -> Setup:
        return replace(setup, tokens=split.micro_batch_tokens, recomputed=recomputed)

    def fits(split: Steps, recomputed: int) -> bool:
        return estimate(shape, tried(split, recomputed)).total <= MARGIN * free

    splits = list(_splits(steps, setup))
    large = [s for s in splits if s.micro_batch_tokens >= ENOUGH_TOKENS] or splits[:1]
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
