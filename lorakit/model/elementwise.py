"""What happens between the matrix products of a block, with its backward, as plain functions.

A `Prologue`, as kernels call what is fused in front of a product, makes what the product reads: its
inputs are kept, and what it makes of them is made again in the backward pass. Each function is a
few operations on tensors in memory; `fuse_kernels` lets torch.compile make one kernel of each, from
the same text.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

P = ParamSpec("P")
R = TypeVar("R")

_fuses = False
_fusables: list[Callable[..., Any]] = []


def fuse_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Let torch.compile make one kernel of each function here; return why not, after trying all.

    Then, and after `keep_kernels_apart`, the functions run as they stand.
    """
    global _fuses
    _fuses = True
    try:
        _try_all(device, dtype)
    except Exception as error:  # a missing compiler shows itself in many ways
        _fuses = False
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


@torch.no_grad()  # as in a run, which then need not compile again
def _try_all(device: torch.device, dtype: torch.dtype) -> None:
    """Call every function that can be fused once."""
    x, weight = (torch.ones(size, device=device, dtype=dtype) for size in ((4, 8), (8,)))
    _, scale = rms_norm(x, weight, 1e-5)
    rms_norm_backward(x, x, weight, scale)
    silu_gate(x, x)
    silu_gate_backward(x, x, x)
    rotated(x.view(1, 2, 2, 8), x[None, :2], x[None, :2])
    softmax_nll(x.clone(), torch.zeros(4, 1, device=device, dtype=torch.long))


def keep_kernels_apart() -> None:
    """Run the functions here as they stand."""
    global _fuses
    _fuses = False


def _fusable(function: Callable[P, R]) -> Callable[P, R]:
    _fusables.append(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        chosen: Callable[P, R] = _compiled(function) if _fuses else function
        return chosen(*args, **kwargs)

    return call


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


@_fusable
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return n = w ⊙ c x and c = (mean x² + eps)^-½: (rows, dim) to (rows, dim), (rows, 1).

    In fp32 or wider, rounded before the weight is applied, as transformers does it.
    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", arXiv 1910.07467.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype).mul_(weight), scale


@_fusable
def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the normed x again, and the gradient c (w ⊙ g) - c³ x mean(x ⊙ w ⊙ g)."""
    normed = x.to(scale.dtype) * scale
    weighted = grad.to(scale.dtype) * weight
    shared = (weighted * normed).mean(-1, keepdim=True)
    again = normed.to(x.dtype) * weight
    return again, weighted.sub_(normed.mul_(shared)).mul_(scale).to(x.dtype)


@_fusable
def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) ⊙ up, the hidden state of SwiGLU (Shazeer 2020, arXiv 2002.05202)."""
    return F.silu(gate) * up


@_fusable
def silu_gate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden state again, and the gradients of gate and up."""
    silu = F.silu(gate)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return silu * up, grad_gate, silu.mul_(grad)


@_fusable
def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of dimensions by angles: x (..., tokens, heads, dim), cos (..., tokens, dim).

    Su et al. 2021, "RoFormer", arXiv 2104.09864, in the layout of halves that Llama uses.
    With -sin it is its own inverse and its own backward.
    """
    turned = x * cos.unsqueeze(-2)
    halves, sines = x.chunk(2, dim=-1), sin.unsqueeze(-2).chunk(2, dim=-1)
    first, second = turned.chunk(2, dim=-1)
    first.sub_(halves[1] * sines[0])
    second.add_(halves[0] * sines[1])
    return turned


@_fusable
def softmax_nll(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return p = softmax(logits) in their dtype, and -log p[target], (rows, 1), in fp32 or wider.

    With x the logits, log Σ exp(x) = max x - log max p, where max p is never tiny.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    highest, chosen = wide.amax(-1, keepdim=True), wide.gather(1, targets)
    # On a CPU in place; as a kernel, and on a GPU, it is made elsewhere.
    in_place = wide.device.type == "cpu" and not torch.compiler.is_compiling()
    p = torch.softmax(wide, -1, out=wide if in_place else None)
    nll = highest - p.amax(-1, keepdim=True).log() - chosen
    return p.to(logits.dtype), nll


class Itself(NamedTuple):
    """The input as it is."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return x."""
        return x, ()

    def backward(
        self, grad: Tensor, x: Tensor | None = None
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Return x, if it was kept, and its gradient."""
        return x, (grad,)


class Normed(NamedTuple):
    """The input after an RMSNorm whose weight is frozen."""

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the normed x; keep one number a row."""
        normed, scale = rms_norm(x, self.weight, self.eps)
        return normed, (scale,)

    def backward(self, grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the normed x and the gradient of x."""
        normed, grad_x = rms_norm_backward(grad, x, self.weight, scale)
        return normed, (grad_x,)


class Gated(NamedTuple):
    """silu(gate) ⊙ up of two inputs."""

    def forward(self, gate: Tensor, up: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the hidden state; nothing but gate and up is kept."""
        return silu_gate(gate, up), ()

    def backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the hidden state and the gradients of gate and up."""
        hidden, grad_gate, grad_up = silu_gate_backward(grad, gate, up)
        return hidden, (grad_gate, grad_up)


# forward(*inputs) returns what is read, (rows, dim), and what to keep besides the inputs;
# backward(grad, *inputs, *kept) returns what was read, again, and the gradients of the inputs.
Prologue = Itself | Normed | Gated


def rms_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMSNorm of x (..., dim) with a frozen weight; x and one number a row are kept."""
    out: Tensor = _RmsNormed.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., tokens, heads, dim) by angles (..., tokens, dim); x is not kept."""
    out: Tensor = _Rotated.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


class _RmsNormed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, grad_x = rms_norm_backward(grad, *ctx.saved_tensors)
        return grad_x, None, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return rotated(grad, cos, -sin), None, None
