"""What a merge measures before it writes: losses on the recipe's held-out rows."""

from typing import Any

from lorakit.cli.eval_subject import Subject, task_of
from lorakit.cli.screen import Screen
from lorakit.devices import resolve_dtype
from lorakit.errors import BadInput, LorakitError, Notice
from lorakit.export.losses import few, measure
from lorakit.export.merge import MergePlan
from lorakit.export.target import check_memory
from lorakit.model.base import load_tokenizer
from lorakit.recipe.sections import Recipe
from lorakit.runtime import Runtime


def losses_of(
    screen: Screen,
    plan: MergePlan,
    recipe: Recipe | None,
    runtime: Runtime,
    *,
    allow_local_code: bool,
) -> dict[str, Any] | None:
    """Measure and say the losses before and after the merge of an adapter of 4 or 8 bits.

    Returns None for any other, and where the recipe has no rows to measure on.
    """
    if plan.quantization is None:
        return None
    if recipe is None or (recipe.eval.data is None and recipe.data.eval is None):
        screen.say(
            "Measured  no losses: there is no recipe beside the adapter that names rows for it"
        )
        return None
    tokenizer, dtype = load_tokenizer(plan.base), resolve_dtype("auto", runtime.device)
    subject = Subject(plan.saved, None, plan.base, tokenizer, runtime, dtype)
    try:
        check_memory(plan.base, plan.quantization)
        task = task_of(screen, recipe, subject, None, allow_local_code=allow_local_code)
        rows = few(task.examples)
        if not rows:
            raise BadInput("eval.no-data", "there are no rows to score")
    except LorakitError as error:
        message = f"losses are not measured: {error.message}"
        screen.notice(Notice("merge.not-measured", message, error.where, error.help))
        return None
    with screen.progress("Measuring", 3 * len(rows)) as advance:
        losses = measure(plan, rows, runtime, advance)
    screen.say(f"Measured  {losses}")
    return losses.facts()
