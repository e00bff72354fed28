"""The weight of a frozen linear module, as a matrix product needs it, however it is stored."""

from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lorakit.model.quantized import QuantizedLinear


def is_frozen_linear(module: nn.Module) -> bool:
    """Tell whether a module is x Wᵀ + bias and no more, with nothing in it trained."""
    trained = any(parameter.requires_grad for parameter in module.parameters())
    return type(module) in (nn.Linear, Conv1D, QuantizedLinear) and not trained


def dense_weight(module: nn.Module) -> Tensor:
    """Return a linear module's W as a dense matrix (outputs, inputs).

    What was computed for the call, as a quantised weight is, holds only until the next call, so
    autograd must not keep it.
    """
    if isinstance(module, QuantizedLinear):
        return module.dense()
    weight: Tensor = module.weight  # type: ignore[assignment]  # a linear module has one
    return weight.t() if isinstance(module, Conv1D) else weight


def frozen_product(x: Tensor, module: nn.Module) -> Tensor:
    """Return x Wᵀ without the module's bias, for x (..., inputs)."""
    if isinstance(module, QuantizedLinear):
        return module.product(x)
    return functional.linear(x, dense_weight(module))
