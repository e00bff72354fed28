"""The layers of an adapter: what stands around one module, and the whole copy of one."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lorakit.adapters._linear import LowRank
from lorakit.errors import BadInput
from lorakit.model.quantized import QuantizedLinear
from lorakit.model.sites import Site

ALL = slice(None)
META = torch.device("meta")


def parameter(*shape: int) -> nn.Parameter:
    """Return a trained fp32 parameter without values."""
    return nn.Parameter(torch.empty(shape, dtype=torch.float32))


class Layer(nn.Module):
    """One site's part of an adapter: its tensors, and what they do to the module they adapt.

    Parameters are fp32 and are cast to the activation's dtype where they are used. `scale` is the
    effective scale of the site, after every pattern: all that exports reads it here. `dropout` is
    the share of its inputs that the layer does not see in training.
    """

    scale: float = 1.0
    dropout: float = 0.0

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.on = True

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the adapted module's output for x (..., inputs), or for ids (...)."""
        raise NotImplementedError

    def merged(self, base: Mapping[str, Tensor], rows: slice = ALL) -> dict[str, Tensor]:
        """Return the base tensors with the adapter folded in, changing nothing.

        Args:
            base: `weight` (outputs, inputs), of an embedding (table, dim), and `bias` if there is
                one: the given rows of them.
            rows: which rows of the whole tensors these are.

        Returns:
            The same names, in fp32 or wider; the caller rounds once.
        """
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that makes the layer the same again, by its name in the file."""
        raise NotImplementedError

    def reset(self, generator: torch.Generator) -> None:
        """Set the initial values; random ones are drawn on the CPU, the same for every device."""
        raise NotImplementedError

    def low_rank(self) -> LowRank | None:
        """Return the update when it is, at this moment, a plain low-rank product."""
        return None

    def untouched(self) -> bool:
        """Tell whether the layer still changes nothing, as it does before training."""
        return False

    def tied(self, name: str) -> "Layer":
        """Return the same change for `name`, the module that shares this one's weight.

        Raises:
            BadInput: when the method cannot change a shared weight.
        """
        raise BadInput(
            "target.unsupported",
            f"{self.name} shares its weight with {name}, which this method cannot adapt",
            help="take it out of adapter.target_modules",
        )


class Copy(Layer):
    """A whole trained copy of a module, used instead of it (`modules_to_save`)."""

    def __init__(
        self, name: str, weight: nn.Parameter, bias: nn.Parameter | None, flipped: bool
    ) -> None:
        super().__init__(name)
        self.weight = weight
        self.bias = bias
        self.flipped = flipped

    @classmethod
    def of(cls, site: Site) -> "Copy":
        """Return a copy of a site's shape, without values."""
        flipped = site.kind == "conv1d"
        shape = [site.outputs] if site.kind == "norm" else [site.outputs, site.inputs]
        if flipped or site.kind == "embedding":
            shape.reverse()
        bias = parameter(site.outputs) if site.has_bias else None
        return cls(site.name, parameter(*shape), bias, flipped)

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Call the base with the copy's tensors in place of its own."""
        if isinstance(base, QuantizedLinear):
            weight = self.weight.t() if self.flipped else self.weight
            bias = base.bias if self.bias is None else self.bias.to(x.dtype)
            return functional.linear(x, weight.to(x.dtype), bias)
        theirs = dict(base.named_parameters())
        own = {name: mine.to(theirs[name].dtype) for name, mine in self.named_parameters()}
        out: Tensor = functional_call(base, own, (x,))
        return out

    def merged(self, base: Mapping[str, Tensor], rows: slice = ALL) -> dict[str, Tensor]:
        """Return the copy's own tensors."""
        own = {"weight": self.weight.t() if self.flipped else self.weight}
        if self.bias is not None:
            own["bias"] = self.bias
        return {name: own[name][rows] if name in own else tensor for name, tensor in base.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors under the names they have in the model."""
        return {f"{self.name}.{name}": parameter for name, parameter in self.named_parameters()}

    def reset(self, generator: torch.Generator) -> None:
        """Leave the values, which `fill` takes from the base."""

    @torch.no_grad()
    def fill(self, base: nn.Module) -> None:
        """Take the base's values."""
        theirs: dict[str, Tensor] = dict(base.named_parameters())
        if isinstance(base, QuantizedLinear):
            dense = base.dense()
            theirs["weight"] = dense.t() if self.flipped else dense
        for name, parameter in self.named_parameters():
            parameter.copy_(theirs[name])

    def tied(self, name: str) -> "Copy":
        """Return a copy that shares this one's weight; a bias of its own stays the base's."""
        return Copy(name, self.weight, None, self.flipped)


class Adapted(nn.Module):
    """What stands in a site's place: the base, untouched, and the adapter's layer around it."""

    def __init__(self, base: nn.Module, adapter: Layer) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted output, or the base's when the adapter is switched off."""
        out: Tensor = self.adapter(x, self.base) if self.adapter.on else self.base(x)
        return out

    @property
    def weight(self) -> Any:
        return self.base.weight

    @property
    def bias(self) -> Any:
        return self.base.bias


def wrap(model: nn.Module, name: str, layer: Layer) -> None:
    """Put a layer around the module called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, Adapted(model.get_submodule(name), layer))


def layers_of(model: nn.Module) -> Iterator[Layer]:
    """Yield what belongs to the adapter, in the model's order."""
    return (module for module in model.modules() if isinstance(module, Layer))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by module path and tensor name, each once."""
    named: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for layer in layers_of(model):
        for name, tensor in layer.tensors().items():
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad and id(tensor) not in seen:
                seen.add(id(tensor))
                named[name] = tensor
    return named
