"""Examples → micro-batches. The position in the data is the number of the step, nothing else."""

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.data.packing import pack, padded_groups, spread
from lorakit.data.prepare import Dataset
from lorakit.data.tokens import Example, Examples
from lorakit.errors import BadInput, Place
from lorakit.model.inputs import MASKED
from lorakit.recipe.sections import Recipe
from lorakit.runtime import Runtime

# Each pass over the layers costs as much as some 250 tokens of a small model on two cores: so many
# that it is a tenth.
MICRO_BATCH_TOKENS = 2560
MOST_REPEATED = 10_000_000  # rows of an epoch that weights may make of fewer

Packing = bool | Literal["dense"]
# What a permutation is for; each use has numbers of its own.
_ROWS, _PACKS, _SUBSET = range(3)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: input_ids, labels and position_ids (rows, tokens), all long.

    Packed, there is one row of documents end to end, with `lengths` and restarting positions; else
    `lengths` is None and rows are padded on the right. `rows` are indices of the examples,
    `tokens` counts without padding.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...] | None
    rows: tuple[int, ...]
    trained_tokens: int
    tokens: int


class Steps:
    """The micro-batches of every optimizer step: a pure function of seed and step number.

    `limit` is how large a micro-batch may be: in tokens where `by_tokens`, else in rows. `longest`
    is the tokens of the longest row, or dense pack; `max_length` is what neither goes beyond.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        micro_batch_size: int | Literal["auto"] = "auto",
        packing: Packing = True,
        max_length: int = 2048,
        epochs: float = 1.0,
        max_steps: int | None = None,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        """Count the steps.

        Args:
            examples: all rows.
            batch_size: rows (dense: packs) of one optimizer step over all processes.
            micro_batch_size: rows (dense: packs) of one forward pass; auto: by tokens.
            packing: true: the rows of a step; dense: best fit over all rows; false: padded.
            max_length: the most tokens of a row, and of a dense pack.
            epochs: passes over the data; with max_steps the smaller stops.
            max_steps: optimizer steps.
            weights: repeats per epoch of each example; a fraction takes a seeded share.
            seed: of every permutation.
            process: which share of the micro-batches is ours.
            processes: how many shares there are.
        """
        self._examples, self._seed = Examples.of(examples), seed
        self._batch_size, self.by_tokens = batch_size, micro_batch_size == "auto"
        self.limit = MICRO_BATCH_TOKENS if micro_batch_size == "auto" else micro_batch_size
        self._packing, self.max_length = packing, max_length
        self._process, self._processes = process, processes
        self._lengths, self._trained = self._examples.lengths, self._examples.trained
        self._rows = _repeated(weights or [1.0] * len(examples), seed)
        self._epoch = lru_cache(maxsize=1)(self._units)
        self.longest = max(int(self._lengths[unit].sum()) for unit in self._epoch(0))
        self.per_epoch = math.ceil(len(self._epoch(0)) / batch_size)
        # Two decimals of an epoch must not become one step more by rounding in binary.
        planned = math.ceil(round(epochs * self.per_epoch, 6))
        self.total = min(planned, max_steps or planned)

    @classmethod
    def of(cls, dataset: Dataset, recipe: Recipe, packing: Packing, runtime: Runtime) -> Self:
        """Return the steps that a recipe asks for, for this process."""
        train = recipe.train
        return cls(
            dataset.train,
            batch_size=train.batch_size,
            micro_batch_size=train.micro_batch_size,
            packing=packing,
            max_length=dataset.max_length,
            epochs=train.epochs,
            max_steps=train.max_steps,
            weights=dataset.weights,
            seed=recipe.seed,
            process=runtime.process,
            processes=runtime.processes,
        )

    @property
    def tokens(self) -> int:
        """The tokens of the whole run, without padding."""
        epochs, rest = divmod(self.total, self.per_epoch)
        units = self._epoch(epochs)[: rest * self._batch_size]
        whole = epochs * int(self._lengths[self._rows].sum())
        return whole + sum(int(self._lengths[unit].sum()) for unit in units)

    @property
    def micro_batch_tokens(self) -> int:
        """The most tokens, padding included, that a micro-batch can have."""
        longest = np.sort(self._lengths[self._rows])[::-1]
        dense = self._packing == "dense"
        unit = self.longest if dense or not self._packing else 0
        whole = self._batch_size * unit or int(longest[: self._batch_size].sum())
        if self.by_tokens:
            return min(whole, max(self.limit, self.longest))
        return min(whole, self.limit * unit or int(longest[: self.limit].sum()))

    @property
    def trained_share(self) -> float:
        """The trained tokens of an epoch as a share of all its tokens."""
        return float(self._trained[self._rows].sum() / self._lengths[self._rows].sum())

    @property
    def squares(self) -> float:
        """The mean of a step's sum of squared row lengths, which attention's work follows."""
        return float((self._lengths[self._rows] ** 2).sum() / self.per_epoch)

    def limited(self, limit: int) -> Self:
        """Return the same steps in micro-batches of another limit: rows, or tokens when auto."""
        other = copy.copy(self)
        other.limit = limit
        return other

    def shortened(self, length: int) -> Self:
        """Return steps over rows cut to a length: at most what shorter rows would take."""
        other = copy.copy(self)
        other._lengths = np.minimum(self._lengths, length)
        other.longest = min(self.longest, length)
        other.max_length = length
        return other

    def halved(self) -> Self | None:
        """Return the same steps in micro-batches half as large, None where one is a single row."""
        if not self.by_tokens:
            return self.limited(self.limit // 2) if self.limit > 1 else None
        tokens = self.micro_batch_tokens
        return self.limited(tokens // 2) if tokens > self.longest else None

    def order_sha256(self, index: int) -> str:
        """Return the digest of the row order in the epoch of a step: a checkpoint compares it."""
        units = self._epoch(index // self.per_epoch)
        rows = np.concatenate([np.append(unit, -1) for unit in units]).astype("<i8")
        return hashlib.sha256(rows.tobytes()).hexdigest()

    def step(self, index: int, *, whole: bool = False) -> list[Batch]:
        """Return this process's micro-batches of an optimizer step, counted from 0 over the run.

        Every process works out all of them and takes its share, which may be empty; `whole` gives
        each of them all.
        """
        units = self._units_of(index)
        groups = self._grouped([int(self._lengths[unit].sum()) for unit in units])
        mine = groups if whole else groups[self._process :: self._processes]
        rows = ([int(row) for unit in group for row in units[unit]] for group in mine)
        make = _packed if self._packing else _padded
        return [make(self._examples, some) for some in rows]

    def largest(self) -> Batch:
        """Return a micro-batch as large as one can become, from the longest rows of an epoch."""
        units = sorted(self._epoch(0), key=lambda unit: -int(self._lengths[unit].sum()))
        lengths = [int(self._lengths[unit].sum()) for unit in units[: self._batch_size]]
        # Not evenly, as in a step: others may just fit into one micro-batch.
        packs = self.by_tokens and self._packing
        groups = pack(lengths, max(self.limit, self.longest)) if packs else self._grouped(lengths)
        made = ([int(row) for unit in group for row in units[unit]] for group in groups)
        make = _packed if self._packing else _padded
        return max((make(self._examples, rows) for rows in made), key=lambda b: b.input_ids.numel())

    def tokens_of(self, index: int) -> tuple[int, int]:
        """Return the tokens, and of them the trained ones, of a step over all processes."""
        rows = np.concatenate(self._units_of(index))
        return int(self._lengths[rows].sum()), int(self._trained[rows].sum())

    def places(self, index: int) -> list[Place]:
        """Return where the rows of a step stand in the user's files."""
        return [self._examples[row].place for row in np.concatenate(self._units_of(index))]

    def _units_of(self, index: int) -> list[NDArray[np.int64]]:
        epoch, position = divmod(index, self.per_epoch)
        first = position * self._batch_size
        return self._epoch(epoch)[first : first + self._batch_size]

    def _units(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return what a batch counts, in the epoch's order: rows, or dense packs of rows."""
        rows = self._rows[permutation(len(self._rows), self._seed, epoch, _ROWS)]
        if self._packing != "dense":
            return list(rows[:, None])
        packs = pack(self._lengths[rows].tolist(), self.max_length)
        order = permutation(len(packs), self._seed, epoch, _PACKS)
        return [rows[packs[number]] for number in order]

    def _grouped(self, lengths: list[int]) -> list[list[int]]:
        """Split the units of a step into micro-batches, at least one a process where it can be."""
        if self.by_tokens:
            most = max(self.limit, self.longest)
            if self._packing:
                return spread(lengths, most, self._processes)
            share = max(*lengths, math.ceil(sum(lengths) / self._processes))
            return padded_groups(lengths, min(most, share))
        size = min(self.limit, math.ceil(len(lengths) / self._processes))
        order = np.argsort([-length for length in lengths], kind="stable").tolist()
        return [order[at : at + size] for at in range(0, len(order), size)]


def eval_batches(
    examples: Sequence[Example], budget: int = MICRO_BATCH_TOKENS, *, packing: bool = True
) -> Iterator[Batch]:
    """Yield every example once, longest first, in batches of at most `budget` tokens.

    An example that is longer than the budget is a batch of its own.
    """
    lengths = Examples.of(examples).lengths.tolist()
    groups = pack(lengths, budget) if packing else padded_groups(lengths, budget)
    for group in groups:
        yield (_packed if packing else _padded)(examples, group)


def permutation(n: int, seed: int, epoch: int, use: int) -> NDArray[np.int64]:
    """Return the numbers below n in an order that depends on the other arguments alone.

    Sorting raw random words, whose stream NumPy promises to keep; its own shuffles may change.
    """
    words = np.random.PCG64(np.random.SeedSequence((seed, epoch, use))).random_raw(n)
    return np.argsort(words, kind="stable")


def _repeated(weights: Sequence[float], seed: int) -> NDArray[np.int64]:
    """Return the rows of an epoch, each as often as its weight says."""
    if sum(weights) > max(len(weights), MOST_REPEATED):
        raise BadInput(
            "recipe.out-of-range",
            f"data.train: the weights make {sum(weights):,.0f} rows an epoch of {len(weights):,}; "
            f"at most {MOST_REPEATED:,} are taken",
            help="a weight is how often each row of a source is seen in an epoch",
        )
    every = np.asarray(weights)
    parts = []
    for weight in np.unique(every):
        rows = np.flatnonzero(every == weight)
        share = round((weight % 1) * len(rows))
        if weight < 1:
            share = max(1, share)
        some = rows[permutation(len(rows), seed, 0, _SUBSET)[:share]]
        parts += [*[rows] * int(weight), some]
    return np.sort(np.concatenate(parts))


def _packed(examples: Sequence[Example], rows: Sequence[int]) -> Batch:
    some = [examples[row] for row in rows]
    return _batch(
        np.concatenate([example.ids for example in some])[None],
        np.concatenate([example.labels for example in some])[None],
        np.concatenate([np.arange(len(example.ids)) for example in some])[None],
        tuple(len(example.ids) for example in some),
        rows,
    )


def _padded(examples: Sequence[Example], rows: Sequence[int]) -> Batch:
    """Pad on the right. Any id will do: causal attention never looks there, labels are masked."""
    some = [examples[row] for row in rows]
    shape = (len(some), max(len(example.ids) for example in some))
    ids, labels = np.zeros(shape, np.int32), np.full(shape, MASKED, np.int32)
    for row, example in enumerate(some):
        ids[row, : len(example.ids)] = example.ids
        labels[row, : len(example.ids)] = example.labels
    return _batch(
        ids,
        labels,
        np.broadcast_to(np.arange(shape[1]), shape),
        None,
        rows,
        tokens=sum(len(example.ids) for example in some),
    )


def _batch(
    ids: NDArray[np.int32],
    labels: NDArray[np.int32],
    positions: NDArray[np.int64],
    lengths: tuple[int, ...] | None,
    rows: Sequence[int],
    tokens: int | None = None,
) -> Batch:
    return Batch(
        torch.from_numpy(ids.astype(np.int64)),
        torch.from_numpy(labels.astype(np.int64)),
        torch.from_numpy(positions.astype(np.int64)),
        lengths,
        tuple(rows),
        int(np.count_nonzero(labels != MASKED)),
        ids.size if tokens is None else tokens,
    )
