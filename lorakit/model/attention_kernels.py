"""The attention kernels that training uses, forward and backward, chosen by device and dtype.

All take queries, keys and values of all rows laid end to end, (tokens, heads, dim), and how they
fall into documents. What a kernel returns besides its output is kept for its backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor

# Up to here bf16 matrix products beat the fused backward kernel of CPUs, which converts all it
# reads; in fp32 the fused one wins.
GROUPED_TOKENS = 512
# What the variable-length kernel of GPUs takes.
HALVES, HEAD_DIM, HEAD_STEP = (torch.float16, torch.bfloat16), 256, 8


@dataclass(frozen=True)
class Documents:
    """How each row of a batch falls into documents, the same way in every row.

    `runs` are (count, length): (2, 5), (1, 3) are two documents of 5 tokens and one of 3.
    `bounds` says where documents begin and end in all rows laid end to end, int32 (documents + 1),
    on devices whose kernel asks for it.
    """

    runs: tuple[tuple[int, int], ...]
    bounds: Tensor | None = None

    @classmethod
    def of(cls, lengths: tuple[int, ...], rows: int, device: torch.device) -> Self:
        """Describe rows that are made of documents of these lengths each."""
        runs = tuple((sum(1 for _ in run), length) for length, run in groupby(lengths))
        if device.type == "cpu":
            return cls(runs)
        ends = torch.tensor([0, *(lengths * rows)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(runs, ends.pin_memory().to(device, non_blocking=True))

    @property
    def in_a_row(self) -> int:
        return sum(count for count, _ in self.runs)

    @property
    def longest(self) -> int:
        return max(length for _, length in self.runs)

    def within(self, tokens: int) -> Iterator[tuple[slice, int, int]]:
        """Yield where each run lies in rows laid end to end, its count and its length."""
        row = sum(count * length for count, length in self.runs)
        rows = tokens // row if row else 0
        runs = [(count * rows, length) for count, length in self.runs]
        start = 0
        for count, length in runs if len(runs) == 1 else self.runs * rows:
            yield slice(start, start + count * length), count, length
            start += count * length


def grouped_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of causal attention's q, k and v by batched products.

    q (documents, heads, tokens, dim). All query heads of a key head are in one product; the
    probabilities are computed again.
    """
    shapes = q.shape, k.shape, v.shape
    groups, dim = q.shape[0] * k.shape[1], q.shape[-1]
    grad, q, k, v = (states.reshape(groups, -1, dim) for states in (grad, q, k, v))
    p = _probabilities(q, k, scale)
    dv = torch.bmm(p.transpose(1, 2), grad)
    ds = torch.bmm(grad, v.transpose(1, 2))
    # In place: these matrices are the largest tensors of a layer.
    torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
    dq = torch.bmm(ds, k).mul_(scale)
    dk = torch.bmm(ds.transpose(1, 2), q).mul_(scale)
    dq, dk, dv = (d.view(shape) for d, shape in zip((dq, dk, dv), shapes, strict=True))
    return dq, dk, dv


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return softmax(scale * q k + causal mask): (groups, query heads * tokens, tokens)."""
    length = k.shape[1]
    future = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
    mask = future.repeat(q.shape[1] // length, 1).expand(len(q), -1, -1)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, out=scores)


@dataclass(frozen=True)
class OnHost:
    """The kernels of a CPU, run by run."""

    documents: Documents
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the output and what the backward pass needs besides it."""
        out, sums = torch.empty_like(q), []
        for at, count, length in self.documents.within(len(q)):
            qs, ks, vs = (by_document(t[at], count, length) for t in (q, k, v))
            piece, kept = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                qs, ks, vs, 0.0, True, scale=self.scale
            )
            by_document(out[at], count, length).copy_(piece)
            sums.append(kept)
        return out, sums

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *sums: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the gradients of q, k and v."""
        grads = tuple(map(torch.empty_like, (q, k, v)))
        runs = self.documents.within(len(q))
        for (at, count, length), lse in zip(runs, sums, strict=True):
            g, qs, ks, vs, o = (by_document(t[at], count, length) for t in (grad, q, k, v, out))
            if _is_grouped(q, length):
                pieces = grouped_gradients(g, qs, ks, vs, self.scale)
            else:
                backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
                pieces = backward(g, qs, ks, vs, o, lse, 0.0, True, scale=self.scale)
            for whole, piece in zip(grads, pieces, strict=True):
                by_document(whole[at], count, length).copy_(piece)
        return grads


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
    if query.device.type == "cpu" or (query.is_meta and documents.bounds is None):
        return None if window else OnHost(documents, scale)
    dim = query.shape[-1]
    serves = query.dtype in HALVES and dim <= HEAD_DIM and dim % HEAD_STEP == 0
    return OnDevice(documents, scale, window) if serves and documents.bounds is not None else None


def by_document(states: Tensor, count: int, length: int) -> Tensor:
    """View (tokens, heads, dim) of equally long documents as (documents, heads, tokens, dim)."""
    return states.view(count, length, *states.shape[1:]).transpose(1, 2)


def _is_grouped(query: Tensor, length: int) -> bool:
    return query.dtype is torch.bfloat16 and length <= GROUPED_TOKENS
