"""Batches for the model tests: random rows, padded or packed, with part of the labels masked."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.tiny import VOCABULARY

MASKED = -100


@dataclass(frozen=True)
class Rows:
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...] | None


def documents(*lengths: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return (ids, labels) for each length; about half of the labels are trained."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        trained = torch.rand(length, generator=generator) < 0.5
        trained[0] = False
        made.append((ids, torch.where(trained, ids, MASKED)))
    return made


def packed(rows: Sequence[tuple[Tensor, Tensor]]) -> Rows:
    """Lay documents side by side in one row."""
    ids, labels = (torch.cat(part)[None] for part in zip(*rows, strict=True))
    positions = torch.cat([torch.arange(len(ids)) for ids, _ in rows])[None]
    return Rows(ids, labels, positions, tuple(len(ids) for ids, _ in rows))


def padded(rows: Sequence[tuple[Tensor, Tensor]]) -> Rows:
    """Lay documents one below the other, padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), 2)
    labels = torch.full((len(rows), longest), MASKED)
    for row, (some, marks) in enumerate(rows):
        ids[row, : len(some)], labels[row, : len(some)] = some, marks
    return Rows(ids, labels, torch.arange(longest).expand(len(rows), -1), None)
