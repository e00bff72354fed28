"""What a plan refuses or warns of before anything is spent: parts that do not go together."""

import torch

from lorakit.adapters import Method
from lorakit.data.source import check_found
from lorakit.devices import best_dtype, has_fast_kernels
from lorakit.errors import BadInput, Notice
from lorakit.model.base import Base
from lorakit.model.quantized import Quantization
from lorakit.recipe.sections import Recipe


def check_after(recipe: Recipe, base: Base, method: Method, how: Quantization | None) -> None:
    """Check what comes after hours of training: rows for `lorakit eval` are there, a merge can be.

    Raises:
        BadInput: `data.not-found`, or `recipe.conflict` for a merge that cannot be made of a base
            that training holds so.
    """
    for source in recipe.eval.data or ():
        check_found(source, recipe.origin.folder)
    section, stored = recipe.merge, base.stored
    if section.enabled and not method.mergeable:
        raise BadInput(
            "recipe.conflict",
            f"merge.enabled: {method.name()} changes no weights, so there is nothing to merge",
            where=recipe.origin.place("merge", "enabled"),
            help="set merge.enabled: false; the adapter works beside its base",
        )
    if section.base_weights == "dequantised" and how is None:
        raise BadInput(
            "recipe.conflict",
            "merge.base_weights: the base is held dense, so there is nothing to dequantise",
            where=recipe.origin.place("merge", "base_weights"),
            help="take it out, or set model.quantization",
        )
    if section.enabled and section.base_weights == "original" and stored:
        raise BadInput(
            "recipe.conflict",
            f"merge.base_weights: the weights of {base.name} are stored as {stored}, so the "
            "original ones are not here to merge into",
            where=recipe.origin.place("merge", "base_weights"),
            help="set merge.base_weights: dequantised; or merge.enabled: false, and after training "
            "`lorakit merge` with --base and the model that it was made from",
        )


def slow_dtype(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> list[Notice]:
    """Return a notice where the device has no fast kernels for the dtype: a step takes minutes."""
    if has_fast_kernels(dtype, device):
        return []
    best = "fp32" if best_dtype(device) is torch.float32 else "bf16"
    message = f"model.dtype: {recipe.model.dtype} has no fast kernels on this CPU"
    help = f"set model.dtype to auto, which is {best} here"
    return [Notice("run.slow-dtype", message, recipe.origin.place("model", "dtype"), help)]
