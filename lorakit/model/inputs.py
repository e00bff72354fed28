"""What a model is called with: the one place that turns a batch into keyword arguments."""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.model import attention
from lorakit.model.documents import Documents

MASKED = -100


class Tokens(Protocol):
    """A micro-batch as the model sees it, of shape (rows, tokens).

    `labels` holds the id at the same place where it is trained, else -100; the first label of a
    document is always -100. It is on the host, where its values can be asked for without waiting
    for a device. `lengths` are those of the documents of the single row when it is
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
    For ours a mask of no tokens stands there, which transformers hands on as one that is made
    already: else it asks the device, and waits, whether the positions are those of packed rows.

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
        if not model.base_model._forward_pre_hooks:  # a prefix needs a mask that shows it
            inputs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)
    return inputs


def trained_places(labels: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where trained tokens are predicted, one place before each of them, and their ids.

    `labels` (rows, tokens) are on the host; places count through all rows, laid end to end.
    """
    ahead = np.full(labels.shape, MASKED, np.int64)
    ahead[:, :-1] = labels.numpy()[:, 1:]
    places = np.flatnonzero(ahead != MASKED)
    return places, ahead.ravel()[places]
