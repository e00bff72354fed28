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


class LowRank(NamedTuple):
    """A plain low-rank update: scale · B A, with A (r, inputs) and B (outputs, r)."""

    A: Tensor
    B: Tensor
    scale: float


def usual_weight(base: nn.Module, conv1d: bool = False) -> Tensor:
    """Return a module's W as (outputs, inputs); Conv1D stores it the other way round."""
    weight: Tensor = base.weight  # type: ignore[assignment]  # a site has a weight
    return weight.t() if conv1d else weight


def plain_weight(base: nn.Module, conv1d: bool = False) -> Tensor | None:
    """Return the W (outputs, inputs) of a frozen `Linear` or Conv1D, None for any other module."""
    if type(base) is not nn.Linear and not conv1d:
        return None
    weight = usual_weight(base, conv1d)
    return None if weight.requires_grad else weight


def low_rank_linear(
    x: Tensor,
    base: nn.Module,
    update: LowRank,
    *,
    dropout: float = 0.0,
    conv1d: bool = False,
) -> Tensor:
    """Return base(x) + scale · drop(x) Aᵀ Bᵀ, shape (..., outputs).

    Args:
        x: (..., inputs).
        base: the module that is adapted.
        update: A (r, inputs), B (outputs, r) and their scale.
        dropout: share of the entries of x that the update does not see; the base sees all of them.
        conv1d: whether the base stores its weight as (inputs, outputs).
    """
    weight = plain_weight(base, conv1d)
    if weight is None:
        return add_low_rank(base(x), x, update, dropout=dropout)
    return _product(x, None, weight, base.bias, update, dropout)


def add_low_rank(y: Tensor, x: Tensor, update: LowRank, *, dropout: float = 0.0) -> Tensor:
    """Return y + scale · drop(x) Aᵀ Bᵀ for a y (..., outputs) that was computed elsewhere."""
    return _product(x, y, None, None, update, dropout)


def added_to(weight: Tensor, update: LowRank, rows: slice = slice(None)) -> Tensor:
    """Return weight + scale · B A for the given rows of weight, in fp32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = update.A.to(weight.device, wide), update.B[rows].to(weight.device, wide)
    return torch.addmm(weight.to(wide), B, A, alpha=update.scale)


def _product(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | Any | None,
    update: LowRank,
    dropout: float,
) -> Tensor:
    out: Tensor = _Product.apply(x, y, weight, bias, *update, dropout)  # type: ignore[no-untyped-call]
    return out


class _Product(torch.autograd.Function):
    """x, and either y or the frozen W and bias, to y + s · drop(x) Aᵀ Bᵀ; y = x Wᵀ + bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Any,
        weight: Any,
        bias: Tensor | None,
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
            out = functional.linear(flat, weight, bias).addmm_(xA, Bt, alpha=scale)
        else:
            out = torch.addmm(y.reshape(-1, y.shape[-1]), xA, Bt, alpha=scale)
        # x is needed for A's gradient alone: where A is frozen, the r columns of x Aᵀ are enough.
        ctx.save_for_backward(x if ctx.needs_input_grad[4] else None, xA, weight, A, B, keep)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], B.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, xA, weight, A, B, keep = ctx.saved_tensors
        need_x, need_y, _, _, need_A, need_B, _, _ = ctx.needs_input_grad
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
            grad_x = _grad_of_input(G, Q, weight, A.to(G.dtype), keep, scale).view(ctx.shape)
        return grad_x, grad if need_y else None, None, None, grad_A, grad_B, None, None


def _dropped(flat: Tensor, keep: Tensor | None) -> Tensor:
    return flat if keep is None else flat * keep


def _grad_of_input(
    G: Tensor, Q: Tensor, weight: Tensor | None, A: Tensor, keep: Tensor | None, scale: float
) -> Tensor:
    """Return G W + s · keep ⊙ (Q A), or the update's part alone where there is no W."""
    if weight is not None and keep is None:
        return (G @ weight).addmm_(Q, A, alpha=scale)
    part = (Q @ A).mul_(scale) if keep is None else (Q @ A).mul_(keep).mul_(scale)
    return part if weight is None else part.add_(G @ weight)
