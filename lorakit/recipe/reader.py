"""Read a recipe: YAML, what it extends and `--set`, to a frozen `Recipe` or all its problems."""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from types import MappingProxyType

from pydantic import BaseModel, ValidationError

from lorakit.errors import BadInput, RecipeError
from lorakit.recipe import files, overrides, rules
from lorakit.recipe.dump import dump
from lorakit.recipe.expected import shown
from lorakit.recipe.layers import Layers
from lorakit.recipe.problems import Names, explain
from lorakit.recipe.sections import DEFAULT_METHOD, Adapter, Origin, Recipe
from lorakit.recipe.yaml_nodes import Node, dotted, problem

__all__ = ["AnyAdapter", "Settings", "any_method", "dump", "read"]

Settings = Callable[[str], type[Adapter]]


class AnyAdapter(Adapter, extra="allow"):
    """The settings of no method in particular, for readers that must not wait for torch."""


def any_method(method: str) -> type[Adapter]:
    """Accept every adapter section as it is written."""
    return AnyAdapter


def read(
    recipe: str | os.PathLike[str],
    settings_for: Settings,
    sets: Sequence[str] = (),
    *,
    environ: Mapping[str, str],
    foreign: Mapping[str, str] = MappingProxyType({}),
    today: date | None = None,
) -> Recipe:
    """Read a recipe file or a packaged recipe and fill in the defaults.

    Args:
        recipe: a path, else the name of a packaged recipe.
        settings_for: gives a method's settings; raises `adapter.unknown-method`.
        sets: overrides, as given to `--set`.
        environ: what `${VAR}` expands from.
        foreign: what other tools call a method's settings: their name, our words.
        today: what `{date}` means; now by default.

    Raises:
        BadInput: when there is no such file, or an override is not understood.
        RecipeError: with every problem of the recipe.
    """
    path = files.locate(recipe)
    data = files.read_bytes(path)
    layers = Layers(path.parent, environ)
    tree = overrides.apply(layers.load(path, data), sets, layers)
    origin = Origin(path, data, {keys: node.at for keys, node in tree.walk()})
    found, problems = _validated(tree, settings_for, foreign)
    problems = layers.problems + problems
    if found and not problems:
        problems = rules.problems(found, origin)
    if found and not problems:
        found, problems = rules.expanded(found, origin, today or date.today())
    if problems or not found:
        raise RecipeError(problems)
    found._origin = origin
    return found


def _validated(
    tree: Node, settings_for: Settings, foreign: Mapping[str, str]
) -> tuple[Recipe | None, list[BadInput]]:
    """Validate every section, the adapter's with its method's settings."""
    values = tree.plain
    adapter = values.pop("adapter", {})
    settings: type[Adapter] | None = None
    problems: list[BadInput] = []
    refused: list[tuple[ValidationError, tuple[str, ...], type[BaseModel]]] = []
    if isinstance(adapter, dict):
        settings, problems = _settings(tree, adapter.get("method", DEFAULT_METHOD), settings_for)
    if settings:
        try:
            adapter = settings.model_validate({"method": DEFAULT_METHOD, **adapter})
        except ValidationError as error:
            refused.append((error, ("adapter",), settings))
    if isinstance(adapter, dict):
        adapter = Adapter()  # its problems are known: only the other sections are left to see
    recipe = None
    try:
        recipe = Recipe.model_validate({**values, "adapter": adapter})
    except ValidationError as error:
        refused.append((error, (), Recipe))
    if refused:
        adapter_schema = settings.model_json_schema() if settings else None
        names = Names.of(Recipe.model_json_schema(), adapter_schema, foreign)
        for refusal, section, model in refused:
            problems += explain(refusal, tree, section, model.model_json_schema(), names)
    return recipe, problems


def _settings(
    tree: Node, method: object, settings_for: Settings
) -> tuple[type[Adapter] | None, list[BadInput]]:
    path = ("adapter", "method")
    node = tree.child("adapter")
    node = (node and node.child("method")) or tree
    if not isinstance(method, str):
        sentence = f"expected the name of a method, got {shown(method)}"
        return None, [] if node.broken else [problem("wrong-type", path, sentence, node.place)]
    try:
        return settings_for(method), []
    except BadInput as error:
        message = f"{dotted(path)}: {error.message}"
        return None, [BadInput(error.id, message, where=node.place, help=error.help)]
