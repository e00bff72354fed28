"""Read a recipe: YAML, what it extends and `--set`, to a frozen `Recipe` or all its problems."""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any, TypeVar

from pydantic import ValidationError

from lorakit.errors import BadInput, RecipeError, UnknownMethod
from lorakit.recipe import files, rules, texts
from lorakit.recipe.dump import dump
from lorakit.recipe.expected import shown
from lorakit.recipe.layers import Layers
from lorakit.recipe.origin import Origin
from lorakit.recipe.overrides import apply
from lorakit.recipe.problems import Names, explain
from lorakit.recipe.schema import settings_of_any
from lorakit.recipe.sections import DEFAULT_METHOD, Adapter, Recipe, Section
from lorakit.recipe.yaml_nodes import Node, dotted, problem

__all__ = ["Foreign", "Settings", "dump", "read"]

Settings = Callable[[str], type[Adapter]]
Foreign = Callable[[], Mapping[str, str]]
S = TypeVar("S", bound=Section)


def read(
    recipe: str | os.PathLike[str],
    settings_for: Settings,
    overrides: Sequence[str] = (),
    *,
    environ: Mapping[str, str],
    foreign: Foreign = dict,
    today: date | None = None,
) -> Recipe:
    """Read a recipe file or a packaged recipe and fill in the defaults.

    Args:
        recipe: a path, else the name of a packaged recipe.
        settings_for: gives a method's settings; raises `UnknownMethod`.
        overrides: PATH=VALUE, PATH+=VALUE or PATH-, as given to `--set`.
        environ: what `${VAR}` expands from.
        foreign: gives what other tools call the methods: their name, our words.
        today: what `{date}` means; now by default.

    Raises:
        BadInput: when there is no such file, or an override is not understood.
        RecipeError: with every problem of the recipe.
    """
    path = files.locate(recipe)
    data = files.read_bytes(path)
    layers = Layers(path.parent, environ)
    tree = apply(layers.load(path, data), overrides, layers)
    origin = Origin(path, data, {keys: node.at for keys, node in tree.walk()})
    found, problems = _validated(tree, settings_for, foreign)
    problems = layers.problems + texts.problems(tree, layers.texts, environ) + problems
    if found and not problems:
        problems = rules.problems(found, origin)
    if found and not problems:
        found, problems = rules.expanded(found, origin, today or date.today())
    if problems or not found:
        raise RecipeError(problems)
    found._origin = origin
    return found


def _validated(
    tree: Node, settings_for: Settings, foreign: Foreign
) -> tuple[Recipe | None, list[BadInput]]:
    """Validate every section, the adapter's with its method's settings."""
    values = tree.plain
    written = values.pop("adapter", {})
    settings, problems = _settings(tree, written, settings_for)
    method = {"method": DEFAULT_METHOD}
    adapter, wrong_adapter = _attempt(settings, method, written, method if problems else {})
    # The other sections are judged even when nothing can be made of this one.
    known = (adapter or Adapter()) if isinstance(written, dict) else written
    recipe, wrong = _attempt(Recipe, values, {"adapter": known})
    if wrong or wrong_adapter:
        schema = Recipe.model_json_schema()
        own = settings.model_json_schema() if settings else {}
        names = Names.of(schema, own, foreign())
        problems += explain(wrong, tree, (), schema, names) if wrong else []
        problems += explain(wrong_adapter, tree, ("adapter",), own, names) if wrong_adapter else []
    return recipe, problems


def _attempt(
    model: type[S] | None, *values: dict[str, Any]
) -> tuple[S | None, ValidationError | None]:
    """Validate the values, later ones over earlier; without a model there is nothing to refuse."""
    if model is None:
        return None, None
    try:
        return model.model_validate({k: v for some in values for k, v in some.items()}), None
    except ValidationError as error:
        return None, error


def _settings(
    tree: Node, written: object, settings_for: Settings
) -> tuple[type[Adapter] | None, list[BadInput]]:
    """Return the settings of the method that the adapter section names.

    Of a name that is wrong the problem, and the settings of the method that was probably meant, or
    of all: the other keys are judged as well.
    """
    if not isinstance(written, dict):
        return None, []
    path = ("adapter", "method")
    method = written.get("method", DEFAULT_METHOD)
    node = tree.child("adapter")
    node = (node and node.child("method")) or tree
    if node.broken:
        return None, []
    if not isinstance(method, str):
        sentence = f"expected the name of a method, got {shown(method)}"
        return None, [problem("wrong-type", path, sentence, node.place)]
    try:
        return settings_for(method), []
    except UnknownMethod as error:
        message = f"{dotted(path)}: {error.message}"
        wrong = BadInput(error.id, message, where=node.place, help=error.help)
        return settings_for(error.meant) if error.meant else settings_of_any(), [wrong]
