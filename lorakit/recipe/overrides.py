"""`--set`: PATH=VALUE, PATH+=VALUE and PATH-, applied to a recipe's tree.

A value goes through the recipe's own YAML loader, so it means what it would mean in the file.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from lorakit.errors import BadInput, Place
from lorakit.recipe.layers import Layers
from lorakit.recipe.yaml_nodes import MAX_DEPTH, Node, Path, dotted, parse, problem
from lorakit.storage.redact import printable

_STEP = re.compile(r"([^.\[\]]+)((?:\[[0-9]{1,5}\])*)(?:\.(?!$)|$)")


def apply(root: Node, overrides: Sequence[str], layers: Layers) -> Node:
    """Apply the overrides in order; what is wrong inside one is added to the problems.

    Raises:
        BadInput: `usage` when one has none of the three forms.
        RecipeError: when a value is not YAML.
    """
    for override in overrides:
        left, equals, text = override.partition("=")
        path = _path(left.removesuffix("+" if equals else "-"))
        if path is None or not (equals or left.endswith("-")):
            raise BadInput(
                "usage",
                f"--set {printable(override)}: expected PATH=VALUE, PATH+=VALUE or PATH-",
                help="for example --set train.learning_rate=1e-4",
            )
        place = Place(f"--set {dotted(path)}")
        try:
            if path[0] == "extends":
                raise LookupError("only a recipe file can extend others")
            if equals:
                root = _set(root, path, text, place, left.endswith("+"), layers)
            else:
                _present(root, path)
                root = _put(root, path, None)
        except LookupError as error:
            layers.problems.append(problem("unknown-key", path, str(error.args[0]), place))
    return root


def _set(root: Node, path: Path, text: str, place: Place, append: bool, layers: Layers) -> Node:
    parsed, problems = parse(text, place.file, located=False)
    layers.problems += problems
    value = replace(
        layers.expand(parsed or Node(None, place, broken=bool(problems)), path), key=place
    )
    if append:
        value = replace(value, value=[*_entries(_present(root, path)), *_entries(value)])
    if path == ("model",) and isinstance(value.value, str):
        path = ("model", "path")
    return _put(root, path, value)


def _put(node: Node, path: Path, value: Node | None) -> Node:
    """Return a tree with the value at a path, or without that path when the value is None.

    The short forms grow on the way: a text becomes the mapping that holds it as `path`, and what
    is no list becomes a list of one.
    """
    head, *rest = path
    if isinstance(head, int):
        items = list(_entries(node))
        if head >= len(items):
            raise LookupError(f"there is no entry {head} among {len(items)}, counted from 0")
        after = _put(items[head], tuple(rest), value) if rest else value
        items[head : head + 1] = [] if after is None else [after]
        return replace(node, value=items)
    entries = {"path": node} if isinstance(node.value, str) else {}
    entries = dict(node.value) if isinstance(node.value, dict) else entries
    place = value.place if value else node.place
    below = entries.get(head) or Node({}, place, place)
    after = _put(below, tuple(rest), value) if rest else value
    if after is None:
        del entries[head]
    else:
        entries[head] = after
    return replace(node, value=entries)


def _present(root: Node, path: Path) -> Node:
    node: Node | None = root
    for key in path:
        node = node.child(key) if node else None
    if node is None:
        raise LookupError("the recipe does not set this key, so there is nothing to change")
    return node


def _entries(node: Node) -> list[Node]:
    return node.value if isinstance(node.value, list) else [node]


def _path(text: str) -> Path | None:
    path: list[str | int] = []
    position = 0
    while position < len(text):
        if not (step := _STEP.match(text, position)):
            return None
        path += [step[1], *map(int, re.findall(r"[0-9]+", step[2]))]
        position = step.end()
    return tuple(path) if 0 < len(path) <= MAX_DEPTH else None
