"""The low-rank product y = x Wᵀ + s · drop(x) Aᵀ Bᵀ, with its backward pass written by hand.

With G = dL/dy and Q = s · G B, which is only r wide: dB = s · Gᵀ (x Aᵀ), dA = Qᵀ x and
dx = G W + Q A. Base product and update are one autograd node: one is added to the other in place,
and only x (the caller's tensor, no copy) and x Aᵀ are kept.

In half precision the update is computed first, and what is large added to it, in the fp32 sums of
the base product; so it is in the backward pass. The other way round an update of less than half a
unit in the last place of the base product, as all are at first, would round back to nothing. A bias
is added to the update before the product, as without an update: B = 0 is the base bit for bit. What
a base of another kind has computed is rounded already.

Products that read the same x are one node as well: their A's are one matrix, and the gradient of x
is summed in place. x itself may be made of what is kept (`model/elementwise.py`), so that a norm or
a gate before the products costs no memory. A base of any other kind is called as a module.

A and B are fp32 masters; what is read are copies in the dtype of x (`_copies.py`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lorakit.adapters._copies import stacked
from lorakit.model.elementwise import Itself, Prologue
from lorakit.model.frozen import dense_weight, is_frozen_linear

ITSELF = Itself()
HALVES = {torch.bfloat16, torch.float16}
# Devices on which a dropout mask is kept for the backward pass instead of being drawn again.
MASKS_KEPT = {"cpu", "meta"}


class LowRank(NamedTuple):
    """A plain low-rank update: scale · B A, with A (r, inputs) and B (outputs, r)."""

    A: Tensor
    B: Tensor
    scale: float


class Product(NamedTuple):
    """A frozen linear module and the update around it; either may be missing."""

    base: nn.Module | None
    update: LowRank | None = None


def low_rank_linear(x: Tensor, base: nn.Module, update: LowRank, *, dropout: float = 0.0) -> Tensor:
    """Return base(x) + scale · drop(x) Aᵀ Bᵀ, shape (..., outputs).

    Args:
        x: (..., inputs).
        base: the module that is adapted.
        update: A (r, inputs), B (outputs, r) and their scale.
        dropout: share of the entries of x that the update does not see; the base sees all of them.
    """
    if not is_frozen_linear(base):
        return add_low_rank(base(x), x, update, dropout=dropout)
    return products([x], [Product(base, update)], dropout=dropout)[0]


def add_low_rank(y: Tensor, x: Tensor, update: LowRank, *, dropout: float = 0.0) -> Tensor:
    """Return y + scale · drop(x) Aᵀ Bᵀ for a y (..., outputs) that was computed elsewhere."""
    return products([x], [Product(None, update)], added=y, dropout=dropout)[0]


def products(
    inputs: Sequence[Tensor],
    of: Sequence[Product],
    *,
    prologue: Prologue = ITSELF,
    added: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, ...]:
    """Return what products make of the same x, (..., outputs) each, in one autograd node.

    Args:
        inputs: what x is made of, (..., dim) each.
        of: the products; one without a base is added to `added` alone.
        prologue: how x (..., inputs) is made.
        added: what the only product is added to, (..., outputs).
        dropout: share of the entries of x that an update does not see, drawn for each of them.
    """
    factors = [factor for _, update in of if update for factor in (update.A, update.B)]
    call = _Call(prologue, tuple(of), len(inputs), dropout)
    outs: tuple[Tensor, ...] = _Products.apply(call, added, *inputs, *factors)  # type: ignore[no-untyped-call]
    return outs


def added_to(weight: Tensor, update: LowRank, rows: slice = slice(None)) -> Tensor:
    """Return weight + scale · B A for the given rows of weight, in fp32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = update.A.to(weight.device, wide), update.B[rows].to(weight.device, wide)
    return torch.addmm(weight.to(wide), B, A, alpha=update.scale)


class _Call(NamedTuple):
    """What of a call is no tensor. Its tensors: `arity` inputs, then A and B of each update."""

    prologue: Prologue
    of: tuple[Product, ...]
    arity: int
    dropout: float

    @property
    def updates(self) -> list[LowRank]:
        return [update for _, update in self.of if update]

    def scale(self, update: LowRank) -> float:
        """Return what the product with the entries that dropout left is multiplied by."""
        return update.scale / (1 - self.dropout)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, added: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = [_flat(tensor) for tensor in tensors[: call.arity]]
        x, kept = call.prologue.forward(*inputs)
        drawn = [_drawn(x, call.dropout) for _ in call.updates] if call.dropout else []
        masks = [_mask(one, x.shape, x.device, call.dropout) for one in drawn]
        narrow = _narrow(x, call.updates, masks)
        outs, each = [], iter(narrow)
        for base, update in call.of:
            xA: Any = next(each) if update else None
            if base is None and update:  # what the caller computed is left as it is
                y = torch.addmm(_flat(added), xA, _scaled(update, call, x.dtype).t())
            else:
                y = _linear(x, base, update, xA, call)
                if added is not None:  # last: it may be far larger than all else
                    y.add_(_flat(added))
            # No view: autograd would forbid families such as Falcon to add to it in place.
            shape = [*tensors[0].shape[:-1], y.shape[-1]]
            outs.append(torch.ops.aten._unsafe_view(y, shape))
        # A plain x serves the gradients of the A's alone: where none is trained it is not kept.
        if isinstance(call.prologue, Itself) and not any(ctx.needs_input_grad[2 + call.arity :: 2]):
            inputs = []
        groups = inputs, kept, narrow, drawn
        ctx.save_for_backward(*(tensor for group in groups for tensor in group))
        ctx.sizes = [len(group) for group in groups]
        ctx.call, ctx.seen, ctx.shapes = (
            call,
            x.shape,
            [tensor.shape for tensor in tensors[: call.arity]],
        )
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, iter(ctx.saved_tensors)
        inputs, kept, narrow, drawn = ([next(saved) for _ in range(n)] for n in ctx.sizes)
        _, need_added, *needs = ctx.needs_input_grad
        need_x, need_factors = any(needs[: call.arity]), needs[call.arity :]
        need_A, need_B = any(need_factors[::2]), any(need_factors[1::2])
        G = [_flat(grad) for grad in grads]
        masks = [_mask(one, ctx.seen, G[0].device, call.dropout) for one in drawn]
        of = [(g, update) for g, (_, update) in zip(G, call.of, strict=True) if update]
        Q = [g @ _scaled(update, call, g.dtype) for g, update in of]
        whole = Q if masks or len(Q) < 2 else [torch.cat(Q, dim=1)]
        x: Tensor | None = None
        grad_inputs: Sequence[Tensor | None] = [None] * call.arity
        if need_x:
            grad_x = _grad_of_x(G, whole, call, masks)
            x, grad_inputs = call.prologue.backward(grad_x, *inputs, *kept)
        elif need_A:
            x, _ = call.prologue.forward(*inputs)
        grad_factors: list[Tensor | None] = [None] * len(need_factors)
        if need_A and x is not None:
            made = not isinstance(call.prologue, Itself)
            grad_factors[::2] = _grad_of_A(whole, x, call, masks, in_place=made)
        if need_B:
            # The narrow factor first: it is the one that is turned around in memory.
            grad_factors[1::2] = [
                (xA.t() @ g).t().to(update.B.dtype).mul_(call.scale(update))
                for (g, update), xA in zip(of, narrow, strict=True)
            ]
        shaped = [
            grad if grad is None else grad.view(shape)
            for grad, shape in zip(grad_inputs, ctx.shapes, strict=True)
        ]
        return None, grads[0] if need_added else None, *shaped, *grad_factors


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _drawn(x: Tensor, dropout: float) -> Tensor:
    """Draw what is kept of a mask: the mask where drawing is slow, else a seed on the host."""
    if x.device.type in MASKS_KEPT:
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)
    return torch.randint(2**62, ())


def _mask(drawn: Tensor, shape: torch.Size, device: torch.device, dropout: float) -> Tensor:
    """Return which entries of x (rows, inputs) an update sees; from a seed, the same each time."""
    if drawn.ndim:
        return drawn
    generator = torch.Generator(device).manual_seed(int(drawn))
    mask = torch.empty(shape, dtype=torch.bool, device=device)
    return mask.bernoulli_(1 - dropout, generator=generator)


def _linear(x: Tensor, base: Any, update: Any, xA: Any, call: _Call) -> Tensor:
    """Return x Wᵀ + bias and what the update, where there is one, makes of x Aᵀ."""
    if update is None or x.dtype not in HALVES:
        y = functional.linear(x, dense_weight(base), base.bias)
        if update is not None:
            y.addmm_(xA, update.B.to(x.dtype).t(), alpha=call.scale(update))
        return y
    B = _scaled(update, call, x.dtype)
    y = xA @ B.t() if base.bias is None else torch.addmm(base.bias, xA, B.t())
    return y.addmm_(x, dense_weight(base).t())


def _scaled(update: LowRank, call: _Call, dtype: torch.dtype) -> Tensor:
    """Return s · B, rounded once."""
    return stacked([update.B], dtype, call.scale(update))


def _narrow(x: Tensor, updates: Sequence[LowRank], masks: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return x Aᵀ of each update, (rows, r): views of one product where all see the same x."""
    if not updates:
        return []
    As, ranks = stacked([A for A, _, _ in updates], x.dtype), [len(A) for A, _, _ in updates]
    if masks:
        each = zip(torch.split(As, ranks), masks, strict=True)
        return [(x * mask) @ A.t() for A, mask in each]
    return torch.split(x @ As.t(), ranks, dim=1)


def _grad_of_x(
    G: Sequence[Tensor], Q: Sequence[Tensor], call: _Call, masks: Sequence[Tensor]
) -> Tensor:
    """Return the sum of G W over the bases and of Q A over the updates, (rows, inputs).

    Without masks the Q's are one matrix, (rows, sum of the ranks).
    """
    total: Tensor | None = None
    As = stacked([A for A, _, _ in call.updates], Q[0].dtype) if Q else None
    if masks and As is not None:
        for q, A, mask in zip(Q, torch.split(As, [q.shape[1] for q in Q]), masks, strict=True):
            part = (q @ A).mul_(mask)
            total = part if total is None else total.add_(part)
        As = None
    for left, right in _terms(G, Q, As, call):
        total = left @ right if total is None else total.addmm_(left, right)
    if total is None:
        raise ValueError("a call without a base and without an update")
    return total


def _terms(
    G: Sequence[Tensor], Q: Sequence[Tensor], As: Tensor | None, call: _Call
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the factors of each product in the gradient of x that no mask comes after.

    `As` are all A's as one matrix, (sum of the ranks, inputs), None where masks come after them.
    """
    if As is not None:
        yield Q[0], As
    for g, (base, _) in zip(G, call.of, strict=True):
        if base is not None:
            yield g, dense_weight(base)


def _grad_of_A(
    Q: Sequence[Tensor], x: Tensor, call: _Call, masks: Sequence[Tensor], *, in_place: bool
) -> Sequence[Tensor]:
    """Return Qᵀ x of each update, (r, inputs); x made for this alone is masked in place at last."""
    if masks:
        *others, last = masks
        grads = [q.t() @ (x * mask) for q, mask in zip(Q, others, strict=False)]
        return [*grads, Q[-1].t() @ (x.mul_(last) if in_place else x * last)]
    return torch.split(Q[0].t() @ x, [len(A) for A, _, _ in call.updates])
