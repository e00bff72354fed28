"""From what pydantic refuses to the problems of a recipe: one sentence, at the right place.

pydantic reports one error per union member and puts the member's name into the location; here
the location is followed along the recipe's own tree and what is no key of it is left out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lorakit.errors import BadInput, one_of
from lorakit.recipe import expected
from lorakit.recipe.expected import Schema
from lorakit.recipe.foreign import FOREIGN, NOTES, names_secret
from lorakit.recipe.yaml_nodes import Node, Path, dotted, problem


@dataclass(frozen=True)
class Names:
    """Where every key of a recipe lives, and what other tools call it."""

    homes: Mapping[str, tuple[str, ...]]
    foreign: Mapping[str, str]

    @classmethod
    def of(cls, root: Schema, adapter: Schema, foreign: Mapping[str, str]) -> "Names":
        """Collect the keys of the recipe's schema and of the chosen method's settings."""
        homes: dict[str, tuple[str, ...]] = {}
        for schema, base in ((root, ()), (adapter, ("adapter",))):
            for path in _key_paths(schema, schema, base):
                homes[path[-1]] = (*homes.get(path[-1], ()), dotted(path[:-1]))
        return cls(homes, {**FOREIGN, **foreign})

    def explain(self, key: str, section: str, here: list[str]) -> tuple[str, str, str | None]:
        """Say what an unknown key may mean: an error id, a hint, and the key that is meant."""
        if names_secret(key):
            return "secret", "a recipe never holds secrets: set HF_TOKEN in the environment", None
        if key in NOTES:
            return "unknown-key", NOTES[key], None
        if homes := self.homes.get(key):
            blocks = one_of(f"under `{home}:`" if home else "at the top level" for home in homes)
            return "unknown-key", f"`{key}` belongs {blocks}", _join(homes[0], key)
        if meant := self.foreign.get(key):
            return "unknown-key", f"lorakit calls this {meant}", meant.partition(" ")[0]
        if near := expected.nearest(key, here):
            return "unknown-key", f"did you mean '{near}'?", _join(section, near)
        if near := expected.nearest(key, self.homes, 0.8):
            meant = _join(self.homes[near][0], near)
            return "unknown-key", f"did you mean {meant}?", meant
        if near := expected.nearest(key, self.foreign, 0.8):
            meant = self.foreign[near]
            return "unknown-key", f"did you mean {meant}?", meant.partition(" ")[0]
        return "unknown-key", f"the keys here are {', '.join(here)}", None


@dataclass(frozen=True)
class _Fault:
    kind: Literal["unknown", "missing", "key", "own", "value"]
    path: Path
    detail: ErrorDetails


def explain(
    error: ValidationError, tree: Node, section: Path, schema: Schema, names: Names
) -> list[BadInput]:
    """Turn the errors of one validation into problems.

    `schema` is the JSON Schema of what was validated, which stands at `section` of the tree.
    """
    found: dict[tuple[str, Path], BadInput] = {}
    faults = list(_faults(error, tree, section))
    meant: list[str] = []
    for fault in faults:
        path, node = fault.path, _nearest(tree, fault.path)
        below = path[len(section) :]
        if fault.kind == "unknown":
            here = expected.keys(expected.at(schema, below[:-1]))
            id, hint, key = names.explain(str(path[-1]), dotted(path[:-1]), here)
            meant += [key] if key else []
            made = problem(id, path, "unknown key", node.key or node.place, hint)
        elif fault.kind == "key":
            allowed = [{"type": "string", "enum": _key_choices(schema, below[:-1])}]
            id, sentence, help = expected.judge(path[-1], allowed)
            made = problem(id, path, sentence, node.key or node.place, help)
        elif fault.kind == "own":
            made = _own(fault, node)
        elif fault.kind == "value":
            if any(f.path[: len(path)] == path and len(f.path) > len(path) for f in faults):
                continue  # another member of the union got further and knows better
            made = _judged(fault, node, expected.at(schema, below))
        else:
            made = problem("missing-key", path, "is missing", node.key or node.place)
        found.setdefault((fault.kind, path), made)
    return [
        one
        for (kind, path), one in found.items()
        if kind != "missing" or not any(_one_holds(dotted(path), key) for key in meant)
    ]


def _faults(error: ValidationError, tree: Node, section: Path) -> Iterator[_Fault]:
    kinds = {"extra_forbidden": "unknown", "missing": "missing"}
    for detail in error.errors(include_url=False):
        path, node = section, _nearest(tree, section)
        location = detail["loc"]
        for key in location:
            if below := node.child(key):
                path, node = (*path, key), below
        kind: Any = kinds.get(detail["type"], "value")
        if kind == "missing":
            path = (*path, location[-1])
        elif location[-1:] == ("[key]",):
            kind = "key"
        elif "sentence" in (context := detail.get("ctx", {})):
            kind, path = "own", (*path, *context["below"])
        elif detail["type"] == "value_error":
            kind = "own"
        if not _is_broken(tree, path):
            yield _Fault(kind, path, detail)


def _judged(fault: _Fault, node: Node, found: list[Schema]) -> BadInput:
    if expected.accepts(node.plain, found):
        return problem("invalid", fault.path, fault.detail["msg"], node.place)
    id, sentence, help = expected.judge(node.plain, found)
    return problem(id, fault.path, sentence, node.place, help)


def _own(fault: _Fault, tree: Node) -> BadInput:
    """Make the problem of an error that a validator of ours raised."""
    node = _nearest(tree, fault.path)
    context = fault.detail.get("ctx", {})
    if "sentence" not in context:
        return problem("invalid", fault.path, str(context["error"]), node.place)
    help = context["help"] or None
    message = problem("invalid", fault.path, context["sentence"], node.place, help)
    return BadInput(fault.detail["type"], message.message, where=node.at, help=help)


def _nearest(tree: Node, path: Path) -> Node:
    """Return the node at a path, or the deepest one that the tree has on the way."""
    node = tree
    for key in path:
        below = node.child(key)
        if below is None:
            break
        node = below
    return node


def _is_broken(tree: Node, path: Path) -> bool:
    return any(_nearest(tree, path[:length]).broken for length in range(len(path) + 1))


def _key_paths(schema: Schema, root: Schema, base: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for variant in expected.variants(schema, root):
        for key, below in variant.get("properties", {}).items():
            yield (*base, key)
            yield from _key_paths(below, root, (*base, key))


def _key_choices(schema: Schema, path: Path) -> list[str]:
    found = expected.at(schema, path)
    return [key for variant in found for key in variant.get("propertyNames", {}).get("enum", [])]


def _one_holds(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _join(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key
