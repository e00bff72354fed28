"""A base's weights as training saw them where it held them in 4 or 8 bits: dequantised again."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.errors import BadInput
from lorakit.model.base import Base, load
from lorakit.model.quantized import Quantization, QuantizedLinear
from lorakit.model.weights import Weights
from lorakit.storage.tensors import ALL_ROWS

NAME = "dequantised"  # among the files of a base


class Dequantised:
    """The weights of quantised modules, made dense a run of rows at a time.

    Args:
        modules: by what the base's files call their weights.
        dtypes: of the same weights in the files.
    """

    def __init__(
        self, modules: Mapping[str, QuantizedLinear], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        self._modules, self._dtypes = modules, dtypes

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._modules)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape as the files have it: (inputs, outputs) for a Conv1D."""
        module = self._modules[name]
        shape = (module.outputs, module.inputs)
        return shape[::-1] if module.kind == "conv1d" else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in the files; what is read has that of the training."""
        return self._dtypes[name]

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """Return a weight, or a run of its rows."""
        module = self._modules[name]
        if module.kind == "conv1d":
            return module.dense_rows(ALL_ROWS).t()[rows]
        return module.dense_rows(rows)

    def close(self) -> None:
        """Do nothing: there is no file."""


def dequantised(base: Base, how: Quantization, dtype: torch.dtype) -> Weights:
    """Open a base's tensors, those of quantised modules as a training in `dtype` saw them.

    They are held quantised in memory, which takes what the training took for them; all others
    stay in their files.

    Raises:
        LorakitError: as `load` does.
        BadInput: `model.missing-tensor` when the files have another name for a weight.
    """
    model = load(base, device=torch.device("cpu"), dtype=dtype, quantization=how)
    held = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    weights = base.weights()
    stored = {name: weights.stored_name(name) for name in held}
    if missing := [name for name, found in stored.items() if found is None]:
        weights.close()
        raise BadInput("model.missing-tensor", f"the base's files hold no {missing[0]}")
    modules = {stored[name] or name: module for name, module in held.items()}
    owners = {name.rpartition(".")[0] for name in modules}
    # Scales and their like, which a folder that is stored quantised holds beside the weights.
    beside = [
        name
        for name in weights.names
        if _parents(name) & owners and name not in modules and not name.endswith(".bias")
    ]
    kept = getattr(base.config, "dtype", None) or dtype
    dtypes = {
        name: own if (own := weights.dtype(name)).is_floating_point else kept for name in modules
    }
    return Weights({**weights.sources, NAME: Dequantised(modules, dtypes)}, hidden=beside)


def _parents(name: str) -> set[str]:
    """Return the path of every module that a tensor's name lies in."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}
