"""Laws of packing and steps: every row once an epoch, whatever the batches look like."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.data import batches
from lorakit.data.batches import Batch, Steps, eval_batches, permutation
from lorakit.data.packing import pack, padded_groups
from lorakit.data.tokens import Example
from lorakit.errors import Place
from lorakit.model.inputs import MASKED

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
PACKINGS = st.sampled_from([True, False, "dense"])


def _examples(lengths: list[int]) -> list[Example]:
    """Return examples whose ids say which row and place they are of; some tokens are masked."""
    made = []
    for row, length in enumerate(lengths):
        ids = np.arange(length, dtype=np.int32) + 100 * row
        labels = np.where(np.arange(length) % 3 == 0, MASKED, ids).astype(np.int32)
        made.append(Example(ids, labels, Place("rows.jsonl", row + 1)))
    return made


@st.composite
def _settings(draw: st.DrawFn) -> dict[str, Any]:
    """Draw everything that `Steps` takes but the process."""
    lengths = draw(LENGTHS)
    weights = draw(st.sampled_from([(1.0,), (1.0, 2.0), (0.5, 1.0), (2.5,), (0.25, 3.0)]))
    return {
        "examples": _examples(lengths),
        "batch_size": draw(st.integers(1, 9)),
        "micro_batch_size": draw(st.sampled_from(["auto", 1, 2, 3])),
        "packing": draw(PACKINGS),
        "max_length": 60,
        "epochs": draw(st.sampled_from([0.3, 1.0, 1.5, 2.0, 3.0])),
        "max_steps": draw(st.sampled_from([None, 1, 4, 1000])),
        "weights": [weights[row % len(weights)] for row in range(len(lengths))],
        "seed": draw(st.integers(0, 3)),
    }


@pytest.fixture(autouse=True)
def _small_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", 100)


def _all(steps: Steps, numbers: range) -> list[Batch]:
    return [batch for number in numbers for batch in steps.step(number)]


def _expected(weights: list[float]) -> Counter[float]:
    """Return how many rows of each weight an epoch has."""
    return Counter(
        {w: int(w) * n + (round((w % 1) * n) or w < 1) for w, n in Counter(weights).items()}
    )


@settings(max_examples=60)
@given(keys=_settings())
def test_every_row_as_often_as_its_weight_in_every_epoch(keys: dict[str, Any]) -> None:
    steps = Steps(**keys)
    weights = keys["weights"]
    for epoch in range(2):
        first = epoch * steps.per_epoch
        rows = Counter(
            row
            for batch in _all(steps, range(first, first + steps.per_epoch))
            for row in batch.rows
        )
        for row, times in rows.items():
            assert int(weights[row]) <= times <= math.ceil(weights[row])
        found = Counter(
            {w: sum(n for row, n in rows.items() if weights[row] == w) for w in weights}
        )
        assert found == _expected(weights)


@settings(max_examples=60)
@given(keys=_settings())
def test_steps_are_as_many_as_planned(keys: dict[str, Any]) -> None:
    steps = Steps(**keys)
    size, rows = keys["batch_size"], sum(_expected(keys["weights"]).values())
    if keys["packing"] != "dense":
        assert steps.per_epoch == math.ceil(rows / size)
    assert steps.total == min(
        math.ceil(keys["epochs"] * steps.per_epoch - 1e-9), keys["max_steps"] or 10**9
    )
    made = [steps.step(number) for number in range(steps.total)]
    assert all(made)
    assert sum(batch.tokens for step in made for batch in step) == steps.tokens
    largest = steps.largest().input_ids.numel()
    assert max(b.input_ids.numel() for step in made for b in step) <= steps.micro_batch_tokens
    assert largest <= steps.micro_batch_tokens
    if keys["packing"] != "dense":
        sizes = [sum(len(batch.rows) for batch in step) for step in made]
        assert all(n == size for k, n in enumerate(sizes, 1) if k % steps.per_epoch)


def test_the_largest_micro_batch_is_tried_though_the_longest_rows_make_two() -> None:
    """Sixteen rows of 170 tokens are two halves of 1,360; sixteen of 155 are one of 2,480."""
    rows = _examples([170] * 16 + [155] * 48)
    steps = Steps(rows, batch_size=16, seed=1).limited(2560)
    real = max(b.input_ids.numel() for n in range(steps.total) for b in steps.step(n))
    assert 0.97 * real <= steps.largest().input_ids.numel() <= steps.micro_batch_tokens
    assert real > 2400


@settings(max_examples=60)
@given(keys=_settings(), processes=st.integers(1, 5))
def test_processes_share_the_same_micro_batches(keys: dict[str, Any], processes: int) -> None:
    alone = Steps(**keys)
    shares = [Steps(**keys, process=k, processes=processes) for k in range(processes)]
    for number in range(min(alone.total, 4)):
        parts = [share.step(number) for share in shares]
        rows = sorted(row for part in parts for batch in part for row in batch.rows)
        assert rows == sorted(row for batch in alone.step(number) for row in batch.rows)
        counts = [len(part) for part in parts]
        assert max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)
        every = [batch for part in parts for batch in part]
        sums = sum(batch.tokens for batch in every), sum(batch.trained_tokens for batch in every)
        assert {share.tokens_of(number) for share in shares} == {sums}
        assert sorted(place.line or 0 for place in shares[-1].places(number)) == [
            r + 1 for r in rows
        ]


@settings(max_examples=60)
@given(keys=_settings(), at=st.integers(0, 20))
def test_a_step_depends_on_seed_and_number_alone(keys: dict[str, Any], at: int) -> None:
    walked, jumped = Steps(**keys), Steps(**keys)
    _all(walked, range(at))
    for one, other in zip(walked.step(at), jumped.step(at), strict=True):
        assert one.rows == other.rows
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)
    assert walked.order_sha256(at) == jumped.order_sha256(at)


def test_packed_steps_have_the_rows_of_padded_ones() -> None:
    examples = _examples([5, 9, 13, 60, 2, 7, 30, 31])
    rows = [
        [sorted(row for b in steps.step(k) for row in b.rows) for k in range(steps.total)]
        for steps in (Steps(examples, batch_size=3, packing=flag, seed=5) for flag in (True, False))
    ]
    assert rows[0] == rows[1]


def test_epochs_and_seeds_shuffle_anew() -> None:
    examples = _examples([3] * 30)
    orders = {
        Steps(examples, batch_size=4, seed=seed).order_sha256(k * 8)
        for seed in (0, 1)
        for k in (0, 1)
    }
    assert len(orders) == 4


@settings(max_examples=60)
@given(keys=_settings())
def test_a_batch_holds_its_rows_and_nothing_else(keys: dict[str, Any]) -> None:
    examples, steps = keys["examples"], Steps(**keys)
    for batch in _all(steps, range(min(steps.total, 5))):
        for tensor in (batch.input_ids, batch.labels, batch.position_ids):
            assert tensor.dtype == torch.long
            assert tensor.shape == batch.input_ids.shape
        lengths = [len(examples[row].ids) for row in batch.rows]
        if keys["packing"]:
            assert batch.lengths == tuple(lengths)
            assert batch.input_ids.shape == (1, sum(lengths))
            parts = [
                t[0].split(lengths) for t in (batch.input_ids, batch.labels, batch.position_ids)
            ]
            rows = zip(*parts, strict=True)
        else:
            assert batch.lengths is None
            tensors = (batch.input_ids, batch.labels, batch.position_ids)
            assert (batch.labels != MASKED).sum() == sum(
                examples[row].trained for row in batch.rows
            )
            rows = ([t[k, :n] for t in tensors] for k, n in enumerate(lengths))  # type: ignore[assignment]
        for row, (ids, labels, positions) in zip(batch.rows, rows, strict=True):
            assert ids.tolist() == examples[row].ids.tolist()
            assert labels.tolist() == examples[row].labels.tolist()
            assert positions.tolist() == list(range(len(ids)))
        assert batch.tokens == sum(lengths)
        assert batch.trained_tokens == (batch.labels != MASKED).sum()


@settings(max_examples=60)
@given(lengths=LENGTHS, budget=st.integers(1, 200), packing=st.booleans())
def test_evaluation_sees_every_row_once(lengths: list[int], budget: int, packing: bool) -> None:
    examples = _examples(lengths)
    made = list(eval_batches(examples, budget, packing=packing))
    assert sorted(row for batch in made for row in batch.rows) == list(range(len(lengths)))
    assert all(b.input_ids.numel() <= budget or len(b.rows) == 1 for b in made)


@given(lengths=st.lists(st.integers(1, 100), max_size=60), capacity=st.integers(1, 120))
def test_packs_are_a_partition_within_the_capacity(lengths: list[int], capacity: int) -> None:
    packs = pack(lengths, capacity)
    assert sorted(index for some in packs for index in some) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in some) for some in packs]
    assert all(total <= capacity or len(some) == 1 for total, some in zip(sums, packs, strict=True))
    # No two packs could have been one, which is what "best fit" may never leave behind.
    assert all(a + b > capacity for k, a in enumerate(sums) for b in sums[:k])


@given(lengths=st.lists(st.integers(1, 100), max_size=60), budget=st.integers(1, 400))
def test_padded_groups_are_a_partition_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = padded_groups(lengths, budget)
    assert sorted(index for some in groups for index in some) == list(range(len(lengths)))
    for some in groups:
        assert len(some) == 1 or len(some) * max(lengths[index] for index in some) <= budget


@given(n=st.integers(0, 200), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 99))
def test_a_permutation_is_one(n: int, seed: int, epoch: int) -> None:
    order = permutation(n, seed, epoch, 0)
    assert sorted(order.tolist()) == list(range(n))
    assert (order == permutation(n, seed, epoch, 0)).all()


@settings(max_examples=40)
@given(keys=_settings())
def test_halved_steps_take_the_same_rows_in_smaller_micro_batches(keys: dict[str, Any]) -> None:
    steps = Steps(**keys)
    split: Steps | None = steps
    sizes = []
    while split:
        sizes.append(split.micro_batch_tokens)
        for number in range(min(steps.total, 3)):
            batches_of = [sorted(b.rows) for b in split.step(number)]
            assert all(b.input_ids.numel() <= sizes[-1] for b in split.step(number))
            whole = sorted(row for batch in steps.step(number) for row in batch.rows)
            assert sorted(row for rows in batches_of for row in rows) == whole
        smallest, split = split, split.halved()
    assert sizes == sorted(sizes, reverse=True)
    assert smallest.limited(steps.limit).micro_batch_tokens == steps.micro_batch_tokens
