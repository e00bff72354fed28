"""The loss, a sum over trained tokens, without logits for tokens that are not trained.

For known families the head's product, the softmax and the gradient of the hidden states are
computed chunk by chunk in one pass (the head is frozen, so nothing else is needed); at no time
are there logits for more than one chunk. Every other case asks the model for its logits of the
trained rows.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from lorakit.model import liger
from lorakit.model.elementwise import softmax_nll
from lorakit.model.families import plain_head
from lorakit.model.inputs import Tokens, forward_inputs, sent, trained_places

# Logits of one chunk in fp32: large enough to keep a GPU busy. On a CPU below what the C library
# maps apart (`runtime.py`): such memory is cleared anew for each chunk, and is not that which the
# backward pass of the layers takes afterwards.
CHUNK_BYTES = {"cpu": 30 << 20}
CHUNK_BYTES_GPU = 256 << 20
CHUNK_ROWS = (64, 1024)
OWN = "own"
SAME = 1e-3  # relative difference of two losses in half precision

_liger: liger.HeadLoss | None = None


def token_loss(model: PreTrainedModel, batch: Tokens) -> Tensor:
    """Return the sum of -log p over the trained tokens of a batch, in fp32 and with its graph."""
    places, targets = _trained(model, batch)
    head = plain_head(model)
    if head is None:
        return F.cross_entropy(_wide(_logits(model, batch, places)), targets, reduction="sum")
    return head_loss(_hidden(model, batch, places), head.weight, head.bias, targets)


@torch.no_grad()
def token_scores(model: PreTrainedModel, batch: Tokens) -> tuple[Tensor, Tensor]:
    """Return -log p in fp32 and whether argmax hits, for each trained token, row by row."""
    places, targets = _trained(model, batch)
    head = plain_head(model)
    states = _logits(model, batch, places) if head is None else _hidden(model, batch, places)
    nll = states.new_empty(len(targets), dtype=torch.float32)
    hits = states.new_empty(len(targets), dtype=torch.bool)
    for rows in _chunks(len(targets), model.config.get_text_config().vocab_size, states.device):
        logits = states[rows] if head is None else head(states[rows])
        nll[rows] = F.cross_entropy(_wide(logits), targets[rows], reduction="none")
        hits[rows] = logits.argmax(-1) == targets[rows]
    return nll, hits


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy of a frozen linear head: hidden (n, dim), targets (n).

    With p = softmax(h W' + b) the gradient of h is (p - onehot) W: it is ready in the forward
    pass, chunk by chunk, and is all that is kept.
    """
    total: Tensor = _HeadLoss.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return total


def take_faster(model: PreTrainedModel, rows: int) -> str:
    """Take whose head loss is faster for so many trained tokens, ours or Liger's; return its name.

    Liger's is not taken where it is not installed, fails, or computes another loss.
    """
    global _liger
    _liger = None
    head, theirs = plain_head(model), liger.found()
    if head is None or theirs is None:
        return OWN
    weight, generator = head.weight, torch.Generator(model.device).manual_seed(0)
    options: Any = {"device": weight.device, "generator": generator}
    hidden = torch.randn(rows, weight.shape[1], dtype=weight.dtype, **options)
    targets = torch.randint(len(weight), (rows,), **options)
    try:
        (ours, own), (value, other) = (
            _timed(way, hidden, weight, head.bias, targets) for way in (_in_chunks, theirs)
        )
    except Exception as error:  # a kernel that does not compile shows itself in many ways
        return f"{OWN}, for Liger's fails: {type(error).__name__}: {error}"
    if other >= own or not math.isclose(ours, value, rel_tol=SAME):
        return OWN
    _liger = theirs
    return "liger"


def _timed(way: liger.HeadLoss, *given: Any) -> tuple[float, float]:
    """Return the loss and the seconds of the fastest of some calls; the first compiles."""
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        total, _ = way(*given)
        value = total.item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return value, min(seconds)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        total, grad = (_liger or _in_chunks)(hidden, weight, bias, targets)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * scale, None, None, None


def _in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the summed loss and the gradient of hidden (n, dim)."""
    total = hidden.new_zeros((), dtype=_wide(hidden[:0]).dtype)
    grad = torch.empty_like(hidden)
    for rows in _chunks(len(hidden), len(weight), hidden.device):
        places = targets[rows, None]
        p, nll = softmax_nll(F.linear(hidden[rows], weight, bias), places)
        total += nll.sum()
        p.scatter_(1, places, torch.expm1(-nll).to(p.dtype))
        torch.mm(p, weight, out=grad[rows])
        del p  # gone before the next chunk is made
    return total, grad


def _trained(model: PreTrainedModel, batch: Tokens) -> tuple[NDArray[np.int64], Tensor]:
    """Return where trained tokens are predicted, on the host, and their ids, on the device."""
    places, targets = trained_places(batch.labels)
    return places, sent(torch.from_numpy(targets), model.device)


def _hidden(model: PreTrainedModel, batch: Tokens, places: NDArray[np.int64]) -> Tensor:
    """Return the decoder's output at the chosen places, (n, dim)."""
    hidden: Tensor = model.base_model(**forward_inputs(model, batch)).last_hidden_state
    return _chosen(hidden, places)


def _logits(model: PreTrainedModel, batch: Tokens, places: NDArray[np.int64]) -> Tensor:
    """Return the model's own logits at the chosen places, (n, vocabulary)."""
    inputs = forward_inputs(model, batch)
    row, column = np.divmod(places, batch.labels.shape[1])
    kept, at = np.unique(column, return_inverse=True)
    keep = sent(torch.from_numpy(kept), model.device)
    logits: Tensor = model(**inputs, logits_to_keep=keep).logits
    return _chosen(logits, row * len(kept) + at)


def _chosen(states: Tensor, places: NDArray[np.int64]) -> Tensor:
    """Return states (rows, tokens, dim) at places that count through all rows, (n, dim)."""
    return states.flatten(0, 1).index_select(0, sent(torch.from_numpy(places), states.device))


def _chunks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Cut rows so that the fp32 logits of one chunk stay within their share of memory."""
    fewest, most = CHUNK_ROWS
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES_GPU)
    size = max(fewest, min(most, budget // (4 * vocabulary)))
    return (slice(start, start + size) for start in range(0, rows, size))


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32, or in fp64 when it is already that."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()
