"""The attention kernels that training uses, forward and backward, chosen by device and dtype.

All take queries, keys and values of all rows laid end to end, (tokens, heads, dim), and how they
fall into documents. What a kernel returns besides its output is kept for its backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lorakit.devices import has_amx
from lorakit.model.documents import Documents, Sorted

# Documents up to this long are faster by batched products than by the fused kernels of CPUs, which
# convert all they read; in fp32 those win. With AMX only in the backward pass.
GROUPED_TOKENS, GROUPED_TOKENS_AMX = 2048, 512
TILE = 128  # tokens, whose scores stay in a core's cache
# What the variable-length kernel of GPUs takes.
HALVES, HEAD_DIM, HEAD_STEP = (torch.float16, torch.bfloat16), 256, 8
# Heads whose backward pass does not fit into the shared memory of GPUs that are no server's.
WIDE_HEADS = range(193, 225)
SMALL_GPUS = (*((8, minor) for minor in range(6, 10)), (12, 0), (12, 1))


def grouped(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return causal attention by batched products: q (documents, heads, tokens, dim) to the same.

    All query heads of a key head are in one product, `TILE` of their tokens at a time, which sees
    the keys up to its end. Scores are fp32, as in the fused kernel.
    """
    out = torch.empty_like(q)
    k, v = (states.flatten(0, 1) for states in (k, v))
    wide = k.to(torch.promote_types(k.dtype, torch.float32))
    for rows in _tiles(q.shape[2]):
        seen = slice(rows.stop)
        queries = _tile(q, rows, len(k)).to(wide.dtype)
        p = _probabilities(queries, wide[:, seen], rows, scale).to(q.dtype)
        out[:, :, rows] = torch.bmm(p, v[:, seen]).view(*q.shape[:2], -1, q.shape[3])
    return out


def grouped_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of causal attention's q, k and v in the same way, in their dtype.

    The probabilities are computed again.
    """
    shape, tokens = k.shape, q.shape[2]
    k, v = (states.flatten(0, 1) for states in (k, v))
    dq, dk, dv = (torch.empty_like(states) for states in (q, k, v))
    for rows in reversed(list(_tiles(tokens))):
        seen = slice(rows.stop)
        adds = int(rows.stop < tokens)  # the last tile, which sees all keys, begins their sums
        queries, grads = (_tile(states, rows, len(k)) for states in (q, grad))
        p = _probabilities(queries, k[:, seen], rows, scale)
        dv[:, seen].baddbmm_(p.transpose(1, 2), grads, beta=adds)
        ds = torch.bmm(grads, v[:, seen].transpose(1, 2))
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
        dq[:, :, rows] = torch.bmm(ds, k[:, seen]).mul_(scale).view(*q.shape[:2], -1, q.shape[3])
        dk[:, seen].baddbmm_(ds.transpose(1, 2), queries, beta=adds, alpha=scale)
    return dq, dk.view(shape), dv.view(shape)


def _tiles(tokens: int) -> Iterator[slice]:
    count = -(-tokens // TILE)
    edges = [tokens * number // count for number in range(count + 1)]
    return (slice(start, stop) for start, stop in pairwise(edges))


def _tile(states: Tensor, rows: slice, groups: int) -> Tensor:
    """Return some tokens of all heads, those of one key head end to end: (groups, rows, dim)."""
    return states[:, :, rows].reshape(groups, -1, states.shape[-1])


def _probabilities(q: Tensor, k: Tensor, rows: slice, scale: float) -> Tensor:
    """Return softmax(scale * q k) of causal attention: (groups, heads of each * rows, keys)."""
    tokens = rows.stop - rows.start
    scores = q.new_empty(*q.shape[:2], k.shape[1])
    scores.baddbmm_(q, k.transpose(1, 2), beta=0, alpha=scale)
    # Only keys as late as the rows themselves can be too late for one of them.
    future = q.new_full((tokens, tokens), float("-inf")).triu_(1)
    scores.view(len(q), -1, tokens, k.shape[1])[..., rows.start :].add_(future)
    return torch.softmax(scores, -1, out=scores)


@dataclass(frozen=True)
class OnHost:
    """The kernels of a CPU, run by run."""

    documents: Documents
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the output and what the backward pass needs besides it."""
        if by_length := self._by_length(q):
            out, sums = OnHost(by_length.documents, self.scale).forward(
                *map(by_length.laid_out, (q, k, v))
            )
            return by_length.taken_back(out), sums
        out, sums = torch.empty_like(q), []
        for at, count, length in self.documents.within(len(q)):
            qs, ks, vs = (by_document(t[at], count, length) for t in (q, k, v))
            if _is_grouped(q, length) and not has_amx():
                piece = grouped(qs, ks, vs, self.scale)
            else:
                piece, kept = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    qs, ks, vs, 0.0, True, scale=self.scale
                )
                sums += [] if _is_grouped(q, length) else [kept]
            by_document(out[at], count, length).copy_(piece)
        return out, sums

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *sums: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the gradients of q, k and v."""
        if by_length := self._by_length(q):
            grad, q, k, v, out = map(by_length.laid_out, (grad, q, k, v, out))
            grad.index_fill_(0, by_length.added, 0.0)
            inner = OnHost(by_length.documents, self.scale)
            return tuple(map(by_length.taken_back, inner.backward(grad, q, k, v, out, *sums)))
        grads, kept = tuple(map(torch.empty_like, (q, k, v))), iter(sums)
        for at, count, length in self.documents.within(len(q)):
            g, qs, ks, vs, o = (by_document(t[at], count, length) for t in (grad, q, k, v, out))
            if _is_grouped(q, length):
                pieces = grouped_gradients(g, qs, ks, vs, self.scale)
            else:
                backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
                pieces = backward(g, qs, ks, vs, o, next(kept), 0.0, True, scale=self.scale)
            for whole, piece in zip(grads, pieces, strict=True):
                by_document(whole[at], count, length).copy_(piece)
        return grads

    def _by_length(self, query: Tensor) -> Sorted | None:
        return self.documents.sorted if query.dtype is torch.bfloat16 else None


@dataclass(frozen=True)
class OnDevice:
    """The variable-length flash attention of GPUs, all documents in one launch.

    Dao 2023, "FlashAttention-2", arXiv 2307.08691, as it comes with torch.
    """

    documents: Documents
    scale: float
    window: int | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the output and what the backward pass needs besides it."""
        out, sums, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *self._shape(), 0.0, True, False, **self._options()
        )
        return out, [sums, state, unused]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *kept: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the gradients of q, k and v."""
        sums, state, unused = kept
        grads: tuple[Tensor, ...] = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, sums, *self._shape(), 0.0, True, state, unused, **self._options()
        )
        return grads

    def _shape(self) -> tuple[Any, ...]:
        bounds, longest = self.documents.bounds, self.documents.longest
        return bounds, bounds, longest, longest

    def _options(self) -> dict[str, Any]:
        seen = {"window_size_left": self.window - 1, "window_size_right": 0} if self.window else {}
        return {"scale": self.scale, **seen}


def kernel_for(
    query: Tensor, documents: Documents, scale: float, window: int | None
) -> OnHost | OnDevice | None:
    """Return the kernel that serves these documents, None where there is none.

    On meta, where only shapes count, that of the device that `documents` was made for.
    """
    if query.device.type == "cpu" or (query.is_meta and documents.capability is None):
        return None if window else OnHost(documents, scale)
    dim = query.shape[-1]
    serves = query.dtype in HALVES and dim <= HEAD_DIM and dim % HEAD_STEP == 0
    if documents.bounds is None or not serves:
        return None
    refused = dim in WIDE_HEADS and documents.capability in SMALL_GPUS
    return None if refused else OnDevice(documents, scale, window)


def by_document(states: Tensor, count: int, length: int) -> Tensor:
    """View (tokens, heads, dim) of equally long documents as (documents, heads, tokens, dim)."""
    return states.view(count, length, *states.shape[1:]).transpose(1, 2)


def _is_grouped(query: Tensor, length: int) -> bool:
    most = GROUPED_TOKENS_AMX if has_amx() else GROUPED_TOKENS
    return query.dtype is torch.bfloat16 and length <= most
