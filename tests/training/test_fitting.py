"""What is chosen when memory is short: smaller micro-batches, recomputed layers, in that order."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from lorakit.data.batches import MICRO_BATCH_TOKENS, Steps
from lorakit.data.tokens import Example
from lorakit.errors import Place
from lorakit.model.quantized import Quantization
from lorakit.recipe.sections import Recipe
from lorakit.training import fitting
from lorakit.training.fitting import (
    ENOUGH_TOKENS,
    MARGIN,
    MOST_TOKENS,
    SHORTEST,
    Checkpointing,
    cheapest,
    scale_of,
    settle,
)
from lorakit.training.memory import Setup, Shape, estimate
from tests.training.shapes import llama, shape

LAYERS = 6


@cache
def known() -> Shape:
    return shape(llama(64, 176, LAYERS, 4, 2, 320), torch.bfloat16, rank=4)


def steps(**settings: Any) -> Steps:
    ids = np.zeros(512, np.int32)
    rows = [Example(ids, ids, Place("rows.jsonl", n)) for n in range(64)]
    return Steps(rows, batch_size=64, max_length=512, **settings)


def chosen(
    free: float, checkpointing: Checkpointing = "auto", *, gpu: bool = True, **settings: Any
) -> tuple[int, int]:
    """Return the tokens and the recomputed layers that are chosen for free bytes."""
    split, setup = settle(known(), Setup(0, gpu=gpu), steps(**settings), int(free), checkpointing)
    assert split.micro_batch_tokens == setup.tokens
    return setup.tokens, setup.recomputed


def needed(tokens: int, recomputed: int) -> float:
    """Return the free bytes at which this much just fits."""
    return 1 + estimate(known(), Setup(tokens, recomputed=recomputed, gpu=True)).total / MARGIN


def test_what_fits_is_left_alone() -> None:
    assert chosen(1e12) == (MOST_TOKENS, 0)
    assert chosen(1e12, gpu=False) == (MICRO_BATCH_TOKENS, 0)
    assert chosen(1e12, micro_batch_size=3) == (3 * 512, 0)


def test_first_come_smaller_micro_batches() -> None:
    assert chosen(needed(MOST_TOKENS, 0) - 100) == (MOST_TOKENS // 2, 0)
    assert chosen(needed(ENOUGH_TOKENS, 0)) == (ENOUGH_TOKENS, 0)


@pytest.mark.parametrize("size", ["auto", ENOUGH_TOKENS // 512])
def test_then_as_few_recomputed_layers_as_memory_asks_for(size: Any) -> None:
    seen = set()
    for free in np.linspace(needed(ENOUGH_TOKENS, LAYERS), needed(ENOUGH_TOKENS, 0), 20):
        tokens, layers = chosen(free, micro_batch_size=size)
        assert tokens == ENOUGH_TOKENS
        assert needed(tokens, layers) - 1 <= free
        assert layers == 0 or needed(tokens, layers - 1) > free
        seen.add(layers)
    assert {0, 1, 2} <= seen


def test_then_still_smaller_micro_batches_and_in_the_end_the_smallest() -> None:
    assert chosen(needed(1024, LAYERS)) == (1024, LAYERS)
    assert chosen(1) == (512, LAYERS)


def test_a_measured_peak_is_what_is_needed_with_its_scale() -> None:
    setup = Setup(ENOUGH_TOKENS, gpu=True)
    memory = estimate(known(), setup)
    moving = memory.parts["activations"] + memory.parts["logits"]
    peak = memory.total - memory.parts["overhead"] + moving // 2
    scale = scale_of(known(), setup, peak)
    assert scale == pytest.approx(1.5)
    assert fitting.needed(known(), setup, scale) == pytest.approx(memory.total + moving / 2)
    free = int(needed(ENOUGH_TOKENS, 0))
    setup = Setup(0, gpu=True)
    for times in (1.0, scale):
        found = settle(known(), setup, steps(), free, "auto", times)[1]
        assert fitting.needed(known(), found, times) <= MARGIN * free
        assert (found.tokens, found.recomputed > 0) == (ENOUGH_TOKENS, times > 1)


def test_what_the_recipe_says_stays() -> None:
    assert chosen(1e12, True) == (MOST_TOKENS, LAYERS)
    assert chosen(needed(1024, 0), False) == (1024, 0)
    assert chosen(1, False) == (512, 0)
    assert chosen(1, "auto", micro_batch_size=2) == (1024, LAYERS)


def recipe(**train: Any) -> Recipe:
    return Recipe.model_validate({"model": "m", "data": {"train": "rows.jsonl"}, "train": train})


WIDE = (256, 704, 2 * LAYERS, 4, 2, 320)
NF4, SHORT = Quantization("nf4"), 256
# In the order of what they cost: each kind of change comes with all before it.
ORDER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"tokens": 16 * 512}),
    ({"train.micro_batch_size": 1}, {"tokens": 512}),
    ({"train.gradient_checkpointing": True}, {"recomputed": 2 * LAYERS}),
    ({"train.gradient_checkpointing": "offload"}, {"offload": True}),
    ({"model.quantization": "nf4"}, {"quantization": NF4}),
    ({"data.max_length": SHORT, "data.too_long": "truncate"}, {"tokens": SHORT}),
]


@pytest.mark.parametrize("kinds", range(1, len(ORDER) + 1))
def test_changes_come_in_the_order_of_what_they_cost(kinds: int) -> None:
    """A kind of change comes in just where the cheaper ones are not enough."""
    wide = shape(llama(*WIDE), torch.bfloat16, rank=4)
    written = recipe(micro_batch_size=16, gradient_checkpointing=False, batch_size=64)
    split, keys, setup = steps(micro_batch_size=16), {}, Setup(0, gpu=True)
    for change, how in ORDER[:kinds]:
        keys, setup = keys | change, replace(setup, **how)
    just = estimate(wide, setup).total
    plain = Setup(16 * 512, gpu=True)
    found = cheapest(wide, plain, split, int(just / MARGIN) + 1, written)
    assert found is not None
    assert found.keys == keys
    assert found.memory.total == just
    assert found.exact == (not keys.keys() & {"model.quantization", "data.max_length"})
    below = cheapest(wide, plain, split, int((just - 1) / MARGIN), written)
    assert below is None or (below.memory.total < just and below.keys != keys)


@pytest.mark.parametrize(
    ("held", "keys"),
    [
        (None, {"model.quantization": "nf4"}),
        (Quantization("int8"), {"model.quantization": "nf4"}),
        (Quantization("nf4", False), {"model.double_quant": True}),
        (Quantization("fp4", False), {"model.double_quant": True}),
        (Quantization("nf4"), None),
        (Quantization("fp4"), None),
    ],
    ids=str,
)
def test_a_base_is_held_smaller_where_the_recipe_chose_how(
    held: Quantization | None, keys: dict[str, Any] | None
) -> None:
    wide = shape(llama(*WIDE), torch.bfloat16, rank=4)
    model = {"path": "m", "double_quant": held.double if held else True}
    model["quantization"] = held.form if held else "none"
    train = {"micro_batch_size": 1, "gradient_checkpointing": "offload", "batch_size": 64}
    written = Recipe.model_validate(
        {"model": model, "data": {"train": "rows.jsonl"}, "train": train}
    )
    setup = Setup(SHORTEST, recomputed=2 * LAYERS, offload=True, quantization=held, gpu=True)
    needs = estimate(wide, replace(setup, quantization=Quantization("nf4"))).total
    free = int(needs / MARGIN) + 1
    split = steps(micro_batch_size=1).shortened(SHORTEST)
    found = cheapest(wide, setup, split, free - 2000 * (keys is None), written)
    assert (found and found.keys) == keys
    assert found is None or not found.exact
    assert cheapest(wide, setup, split, free - 2000, written, stored=True) is None


@pytest.mark.parametrize("size", ["auto", 8, 1])
@pytest.mark.parametrize("layers", [0, 2, LAYERS])
def test_what_ran_out_under_auto_is_not_proposed_again(size: Any, layers: int) -> None:
    """The change is named, and with it `auto` cannot choose more than what is promised."""
    room = needed(ENOUGH_TOKENS, layers)
    split, setup = settle(
        known(), Setup(0, gpu=True), steps(micro_batch_size=size), int(room), "auto"
    )
    less = int(0.9 * estimate(known(), setup).total)
    written = recipe(micro_batch_size=size, batch_size=64)
    change = cheapest(known(), setup, split, less, written, ran_out=True)
    if change is None:
        assert estimate(known(), replace(setup, recomputed=LAYERS)).total > MARGIN * less
        return
    assert change.keys
    assert change.memory.total <= MARGIN * less
    rows = change.keys.get("train.micro_batch_size", size)
    way = change.keys.get("train.gradient_checkpointing", "auto")
    if way != "offload":
        again = settle(known(), setup, steps(micro_batch_size=rows), int(room), way)[1]
        assert estimate(known(), again).total <= change.memory.total


def test_a_host_has_no_host_to_offload_to() -> None:
    setup = Setup(2048, gpu=False)
    for free in (1e8, 6.4e8, 6.5e8):
        change = cheapest(known(), setup, steps(), int(free), recipe())
        assert change is None or "offload" not in change.options


def test_nothing_is_proposed_where_nothing_helps() -> None:
    assert cheapest(known(), Setup(2048, gpu=True), steps(), 1000, recipe()) is None
