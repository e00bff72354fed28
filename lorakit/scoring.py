"""How well a model predicts rows: summed losses and hits, row by row.

Training's evaluation and the `eval` command call the same function, so their numbers agree.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.data.batches import Batch
from lorakit.devices import sent
from lorakit.model.inputs import MASKED
from lorakit.model.loss import token_scores


@dataclass(frozen=True)
class RowScore:
    """One row: negative log-likelihood summed over its trained tokens, their number, hits."""

    row: int
    nll: float
    tokens: int
    hits: int


def score(model: PreTrainedModel, batches: Iterable[Batch]) -> list[RowScore]:
    """Score every row of the batches, without gradients; rows come back in their own order."""
    scores = []
    with torch.no_grad():
        for batch in batches:
            nll, hits = token_scores(model, put(batch, model.device))
            owner = _owners(batch)
            values = torch.zeros(3, len(batch.rows), dtype=torch.float64)
            for sums, tokens in zip(values, (nll, torch.ones_like(nll), hits), strict=True):
                sums.index_add_(0, owner, tokens.to("cpu", torch.float64))
            rows = zip(batch.rows, *values.tolist(), strict=True)
            scores += [RowScore(row, nll, int(n), int(right)) for row, nll, n, right in rows]
    return sorted(scores, key=lambda one: one.row)


def put(batch: Batch, device: torch.device) -> Batch:
    """Move what the model reads to a device, without waiting; the labels stay on the host."""
    return replace(
        batch,
        input_ids=sent(batch.input_ids, device),
        position_ids=sent(batch.position_ids, device),
    )


def _owners(batch: Batch) -> Tensor:
    """Return for each trained token the index of its row within `batch.rows`."""
    trained = batch.labels != MASKED
    if batch.lengths is None:
        return trained.nonzero()[:, 0]
    ends = torch.tensor(batch.lengths).cumsum(0)
    return torch.searchsorted(ends, trained[0].nonzero()[:, 0], right=True)
