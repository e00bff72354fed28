"""The weights that an adapter is merged into.

An adapter that was trained on a base in 4 or 8 bits has learned to correct that base's error too.
So it may be merged into the weights which that base was made from, or into what it holds, made
dense again. Which is better is for held-out rows to say: `losses` asks them.
"""

import torch

from lorakit.adapters import Saved
from lorakit.errors import BadInput
from lorakit.model.base import Base
from lorakit.model.dequantised import dequantised
from lorakit.model.quantized import Quantization
from lorakit.model.weights import Weights
from lorakit.recipe.sections import BaseWeights
from lorakit.runtime import DTYPES


def trained_on(saved: Saved, base: Base) -> Quantization | None:
    """Return how training held the base; None where it was dense, or nothing tells."""
    return base.stored or Quantization.recorded(saved.passport or {})


def open_target(saved: Saved, base: Base, which: BaseWeights) -> Weights:
    """Open the weights to merge into.

    Raises:
        BadInput: `usage` when dense ones, or nobody knows which, are to be dequantised.
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
    # Without a passport nothing tells what dequantised weights were rounded to.
    return dequantised(base, how, dtypes.get(str(passport.get("dtype")), torch.float32))
