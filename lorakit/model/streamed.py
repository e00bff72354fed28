"""A model whose weights stay in their files: each is read when it is used, and forgotten at once.

So a forward pass takes the memory of its activations and of one matrix, however large the model
is. Plain linear layers take a block of their rows, embeddings the rows that they look up.
"""

import copy
import weakref
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorakit.model.base import Base, load, skeleton
from lorakit.model.config import attempt
from lorakit.model.weights import Loaded, Weights
from lorakit.storage.tensors import ALL_ROWS, TensorFile
from lorakit.threads import Threads

BLOCK = 1 << 19  # values of a linear layer's weight that are in memory at a time

# Its annotations leave out half of what it returns.
_AUTO: Any = AutoModelForCausalLM


class Stored(dict[str, Any]):
    """A module's parameters: those on the meta device are read from the files when asked for.

    One that is put in another's place, as `functional_call` does, is as it is.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        names: Mapping[str, str],
        weights: Weights,
        like: Tensor,
        threads: Threads,
    ) -> None:
        super().__init__(parameters)
        self.threads = threads
        self._stored, self._names = dict(parameters), names
        self._weights, self._like = weights, like
        self._given: weakref.WeakValueDictionary[str, nn.Parameter] = weakref.WeakValueDictionary()

    def __getitem__(self, part: str) -> Any:
        held = super().__getitem__(part)
        if held is None or not held.is_meta:
            return held
        whole = self._given[part] = nn.Parameter(self.read(part), requires_grad=False)
        return whole

    def __setitem__(self, part: str, value: Any) -> None:
        # What was read for a moment and is put back must not stay in memory.
        back = value is not None and self._given.get(part) is value
        super().__setitem__(part, self._stored[part] if back else value)

    def read(self, part: str, rows: slice = ALL_ROWS) -> Tensor:
        """Return a parameter, or a run of its rows, in the dtype and on the device of the model."""
        held: Tensor = super().__getitem__(part)
        return (
            self._weights.read(self._names[part], rows).to(self._like)
            if held.is_meta
            else held[rows]
        )


class RowByRow(nn.Linear):
    """A linear layer that multiplies with a few rows of its weight at a time."""

    _parameters: Stored

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + bias."""
        y = x.new_empty(*x.shape[:-1], self.out_features)
        step = max(1, BLOCK // self.in_features)

        def multiply(start: int) -> None:
            rows = slice(start, start + step)
            y[..., rows] = functional.linear(x, self._parameters.read("weight", rows))

        self._parameters.threads.each(multiply, range(0, self.out_features, step))
        return y if self.bias is None else y.add_(self.bias)


class LookedUp(nn.Embedding):
    """An embedding that reads the rows which it looks up."""

    _parameters: Stored

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of the table at the ids."""
        wanted, places = torch.unique(ids, return_inverse=True)
        rows = [self._parameters.read("weight", slice(row, row + 1)) for row in wanted.tolist()]
        return functional.embedding(places, torch.cat(rows))


def streamed(
    base: Base, weights: Weights, *, device: torch.device, dtype: torch.dtype, threads: Threads
) -> PreTrainedModel:
    """Return a base that reads its weights from open files; it is called, and never saved.

    Where transformers converts what the files hold, the model is loaded, in the files' dtype, and
    widened a matrix at a time; a weight that no file holds takes the place of the one loaded.

    Raises:
        LorakitError: as `load` does.
    """
    model = _without_weights(base, device, dtype)
    names = stored_names(model, weights)
    if names is None:
        loaded = load(base, device=torch.device("cpu"), dtype=_widest(weights))
        others = {
            k: source for k, source in weights.sources.items() if not isinstance(source, TensorFile)
        }
        weights = Weights({base.name: Loaded(loaded.state_dict()), **others})
        names = stored_names(model, weights) or {}
    # Its own answer is the device of its parameters.
    model.__class__ = type(type(model).__name__, (type(model),), {"device": device})
    like = torch.empty(0, device=device, dtype=dtype)
    for module in model.modules():
        own = {
            part: names[id(held)] for part, held in module._parameters.items() if held is not None
        }
        if not own:
            continue
        module._parameters = Stored(module._parameters, own, weights, like, threads)
        if type(module) is nn.Linear:
            module.__class__ = RowByRow
        elif isinstance(module, nn.Embedding):
            # A class of its own calls nn.Embedding's forward, which stands behind it here.
            kind = type(module)
            module.__class__ = (
                LookedUp if kind is nn.Embedding else type(kind.__name__, (kind, LookedUp), {})
            )
    for name in (
        model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    ):
        if stored := weights.stored_name(name):
            model.get_buffer(name).copy_(weights.read(stored))
    return model


def held_bytes(base: Base, weights: Weights) -> int:
    """Return how much of the weights `streamed` holds in memory all the time: none or all."""
    if stored_names(skeleton(base), weights) is not None:
        return 0
    return sum(prod(weights.shape(name)) for name in weights.names) * _widest(weights).itemsize


def stored_names(model: PreTrainedModel, weights: Weights) -> dict[int, str] | None:
    """Return by a parameter's id what the files call it; None where they lack one of that shape."""
    names: dict[int, str] = {}
    shapes = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shapes[id(parameter)] = tuple(parameter.shape)
        if stored := weights.stored_name(name):
            names[id(parameter)] = stored
    alike = all(
        key in names and weights.shape(names[key]) == shape for key, shape in shapes.items()
    )
    return names if alike else None


def _without_weights(base: Base, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model whose parameters are on the meta device and whose buffers are computed."""
    config = copy.deepcopy(base.config)

    def make() -> PreTrainedModel:
        # Its annotation forgets that what a hook returns takes the parameter's place.
        hook = register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]
        try:
            with device:
                model = _AUTO.from_config(config, dtype=dtype, trust_remote_code=base.remote_code)
        finally:
            hook.remove()
        frozen: PreTrainedModel = model.requires_grad_(False).eval()
        return frozen

    return attempt(str(base.where), make)


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Forget a parameter's values when it is registered; those of a tie stay one object."""
    if parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=False)


def _widest(weights: Weights) -> torch.dtype:
    return max(
        map(weights.dtype, weights.names),
        key=lambda dtype: (dtype.is_floating_point, dtype.itemsize),
    )
