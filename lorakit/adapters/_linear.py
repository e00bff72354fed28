"""The low-rank product y = base(x) + s · drop(x) Aᵀ Bᵀ, with its backward pass written by hand.

With G = dL/dy and Q = G B, which is only r wide: dB = s Gᵀ (x Aᵀ), dA = s Qᵀ x, dx = G W + s Q A.
Where the base is a plain frozen weight, the base product and the update are one autograd node: the
update is added into the base product in place, forward and backward, and only x (the caller's
tensor, not a copy) and x Aᵀ are kept. A base of any other kind is called as a module.

A and B are fp32 masters; they are cast to the dtype of x where they are used.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lorakit.model.frozen import dense_weight, is_frozen_linear


class LowRank(NamedTuple):
    """A plain low-rank update: scale · B A, with A (r, inputs) and B (outputs, r)."""

    A: Tensor
    B: Tensor
    scale: float


def low_rank_linear(
    x: Tensor,
    base: nn.Module,
    update: LowRank,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Return base(x) + scale · drop(x) Aᵀ Bᵀ, shape (..., outputs).

    Args:
        x: (..., inputs).
        base: the module that is adapted.
        update: A (r, inputs), B (outputs, r) and their scale.
        dropout: share of the entries of x that the update does not see; the base sees all of them.
    """
    if not is_frozen_linear(base):
        return add_low_rank(base(x), x, update, dropout=dropout)
    return _product(x, None, base, update, dropout)


def add_low_rank(y: Tensor, x: Tensor, update: LowRank, *, dropout: float = 0.0) -> Tensor:
    """Return y + scale · drop(x) Aᵀ Bᵀ for a y (..., outputs) that was computed elsewhere."""
    return _product(x, y, None, update, dropout)


def added_to(weight: Tensor, update: LowRank, rows: slice = slice(None)) -> Tensor:
    """Return weight + scale · B A for the given rows of weight, in fp32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = update.A.to(weight.device, wide), update.B[rows].to(weight.device, wide)
    return torch.addmm(weight.to(wide), B, A, alpha=update.scale)


def _product(
    x: Tensor,
    y: Tensor | None,
    base: nn.Module | None,
    update: LowRank,
    dropout: float,
) -> Tensor:
    out: Tensor = _Product.apply(x, y, base, *update, dropout)  # type: ignore[no-untyped-call]
    return out


class _Product(torch.autograd.Function):
    """x, and either y or a frozen linear base, to y + s · drop(x) Aᵀ Bᵀ; y = x Wᵀ + bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Any,
        base: Any,
        A: Tensor,
        B: Tensor,
        scale: float,
        dropout: float,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        keep = None
        if dropout > 0:
            keep = torch.empty_like(flat, dtype=torch.bool).bernoulli_(1 - dropout)
            scale = scale / (1 - dropout)
        xA = _dropped(flat, keep) @ A.to(x.dtype).t()
        Bt = B.to(x.dtype).t()
        if y is None:
            out = functional.linear(flat, dense_weight(base), base.bias).addmm_(xA, Bt, alpha=scale)
        else:
            out = torch.addmm(y.reshape(-1, y.shape[-1]), xA, Bt, alpha=scale)
        # x is needed for A's gradient alone: where A is frozen, the r columns of x Aᵀ are enough.
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, xA, A, B, keep)
        ctx.base, ctx.scale, ctx.shape = base, scale, x.shape
        return out.view(*x.shape[:-1], B.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, xA, A, B, keep = ctx.saved_tensors
        need_x, need_y, _, need_A, need_B, _, _ = ctx.needs_input_grad
        scale: float = ctx.scale
        G = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_A = grad_B = None
        if need_B:
            grad_B = (G.t() @ xA).to(B.dtype).mul_(scale)
        if need_A or need_x:
            Q = G @ B.to(G.dtype)
        if need_A:
            flat = x.reshape(-1, x.shape[-1])
            grad_A = (Q.t() @ _dropped(flat, keep)).to(A.dtype).mul_(scale)
        if need_x:
            grad_x = _grad_of_input(G, Q, ctx.base, A.to(G.dtype), keep, scale).view(ctx.shape)
        return grad_x, grad if need_y else None, None, grad_A, grad_B, None, None


def _dropped(flat: Tensor, keep: Tensor | None) -> Tensor:
    return flat if keep is None else flat * keep


def _grad_of_input(
    G: Tensor, Q: Tensor, base: nn.Module | None, A: Tensor, keep: Tensor | None, scale: float
) -> Tensor:
    """Return G W + s · keep ⊙ (Q A), or the update's part alone where there is no W."""
    if base is not None and keep is None:
        return (G @ dense_weight(base)).addmm_(Q, A, alpha=scale)
    part = (Q @ A).mul_(scale) if keep is None else (Q @ A).mul_(keep).mul_(scale)
    return part if base is None else part.add_(G @ dense_weight(base))
