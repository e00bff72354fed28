"""Linear layers whose frozen weight is held in 4 or 8 bits, and made dense for each product.

`nf4` and `fp4` hold 4 bits a value and a scale for 64 of them, which double quantisation holds in
8 bits. Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
`int8` holds 8 bits a value and a scale for each row. Dettmers et al. 2022, "LLM.int8()", arXiv
2208.07339; deviation: inputs are not quantised, so the product is that of the dequantised weight.

bitsandbytes quantises and dequantises. It takes seconds to import, which others need not wait for.
"""

import math
from collections.abc import Iterable, Mapping
from copy import copy
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PretrainedConfig

from lorakit.errors import BadInput, EnvironmentLacks
from lorakit.recipe import sections

Form = Literal["nf4", "fp4", "int8"]
INT8_STEPS = 127.0
# Bits a quantised weight: 4, and an fp32 scale for each 64 of them; double quantisation keeps the
# scales in 8 bits, and an fp32 scale for each 256 of those.
BITS_4, BITS_4_DOUBLE = 4 + 32 / 64, 4 + 8 / 64 + 32 / (64 * 256)


class Quantization(NamedTuple):
    """How weights are held: `double` says whether the scales of 4-bit blocks are quantised too."""

    form: Form
    double: bool = True

    @classmethod
    def of(cls, section: sections.Model) -> "Quantization | None":
        """Return what a recipe asks for."""
        form = section.quantization
        return None if form == "none" else cls(form, section.double_quant)

    @classmethod
    def stored(cls, config: PretrainedConfig) -> "Quantization | None":
        """Return how the weights of a folder are stored; None where they are dense."""
        given = getattr(config, "quantization_config", None)
        if not given:
            return None
        if given.get("load_in_8bit"):
            return cls("int8")
        double = bool(given.get("bnb_4bit_use_double_quant", False))
        return cls(given.get("bnb_4bit_quant_type", "fp4"), double)

    @staticmethod
    def record(how: "Quantization | None") -> dict[str, Any]:
        """Return what an adapter's passport says of the base that it was trained on."""
        return (
            {"quantization": how.form, "double_quant": how.double}
            if how
            else {"quantization": "none"}
        )

    @classmethod
    def recorded(cls, passport: Mapping[str, Any]) -> "Quantization | None":
        """Return how the base was held that an adapter was trained on."""
        form: Any = passport.get("quantization")
        return cls(form, passport.get("double_quant") is True) if form in get_args(Form) else None

    def held_bytes(self, shapes: Iterable[tuple[int, int]]) -> int:
        """Return what weights (outputs, inputs) take, their scales included."""
        shapes = list(shapes)
        numbers = sum(map(math.prod, shapes))
        if self.form == "int8":
            return numbers + 4 * sum(outputs for outputs, _ in shapes)
        return math.ceil(numbers * (BITS_4_DOUBLE if self.double else BITS_4) / 8)

    def __str__(self) -> str:
        return self.form if self.form == "int8" or not self.double else f"{self.form}, double"


class Scratch:
    """One buffer for dense weights per device and dtype, as large as the largest of them."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def matrix(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a (rows, columns) view of the buffer, which holds until the next call."""
        buffer = self._buffers.get((device, dtype))
        if buffer is None or buffer.numel() < rows * columns:
            self._buffers.pop((device, dtype), None)  # freed before its successor is made
            buffer = torch.empty(rows * columns, device=device, dtype=dtype)
            self._buffers[device, dtype] = buffer
        return buffer[: rows * columns].view(rows, columns)


class QuantizedLinear(nn.Module):
    """x Ŵᵀ + bias, with Ŵ (outputs, inputs) dequantised anew in each direction.

    `dtype` is that of Ŵ, `kind` that of the site it stands in; `scratch` is shared by all such
    modules of a model. `scales` are those of the rows for int8, else bitsandbytes' account of the
    blocks. Until it takes a weight it has none.
    """

    scales: Any

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        how: Quantization,
        scratch: Scratch,
        *,
        kind: Literal["linear", "conv1d"] = "linear",
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.outputs, self.inputs = shape
        self.dtype, self.how, self.scratch, self.kind = dtype, how, scratch, kind
        empty = torch.empty(shape, dtype=dtype, device="meta")
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.bias = bias
        self.scales = None

    @torch.no_grad()
    def take(self, weight: Tensor) -> None:
        """Quantise a weight as the site stores it, on the device that it is on, and hold that."""
        weight = (weight.t() if self.kind == "conv1d" else weight).to(self.dtype).contiguous()
        library = _library()
        if self.how.form == "int8":
            packed, scales, _ = library.int8_vectorwise_quant(weight.to(torch.float16))
            scales = scales / INT8_STEPS
        else:
            packed, scales = library.quantize_4bit(
                weight, quant_type=self.how.form, compress_statistics=self.how.double
            )
        self.hold(packed, scales)

    def hold(self, packed: Tensor, scales: Any) -> None:
        """Take what was quantised before."""
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scales = scales
        if self.how.form != "int8":
            scales.dtype = self.dtype

    def dense(self) -> Tensor:
        """Return Ŵ, (outputs, inputs); it holds until the next call on any of the modules."""
        device = self.weight.device
        # bitsandbytes has no kernel for the CPU that writes where it is told to.
        out = (
            None
            if device.type == "cpu" and self.how.form != "int8"
            else self.scratch.matrix(self.outputs, self.inputs, device, self.dtype)
        )
        if self.how.form == "int8":
            return torch.mul(self.weight, self.scales[:, None], out=out)
        return _dequantised(self.weight.data, self.scales, out)

    def dense_rows(self, rows: slice) -> Tensor:
        """Return a run of Ŵ's rows, in new memory; threads may ask for others at the same time."""
        start, stop, _ = rows.indices(self.outputs)
        if self.how.form == "int8":
            return torch.mul(self.weight[start:stop], self.scales[start:stop, None]).to(self.dtype)
        size = self.scales.blocksize
        # A block of values may span rows: what is made dense begins and ends between two blocks.
        period = size // math.gcd(size, self.inputs)
        first, last = start - start % period, min(self.outputs, -(-stop // period) * period)
        values = slice(first * self.inputs, last * self.inputs)
        packed = self.weight.data.reshape(-1).view(torch.uint8)
        dense = _dequantised(
            packed[values.start // 2 : values.stop // 2],
            _library().QuantState(
                self._scales[values.start // size : -(-values.stop // size)],
                shape=(last - first, self.inputs),
                blocksize=size,
                quant_type=self.how.form,
                dtype=self.dtype,
            ),
        )
        return dense[start - first : stop - first]

    @cached_property
    def _scales(self) -> Tensor:
        """The scales of the blocks in fp32."""
        scales: Tensor = self.scales.absmax
        if not self.scales.nested:
            return scales
        dense: Tensor = _library().dequantize_blockwise(scales, self.scales.state2)
        return dense.add_(self.scales.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Return x Ŵᵀ + bias for x (..., inputs)."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x Ŵᵀ with this bias instead of its own."""
        out: Tensor = _Product.apply(x, bias, self)  # type: ignore[no-untyped-call]
        return out

    def extra_repr(self) -> str:
        """Name shape and form where the model is printed."""
        return f"{self.inputs}, {self.outputs}, {self.how.form}"


class _Product(torch.autograd.Function):
    """x and a bias to x Ŵᵀ + bias, keeping neither x nor Ŵ for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Any, module: Any) -> Tensor:
        ctx.module = module
        return functional.linear(x, module.dense(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_bias, _ = ctx.needs_input_grad
        grad_x = grad @ ctx.module.dense() if need_x else None
        return grad_x, grad.flatten(0, -2).sum(0) if need_bias else None, None


def _dequantised(packed: Tensor, scales: Any, out: Tensor | None = None) -> Tensor:
    """Return the values of 4-bit codes in the shape that `scales` has for them.

    On CPUs with AVX-512 bitsandbytes 0.50 begins a new block with each row, if rows are a multiple
    of 16 long: where blocks span rows it must believe that there is but one.
    """
    shape = scales.shape
    if packed.device.type == "cpu" and shape[-1] % scales.blocksize:
        scales = copy(scales)
        scales.shape = (1, math.prod(shape))
    dense: Tensor = _library().dequantize_4bit(packed, scales, out=out)
    return dense.view(shape)


def check_asked(section: sections.Model, stored: Quantization | None) -> None:
    """Check, before anything is written, that the weights can be held as a recipe asks.

    Raises:
        BadInput: `recipe.conflict` when they are stored in another form.
        EnvironmentLacks: when what quantises is not installed.
    """
    asked = Quantization.of(section)
    check_installed(stored or asked)
    if stored and asked and stored.form != asked.form:
        raise BadInput(
            "recipe.conflict",
            f"model.quantization: the weights of {section.path} are stored as {stored.form}, "
            f"not {asked.form}",
            help="take model.quantization out, or use the model it was made from",
        )


def check_installed(how: Quantization | None) -> None:
    """Check that what quantises is installed.

    Raises:
        EnvironmentLacks: when it is not.
    """
    if how and find_spec("bitsandbytes") is None:
        raise _lacks("bitsandbytes is not installed")


@cache
def _library() -> Any:
    """Return bitsandbytes' functions.

    Raises:
        EnvironmentLacks: when they cannot be imported, or not for this machine's device.
    """
    try:
        from bitsandbytes import cextension, functional
    except ImportError as error:
        raise _lacks(f"bitsandbytes cannot be imported ({error})") from error
    broken = isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary)
    if broken and cextension.BNB_BACKEND != "CPU":
        raise _lacks("bitsandbytes finds no library of its own for this device")
    return functional


def _lacks(what: str) -> EnvironmentLacks:
    return EnvironmentLacks(
        "env.missing-package",
        f"model.quantization: {what}",
        help='pip install "bitsandbytes>=0.50"; `python -m bitsandbytes` says what it finds; '
        "or set model.quantization: none",
    )
