"""What keys of different sections ask of each other, as far as no model is needed to tell."""

import os
import re
from collections.abc import Mapping
from datetime import date

from lorakit.errors import BadInput, Notice, one_of
from lorakit.recipe.origin import Origin
from lorakit.recipe.sections import GENERATED, Eval, Recipe, Train
from lorakit.recipe.texts import steering, too_long
from lorakit.recipe.yaml_nodes import Path, dotted, problem
from lorakit.storage.redact import printable

OWN_FOLDERS = ("adapter", "checkpoints", "eval")
USUAL_LEARNING_RATES = (1e-6, 5e-3)

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def problems(recipe: Recipe, origin: Origin) -> list[BadInput]:
    """Return what does not go together: evaluation that is asked for needs rows to evaluate."""
    # By value and not by presence: a resolved recipe spells out every default.
    held_out, own = recipe.data.eval is not None, recipe.eval.data is not None
    found: list[BadInput] = []
    if recipe.train.eval_every != Train().eval_every and not held_out:
        path: Path = ("train", "eval_every")
        sentence = "training evaluates the rows of data.eval, and there are none"
        help = "set data.eval: 0.05, or remove this key"
        found.append(problem("conflict", path, sentence, origin.place(*path), help))
    if held_out or own:
        return found
    wanted = {
        ("eval", "gates"): (recipe.eval.gates, {}),
        ("eval", "metrics"): (recipe.eval.metrics, Eval().metrics),
    }
    asked: list[Path] = [path for path, (value, default) in wanted.items() if value != default]
    help = "set data.eval: 0.05 or eval.data, or remove this key"
    return found + [
        problem("conflict", path, "there are no rows to evaluate", origin.place(*path), help)
        for path in asked
    ]


def expanded(recipe: Recipe, origin: Origin, today: date) -> tuple[Recipe, list[BadInput]]:
    """Fill the placeholders of `output_dir` and `merge.out`, and check where they lead."""
    found: list[BadInput] = []
    words = {"name": origin.name, "date": today.isoformat(), "seed": str(recipe.seed)}
    folder = _filled(recipe.output_dir, words, ("output_dir",), origin, found)
    words["output_dir"] = folder
    out = _filled(recipe.merge.out, words, ("merge", "out"), origin, found)
    folder, out = os.path.expanduser(folder), os.path.expanduser(out)
    if not found:
        found += _folder_problems(folder, out if recipe.merge.enabled else None, origin)
    merge = recipe.merge.model_copy(update={"out": out})
    return recipe.model_copy(update={"output_dir": folder, "merge": merge}), found


def unusual(recipe: Recipe) -> tuple[Notice, ...]:
    """Return notices on values that are allowed and seldom meant."""
    low, high = USUAL_LEARNING_RATES
    rate = recipe.train.learning_rate
    if low <= rate <= high:
        return ()
    message = f"train.learning_rate: {rate:g} is outside the usual {low:g} to {high:g}"
    where = recipe.origin.place("train", "learning_rate")
    return (Notice("recipe.unusual-value", message, where),)


def without_effect(recipe: Recipe) -> tuple[Notice, ...]:
    """Return notices on keys that are set and that nothing reads as the others stand."""
    model, asked = recipe.model, recipe.eval
    found: dict[Path, str] = {}
    if not model.double_quant and model.quantization not in ("nf4", "fp4"):
        found["model", "double_quant"] = "model.quantization: nf4 or fp4"
    if asked.normalize != Eval().normalize and "exact_match" not in asked.metrics:
        found["eval", "normalize"] = "exact_match in eval.metrics"
    if asked.generate != Eval().generate and not GENERATED & set(asked.metrics):
        found["eval", "generate"] = f"{one_of(sorted(GENERATED))} in eval.metrics"
    return tuple(
        Notice(
            "recipe.no-effect",
            f"{dotted(path)} has no effect without {needs}",
            recipe.origin.place(*path),
            "add that, or remove this key",
        )
        for path, needs in found.items()
    )


def _filled(
    text: str, words: Mapping[str, str], path: Path, origin: Origin, found: list[BadInput]
) -> str:
    """Replace `{word}`; `{{` and `}}` stand for braces."""

    def value(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[1] in words:
            return words[match[1]]
        known = one_of(f"{{{word}}}" for word in words)
        sentence = f"'{printable(match[0])}' is not a placeholder; known are {known}"
        help = "write {{ and }} for braces"
        found.append(problem("bad-choice", path, sentence, origin.place(*path), help))
        return ""

    return _PLACEHOLDER.sub(value, text)


def _folder_problems(folder: str, out: str | None, origin: Origin) -> list[BadInput]:
    found = []
    for path, text in ((("output_dir",), folder), (("merge", "out"), out)):
        place = origin.place(*path)
        # The recipe's own name stands in it.
        found += steering(path, text or "", place) or too_long(path, text or "", place)
        if text is not None and os.path.normpath(text).split(os.sep)[0] == "..":
            message = f"{dotted(path)}: '{printable(text)}' leads out of the working folder"
            help = "give an absolute path if that is meant"
            found.append(BadInput("security.path", message, where=origin.place(*path), help=help))
    if os.path.normpath(folder) == ".":
        sentence = "a run needs a folder of its own, got the working folder"
        found.append(problem("conflict", ("output_dir",), sentence, origin.place("output_dir")))
    elif out is not None:
        parts = os.path.relpath(out, folder).split(os.sep)
        if parts[0] in (os.curdir, *OWN_FOLDERS) or set(parts) == {os.pardir}:
            sentence = f"'{printable(out)}' is a folder that the run itself writes"
            path = ("merge", "out")
            found.append(problem("conflict", path, sentence, origin.place(*path)))
    return found
