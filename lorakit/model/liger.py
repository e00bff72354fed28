"""Liger's fused cross-entropy of a linear head, from the `kernels` extra, as our own is called."""

from collections.abc import Callable
from importlib.util import find_spec

from torch import Tensor

# Of hidden (n, dim), weight, bias and targets (n): the summed loss, and the gradient of hidden.
HeadLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]


def found() -> HeadLoss | None:
    """Return Liger's loss, None where it is not installed.

    It waits for the device once a call: it counts the targets that are not masked.
    """
    if find_spec("liger_kernel") is None or find_spec("triton") is None:
        return None
    from liger_kernel.ops import fused_linear_cross_entropy as library

    def fused(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        total, *rest = library.fused_linear_cross_entropy_forward(
            hidden,
            weight,
            targets,
            bias=bias,
            reduction="sum",
            compute_gradients=True,
            weight_requires_grad=False,
        )
        # What else it returns has changed from one version to another.
        alike = (one for one in rest if isinstance(one, Tensor) and one.shape == hidden.shape)
        if (grad := next(alike, None)) is None:
            raise ValueError("it returns no gradient of the hidden states")
        return total, grad

    return fused
