"""What a model is called with: the one place that turns a batch into keyword arguments."""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.model import attention
from lorakit.model.attention_kernels import Documents

MASKED = -100


class Tokens(Protocol):
    """A micro-batch as the model sees it, of shape (rows, tokens).

    `labels` holds the id at the same place where it is trained, else -100; the first label of a
    document is always -100. `lengths` are those of the documents of the single row when it is
    packed; None when rows are padded on the right.
    """

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor: ...
    @property
    def lengths(self) -> tuple[int, ...] | None: ...


def forward_inputs(model: PreTrainedModel, batch: Tokens) -> dict[str, Any]:
    """Return the keyword arguments for a forward pass over a batch.

    No attention mask: padding on the right comes after everything that counts, and packed
    documents are told apart by their lengths, or in transformers' own attention by their positions.

    Raises:
        ValueError: when a packed batch meets a model that cannot keep its documents apart.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids.to(model.device), "use_cache": False}
    lengths = batch.lengths or (batch.input_ids.shape[1],)
    if batch.lengths:
        if reason := attention.can_pack(model):
            raise ValueError(f"a packed batch for a model that cannot pack: {reason}")
        inputs["position_ids"] = batch.position_ids.to(model.device)
    if model.config._attn_implementation == attention.NAME:
        rows = len(batch.input_ids)
        inputs["documents"] = Documents.of(lengths, rows, model.device)
    return inputs


def trained_positions(labels: Tensor) -> Tensor:
    """Return where trained tokens are predicted, (rows, tokens): one place before each of them."""
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != MASKED
    return predicts
