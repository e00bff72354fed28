"""What a plan refuses before anything is spent: parts of a recipe that do not go together."""

from lorakit.adapters import Method
from lorakit.data.source import check_found
from lorakit.errors import BadInput
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
