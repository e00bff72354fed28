"""The weights that an adapter is merged into.

An adapter that was trained on a base in 4 or 8 bits has learned to correct that base's error too.
So it may be merged into the weights which that base was made from, or into what it holds, made
dense again. Which is better is for held-out rows to say: `losses` asks them.
"""

import torch

from lorakit.adapters import Saved
from lorakit.devices import DTYPES
from lorakit.errors import BadInput, RunFailed
from lorakit.host import GIB, available_bytes
from lorakit.model.base import Base, skeleton
from lorakit.model.dequantised import dequantised
from lorakit.model.quantized import Quantization
from lorakit.model.quantizer import quantizable
from lorakit.model.weights import Weights
from lorakit.recipe.sections import BaseWeights


def trained_on(saved: Saved, base: Base) -> Quantization | None:
    """Return how training held the base; None where it was dense, or nothing tells."""
    return base.stored or Quantization.recorded(saved.passport or {})


def open_target(saved: Saved, base: Base, which: BaseWeights) -> Weights:
    """Open the weights to merge into.

    Raises:
        BadInput: `usage` when dense ones, or nobody knows which, are to be dequantised.
        RunFailed: `run.out-of-memory` when they cannot be held for that.
    """
    if which == "original":
        return base.weights()
    passport = saved.passport or {}
    how = trained_on(saved, base)
    if how is None:
        why = "nothing tells how training held the base"
        if passport.get("quantization") == "none":
            why = "the adapter was trained on dense weights"
        raise BadInput(
            "usage",
            f"--base-weights dequantised: {why}",
            where=str(saved.folder),
            help="without it the adapter is merged into the base as it is",
        )
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    check_memory(base, how)
    # Without a passport nothing tells what dequantised weights were rounded to.
    return dequantised(base, how, dtypes.get(str(passport.get("dtype")), torch.float32))


def check_memory(base: Base, how: Quantization) -> None:
    """Check that the weights can be held quantised, as they are while they are made dense again.

    Raises:
        RunFailed: `run.out-of-memory`.
    """
    sites = quantizable(skeleton(base))
    needed, free = how.held_bytes((site.outputs, site.inputs) for site in sites), available_bytes()
    if needed > free:
        raise RunFailed(
            "run.out-of-memory",
            f"holding {base.name} in {how} takes {needed / GIB:.1f} GiB of this machine's memory, "
            f"{free / GIB:.1f} are free",
            help="free some, or merge into the original weights without measuring losses",
        )
