"""Copies of factors in the dtype that is computed in, made again once a factor has changed.

A and B are fp32 masters that change once a step, and are read far more often: forward and backward,
and again where a layer is recomputed, in every micro-batch. Autograd counts the changes of a
tensor; what changes one behind its back, as fused optimizers do, must tell it
(`torch.autograd.graph.increment_version`, in `training/optim.py`). A copy goes with its factor.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Copy(NamedTuple):
    of: tuple[ref[Tensor], ...]
    key: tuple[Any, ...]
    tensor: Tensor


_copies: Any = WeakTensorKeyDictionary()  # by the first factor


def stacked(factors: Sequence[Tensor], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Return the factors as one matrix, (sum of their rows, columns), times `scale`, rounded once.

    A copy is kept where it is narrower than they are; not on meta, where only shapes count, nor as
    a tensor of inference mode, which may not be written to later.
    """
    first = factors[0]
    temporary = first.is_meta or torch.is_inference_mode_enabled()
    if dtype.itemsize >= first.dtype.itemsize or temporary:
        return _made(factors, scale).to(dtype)
    key = (dtype, scale, *((factor.data_ptr(), factor._version) for factor in factors))
    known: _Copy | None = _copies.get(first)
    if known is None or known.key != key or not _are(known.of, factors):
        known = _Copy(tuple(map(ref, factors)), key, _made(factors, scale).to(dtype))
        _copies[first] = known
    return known.tensor


def _are(of: Sequence[ref[Tensor]], factors: Sequence[Tensor]) -> bool:
    return all(one() is factor for one, factor in zip(of, factors, strict=True))


def _made(factors: Sequence[Tensor], scale: float) -> Tensor:
    whole = factors[0] if len(factors) == 1 else torch.cat(list(factors))
    return whole if scale == 1.0 else whole * scale
