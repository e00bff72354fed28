"""What a token costs in each layer: counted, not modelled, so that it holds for every path.

The adapted model runs on the meta device, layer by layer, forward and backward, and every tensor
that comes and goes is counted, and so is every product. What a family, a method or a lean block
keeps for its backward pass is what it is seen to keep.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers import PretrainedConfig, PreTrainedModel

from lorakit.model.attention import NAME
from lorakit.model.documents import Documents, has_flash
from lorakit.model.families import decoder_layers


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


_ATEN = torch.ops.aten
# How many FLOPs a product takes: by torch's own table, and what that leaves out.
PRODUCTS: dict[Any, Callable[..., int]] = {
    **{name: flop_registry[name] for name in (_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm)},
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    _ATEN.baddbmm_: flop_registry[_ATEN.baddbmm],
    _ATEN._grouped_mm: _grouped,
}


class Line(NamedTuple):
    """A quantity that grows with the tokens of a micro-batch."""

    fixed: float
    slope: float

    def __call__(self, tokens: int) -> float:
        """Return the quantity at so many tokens."""
        return self.fixed + self.slope * tokens


@dataclass(frozen=True)
class Block:
    """One layer, or what lies around them all.

    Bytes of its input, of what it keeps for its backward pass, and the most that it has at a
    time, its input included. FLOPs of its products in either pass, those of attention left out.
    """

    input: Line
    saved: Line
    peak: Line
    forward: Line
    backward: Line


@dataclass(frozen=True)
class Trace:
    """The layers of an adapted decoder from first to last, and what lies around them.

    `after` is what follows the last layer; `shared` the bytes that all layers keep together, such
    as rotary tables; `before` those that the backward pass of the embedding takes, which comes
    when everything else is gone.
    """

    layers: tuple[Block, ...]
    after: Block
    shared: Line
    before: Line


def trace(
    model: PreTrainedModel, length: int, *, packed: bool, gpu: tuple[int, int] | None = None
) -> Trace:
    """Count what an adapted model on the meta device does with rows of `length` tokens.

    `gpu` is the compute capability of that on which it would run, which has kernels of its own.
    """
    one, two = (_Run(model, rows, length, packed=packed, gpu=gpu) for rows in (1, 2))

    def line(once: float, twice: float) -> Line:
        return Line(2 * once - twice, (twice - once) / length)

    def block(once: _Seen, twice: _Seen) -> Block:
        return Block(*map(line, once, twice))

    return Trace(
        tuple(map(block, one.layers, two.layers)),
        block(one.after, two.after),
        line(one.shared, two.shared),
        line(one.before, two.before),
    )


def plain_trace(config: PretrainedConfig, dtype: torch.dtype) -> Trace:
    """Estimate from widths alone what a decoder costs whose code cannot run without values."""
    text = config.get_text_config()
    hidden, size = text.hidden_size, dtype.itemsize
    mlp = getattr(text, "intermediate_size", None) or 4 * hidden
    saved = 8 * hidden + 8 + size * (6 * hidden + 4 * mlp)
    peak = saved + size * (6 * hidden + 2 * mlp)
    products = 2 * (4 * hidden**2 + 3 * hidden * mlp)
    layer = Block(*(Line(0, n) for n in (size * hidden, saved, peak, products, products)))
    after = Block(*(Line(0, n) for n in (0, 4 * hidden, 12 * hidden, 0, 0)))
    return Trace((layer,) * text.num_hidden_layers, after, Line(0, 0), Line(0, 0))


class _Seen(NamedTuple):
    """The fields of a block at one number of tokens."""

    input: int
    saved: int
    peak: int
    forward: int
    backward: int


class Account(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are alive, and the FLOPs of products, on any device."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flops = 0
        self.alive: dict[int, int] = {}
        self.know(*model.parameters(), *model.buffers())

    def know(self, *tensors: Tensor) -> None:
        """Let tensors cost nothing: they were there before, or would not be there in a run."""
        for tensor in tensors:
            self.now -= self.alive.get(_key(tensor), 0)
            self.alive[_key(tensor)] = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # There are no values to ask for; transformers asks whether all positions go on.
        if operation is torch.ops.aten._local_scalar_dense.default:
            return True
        out = operation(*args, **(kwargs or {}))
        if count := PRODUCTS.get(operation._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for tensor in _tensors(out):
            if _key(tensor) not in self.alive:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        self.alive[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int) -> None:
        self.now -= self.alive.pop(key)


class _Fused(TorchFunctionMode):
    """Has attention keep what a fused kernel keeps; on meta torch would take plain products."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3], named.get("attn_mask"))  # type: ignore[no-untyped-call]
        return function(*args, **named)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        rows, heads, tokens, _ = q.shape
        out = q.new_empty(rows, tokens, heads, v.shape[-1]).transpose(1, 2)
        sums = q.new_empty(rows, heads, tokens, dtype=torch.float32)
        bias = None if mask is None else torch.empty_like(mask, dtype=q.dtype)
        ctx.save_for_backward(q, k, v, out, sums, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


class _Run:
    """One pass over rows of a length: the layers as they come, and what lies around them."""

    _entry: Any = None  # where the first layer's input came from, and its gradient

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        length: int,
        *,
        packed: bool,
        gpu: tuple[int, int] | None,
    ) -> None:
        self.account = Account(model)
        self.gpu = gpu
        self.layers: list[_Seen] = []
        self._kinds: dict[str, tuple[_Seen, Any]] = {}
        self._common: dict[int, int] = {}
        with _gradients(model) as gradients, self.account, _Fused(), self._watched(model):
            self.account.know(*gradients)
            inputs = _inputs(model, rows, length, packed=packed, gpu=gpu)
            self.after, _ = self._block(lambda: model.base_model(**inputs)[0])
            self.shared = sum(self._common.values())
            self.before = 0
            if self._entry:
                hidden, grad = self._entry
                self.account.peak = start = self.account.now
                torch.autograd.backward(hidden, grad)
                self.before = self.account.peak - start

    @contextmanager
    def _watched(self, model: PreTrainedModel) -> Iterator[None]:
        before = {layer: vars(layer).get("forward") for layer in decoder_layers(model)}
        for layer in before:
            layer.forward = partial(self._layer, layer, layer.forward)
        try:
            yield
        finally:
            for layer, twin in before.items():
                del layer.forward
                if twin:
                    layer.forward = twin

    def _layer(
        self, layer: nn.Module, run: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Count a layer the first time that one of its kind comes, and give an output like its."""
        account, flops = self.account, self.account.flops
        if not self.layers and hidden.requires_grad:
            self._entry = get_gradient_edge(hidden), torch.empty_like(hidden)
        kind = f"{hidden.requires_grad} {_kind(layer)}"
        if kind not in self._kinds:
            self._kinds[kind] = self._block(run, hidden, *args, **kwargs)
        seen, out = self._kinds[kind]
        self.layers.append(seen)
        account.peak, account.flops = account.now, flops
        return out

    def _block(
        self, run: Callable[..., Any], hidden: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[_Seen, Any]:
        """Run a block forward and backward; return what was seen, and an output like its own."""
        account = self.account
        start, flops, account.peak = account.now, account.flops, account.now
        inputs = [] if hidden is None else [hidden.detach().requires_grad_(hidden.requires_grad)]
        there = account.alive.keys() - {_key(tensor) for tensor in inputs}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            key, storage = _key(tensor), tensor.untyped_storage()
            if key in there:
                self._common[key] = account.alive[key]
            elif self.gpu and tensor.dtype is torch.bool:
                account.know(tensor)  # a mask of dropout, which is drawn again there
            else:
                kept[key] = storage.nbytes()
            return tensor

        with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
            out = run(*inputs, *args, **kwargs)
        forward = account.flops - flops
        like = tree_map_only(Tensor, _like, out)
        account.know(*_tensors(like))
        first = _tensors(out)[0]
        edge, grad = get_gradient_edge(first) if first.requires_grad else None, _like(first)
        del out, first  # as in a run, where the next layer's output takes the name
        if edge:
            torch.autograd.backward(edge, grad.detach())
        of_input = sum(tensor.untyped_storage().nbytes() for tensor in inputs)
        peak, backward = account.peak - start + of_input, account.flops - flops - forward
        return _Seen(of_input, sum(kept.values()), peak, forward, backward), like


def _inputs(
    model: PreTrainedModel, rows: int, length: int, *, packed: bool, gpu: tuple[int, int] | None
) -> dict[str, Any]:
    shape = (1, rows * length) if packed else (rows, length)
    ids = torch.empty(shape, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if model.config._attn_implementation == NAME:
        runs = ((rows if packed else 1, length),)
        bounds = torch.empty(rows + 1, dtype=torch.int32, device="meta") if has_flash(gpu) else None
        inputs["documents"] = Documents(runs, bounds, capability=gpu)
    return inputs


def _kind(layer: nn.Module) -> str:
    """Return what tells layers apart that do not cost the same: their shapes and settings."""
    settings = [
        f"{key}={value}"
        for module in layer.modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float | str | None) and key not in ("layer_idx", "name")
    ]
    shapes = [f"{tuple(p.shape)} {p.dtype} {p.requires_grad}" for p in layer.parameters()]
    return " ".join([type(layer).__name__, *settings, *shapes])


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, requires_grad=tensor.requires_grad)


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


@contextmanager
def _gradients(model: nn.Module) -> Iterator[list[Tensor]]:
    """Give trained parameters the gradients that a run has from its start."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    try:
        yield [parameter.grad for parameter in trained if parameter.grad is not None]
    finally:
        for parameter in trained:
            parameter.grad = None
