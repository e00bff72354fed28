"""The loss, a sum over trained tokens, without logits for tokens that are not trained.

Where a family is known to do nothing between its decoder and its logits but the head and a soft
cap, both run chunk by chunk, and at no time are there logits for more than one. Of a frozen linear
head the gradient of the hidden states is ready in the forward pass; any other is run again in the
backward pass. Every other family is asked for its own logits of the trained rows.
"""

import inspect
import math
import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lorakit.devices import sent
from lorakit.model import liger
from lorakit.model.elementwise import softmax_nll
from lorakit.model.families import Head, head_of
from lorakit.model.inputs import Tokens, forward_inputs, trained_places

# Logits of one chunk in fp32: large enough to keep a GPU busy. On a CPU below what the C library
# maps apart (`runtime.py`): such memory is cleared anew for each chunk, and is not that which the
# backward pass of the layers takes afterwards.
CHUNK_BYTES, CHUNK_BYTES_GPU = 30 << 20, 256 << 20
CHUNK_ROWS = (64, 1024)
OWN, LIGER = "own", "liger"
# Relative differences of two losses, and of their gradients, in half precision: bf16 rounds the
# probabilities that a gradient is made of to 0.4 %.
SAME, SAME_GRADIENT = 1e-3, 2e-2

# How the loss comes by its gradient: "ready" in the forward pass, by running the head "again", or
# from the model's own logits, which are there "whole".
Way = Literal["ready", "again", "whole"]

_liger: liger.HeadLoss | None = None


def token_loss(model: PreTrainedModel, batch: Tokens) -> Tensor:
    """Return the sum of -log p over the trained tokens of a batch, in fp32 and with its graph."""
    places, targets = _trained(model, batch)
    head = head_of(model)
    if head is None:
        return _cross_entropy(_logits(model, batch, places), targets)
    hidden = _hidden(model, batch, places)
    if linear := head.linear:
        return head_loss(hidden, linear.weight, linear.bias, targets, head.cap)
    size = chunk_rows(_vocabulary(model), gpu=hidden.device.type != "cpu")
    # Not the slices: the gradient of each would be as large as all.
    *first, last = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    losses = [checkpoint(_run_head, head, *chunk, use_reentrant=False) for chunk in first]
    # The backward pass begins with the last one, whose logits are still there.
    return torch.stack([*losses, _run_head(head, *last)]).sum()


@torch.no_grad()
def token_scores(model: PreTrainedModel, batch: Tokens) -> tuple[Tensor, Tensor]:
    """Return -log p in fp32 and whether argmax hits, for each trained token, row by row."""
    places, targets = _trained(model, batch)
    head = head_of(model)
    states = _hidden(model, batch, places) if head else _logits(model, batch, places)
    nll = states.new_empty(len(targets), dtype=torch.float32)
    hits = states.new_empty(len(targets), dtype=torch.bool)
    for rows in _chunks(len(targets), _vocabulary(model), states.device):
        logits = head.logits(states[rows]) if head else states[rows]
        nll[rows] = _cross_entropy(logits, targets[rows], reduction="none")
        hits[rows] = logits.argmax(-1) == targets[rows]
    return nll, hits


def head_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None = None
) -> Tensor:
    """Return the summed cross-entropy of a frozen linear head: hidden (n, dim), targets (n).

    With p = softmax(h W' + b) the gradient of h is (p - onehot) W: it is ready in the forward
    pass, chunk by chunk, and is all that is kept. With a cap c the logits are c tanh(x / c), and
    the gradient of x is 1 - tanh² of theirs.
    """
    total: Tensor = _HeadLoss.apply(hidden, weight, bias, targets, cap)  # type: ignore[no-untyped-call]
    return total


def way_of(model: PreTrainedModel) -> Way:
    """Return how the loss of a model, which may be on the meta device, comes by its gradient."""
    head = head_of(model)
    if head is None:
        return "whole"
    return "ready" if head.linear else "again"


def chunk_rows(vocabulary: int, *, gpu: bool) -> int:
    """Return how many rows have their logits at a time, in fp32 within their share of memory."""
    fewest, most = CHUNK_ROWS
    return max(fewest, min(most, (CHUNK_BYTES_GPU if gpu else CHUNK_BYTES) // (4 * vocabulary)))


def keep_own() -> None:
    """Take our own loss of a frozen linear head, not Liger's."""
    global _liger
    _liger = None


def take_faster(model: PreTrainedModel, rows: int, *, at_any_speed: bool = False) -> str:
    """Take whose head loss is faster for so many trained tokens, ours or Liger's; return its name.

    Liger's is not taken where it is not installed, fails, or computes another loss or gradient;
    where it does not serve, the name says why. `at_any_speed` takes it although ours is faster.
    """
    global _liger
    keep_own()
    head, theirs = head_of(model), liger.found()
    if head is None or head.cap is not None or head.linear is None or theirs is None:
        return OWN
    weight, bias = head.linear.weight, head.linear.bias
    options: Any = {"device": weight.device}
    options["generator"] = torch.Generator(weight.device).manual_seed(0)
    hidden = torch.randn(rows, weight.shape[1], dtype=weight.dtype, **options)
    targets = torch.randint(len(weight), (rows,), **options)
    try:
        (loss, grad, seconds), (value, other, spent) = (
            _timed(way, hidden, weight, bias, targets) for way in (_in_chunks, theirs)
        )
        if not math.isclose(loss, value, rel_tol=SAME):
            return f"{OWN}, for Liger's is another: {value:g}, not {loss:g}"
        off = ((other.float() - grad.float()).norm() / grad.float().norm()).item()
    except Exception as error:  # a kernel that does not compile shows itself in many ways
        return f"{OWN}, for Liger's fails: {type(error).__name__}: {error}"
    if not off <= SAME_GRADIENT:
        return f"{OWN}, for Liger's has another gradient: {off:.1%} off"
    if spent >= seconds and not at_any_speed:
        return OWN
    _liger = theirs
    return LIGER


def _timed(way: liger.HeadLoss, *given: Any) -> tuple[float, Tensor, float]:
    """Return loss, gradient and the seconds of the fastest of some calls; the first compiles."""
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        total, grad = way(*given)
        value = total.item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return value, grad, min(seconds)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        cap: float | None,
    ) -> Tensor:
        if _liger and cap is None:
            total, grad = _liger(hidden, weight, bias, targets)
        else:
            total, grad = _in_chunks(hidden, weight, bias, targets, cap)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * scale, None, None, None, None


def _in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the summed loss and the gradient of hidden (n, dim)."""
    total = hidden.new_zeros((), dtype=_wide(hidden[:0]).dtype)
    grad = torch.empty_like(hidden)
    for rows in _chunks(len(hidden), len(weight), hidden.device):
        places = targets[rows, None]
        logits, slope = F.linear(hidden[rows], weight, bias), None
        if cap is not None:
            logits.div_(cap).tanh_()
            slope = logits.square().neg_().add_(1)
            logits.mul_(cap)
        p, nll = softmax_nll(logits, places)
        total += nll.sum()
        p.scatter_(1, places, torch.expm1(-nll).to(p.dtype))
        if slope is not None:
            p.mul_(slope)
        torch.mm(p, weight, out=grad[rows])
        del p, logits, slope  # gone before the next chunk is made
    return total, grad


def _run_head(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the summed loss of hidden (n, dim)."""
    return _cross_entropy(head.logits(hidden), targets)


def _trained(model: PreTrainedModel, batch: Tokens) -> tuple[NDArray[np.int64], Tensor]:
    """Return where trained tokens are predicted, on the host, and their ids, on the device."""
    places, targets = trained_places(batch.labels)
    return places, sent(torch.from_numpy(targets), model.device)


def _hidden(model: PreTrainedModel, batch: Tokens, places: NDArray[np.int64]) -> Tensor:
    """Return the decoder's output at the chosen places, (n, dim)."""
    hidden: Tensor = model.base_model(**forward_inputs(model, batch)).last_hidden_state
    return _chosen(hidden, places)


def _logits(model: PreTrainedModel, batch: Tokens, places: NDArray[np.int64]) -> Tensor:
    """Return the model's own logits at the chosen places, (n, vocabulary).

    Of no more columns than have a chosen place, where the model can leave some out.
    """
    inputs = forward_inputs(model, batch)
    row, column = np.divmod(places, batch.labels.shape[1])
    kept, at = np.unique(column, return_inverse=True)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = sent(torch.from_numpy(kept), model.device)
    logits: Tensor = model(**inputs).logits
    # Code of a model's own may take the argument and not heed it.
    heeded = logits.shape[1] == len(kept)
    return _chosen(logits, row * len(kept) + at if heeded else places)


def _chosen(states: Tensor, places: NDArray[np.int64]) -> Tensor:
    """Return states (rows, tokens, dim) at places that count through all rows, (n, dim)."""
    return states.flatten(0, 1).index_select(0, sent(torch.from_numpy(places), states.device))


def _chunks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Cut rows into chunks."""
    size = chunk_rows(vocabulary, gpu=device.type != "cpu")
    return (slice(start, start + size) for start in range(0, rows, size))


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    return F.cross_entropy(_wide(logits), targets, reduction=reduction)


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32, or in fp64 when it is already that."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()
