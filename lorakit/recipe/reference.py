"""The reference of recipe keys, made from the schema."""

import json
from collections.abc import Iterator

from lorakit.errors import BadInput
from lorakit.recipe import expected
from lorakit.recipe.expected import Schema, describe, variants

Row = tuple[str, str, str, str]


def table(schema: Schema) -> str:
    """Return a Markdown table with every key. Methods that share a setting share its row."""
    methods: list[str] = expected.choices(expected.at(schema, ("adapter", "method")))
    owners: dict[Row, set[str]] = {}
    shared: set[str] = set()
    for path, field, method in _fields(schema):
        found = variants(field, schema)
        if path.count(".") > 1 and not method:
            # A source has the same keys wherever it stands: say them once.
            below = f"{path.rpartition('.')[2]} {field}"
            if below in shared:
                continue
            shared.add(below)
        if any("properties" not in variant for variant in found):
            owners.setdefault(_row(path, field, found), set()).add(method)
    rows: list[Row] = [("key", "value", "default", "meaning"), ("---",) * 4]
    for (path, value, default, meaning), names in owners.items():
        everywhere = "" in names or len(names) == len(methods)
        only = "" if everywhere else f" ({', '.join(sorted(names))})"
        rows.append((path, value, default, meaning + only))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def field(schema: Schema, key: str) -> Schema:
    """Return the schema of one dotted key; an adapter's key from the first method that has it.

    Raises:
        BadInput: `recipe.unknown-key`, with the nearest key.
    """
    found: dict[str, Schema] = {}
    for path, one, _ in _fields(schema):
        found.setdefault(path, one)
    if key not in found:
        near = expected.nearest(key, found)
        message = f"there is no recipe key {expected.shown(key)}"
        raise BadInput(
            "recipe.unknown-key", message, help=f"did you mean {near}?" if near else None
        )
    return found[key]


def keys(schema: Schema) -> list[str]:
    """Return every dotted key of a recipe that can be set by its name."""
    paths = (path for path, _, _ in _fields(schema))
    return [path for path in dict.fromkeys(paths) if "*" not in path and path != "extends"]


def _fields(
    schema: Schema, root: Schema | None = None, path: str = "", method: str = ""
) -> Iterator[tuple[str, Schema, str]]:
    """Yield each key's path and schema, and in the adapter section the method that it is for."""
    for block in variants(schema, root or schema):
        properties = block.get("properties", {})
        below = block.get("additionalProperties")
        if isinstance(below, dict) and "$ref" in below:
            properties = {"*": below}
        owner = properties.get("method", {}).get("const", method)
        for key, one in properties.items():
            if not (owner and key == "method"):
                yield f"{path}{key}", one, owner
                yield from _fields(one, root or schema, f"{path}{key}.", owner)


def _row(path: str, field: Schema, found: list[Schema]) -> Row:
    default = f"`{json.dumps(field['default'], ensure_ascii=False)}`" if "default" in field else ""
    cells = (describe(found), default, field.get("description", ""))
    value, default, meaning = (cell.replace("|", "\\|") for cell in cells)
    return (f"`{path}`", value, default, meaning)
