"""The JSON Schema of recipes, for editors, completion and the reference page."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.recipe import expected
from lorakit.recipe.expected import Schema
from lorakit.recipe.sections import DEFAULT_METHOD, Adapter, Recipe

FILE = Path(__file__).with_name("schema.json")

_EXTENDS = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "description": "recipes that this one is laid over: a path, a packaged name, or a list",
}


def json_schema(methods: Mapping[str, type[Adapter]]) -> Schema:
    """Return the schema (draft 2020-12) of a recipe file.

    `methods` are the settings of every adapter method by its name. A method's keys are asked for
    where `adapter.method` names it.
    """
    schema = _tidied(Recipe.model_json_schema())
    branches = []
    for name, settings in methods.items():
        own = _tidied(settings.model_json_schema())
        schema["$defs"] |= own.pop("$defs", {})
        own["properties"]["method"] = {"const": name}
        schema["$defs"][f"adapter.{name}"] = own
        chosen: Schema = {"properties": {"method": {"const": name}}}
        if name != DEFAULT_METHOD:
            chosen["required"] = ["method"]  # else it would match when no method is named
        branches.append({"if": chosen, "then": {"$ref": f"#/$defs/adapter.{name}"}})
    method = schema["$defs"]["Adapter"]["properties"]["method"]
    schema["$defs"]["Adapter"] = {
        "type": "object",
        "properties": {"method": {**method, "enum": sorted(methods)}},
        "allOf": branches,
    }
    for section in schema["properties"].values():
        if "$ref" in section:
            section.pop("default", None)
    schema["properties"] = {"extends": _EXTENDS, **schema["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lorakit recipe",
        **schema,
    }


def shipped() -> Schema:
    """Return the schema that comes with lorakit."""
    schema: Schema = json.loads(FILE.read_text(encoding="utf-8"))
    return schema


def written(schema: Schema) -> str:
    """Return a schema as the text of its file."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def adapter_defaults(schema: Schema, method: str) -> dict[str, Any]:
    """Return the defaults of a method's settings."""
    found = schema["$defs"].get(f"adapter.{method}", {}).get("properties", {})
    return {key: field["default"] for key, field in found.items() if "default" in field}


def reference(schema: Schema) -> str:
    """Return the recipe reference: one Markdown table with every key."""
    rows: list[tuple[str, str, str, str]] = []
    seen: set[str] = set()
    for key, field in schema["properties"].items():
        own = _adapter_rows(schema) if key == "adapter" else _rows(key, field, schema, seen)
        rows += own
    head = ("key", "value", "default", "meaning")
    table = [head, ("---",) * 4, *rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join(lines) + "\n"


def _rows(
    path: str, field: Schema, schema: Schema, seen: set[str]
) -> Iterator[tuple[str, str, str, str]]:
    """Yield the row of a key and those of the keys below it, each kind of block once."""
    found = expected.variants(field, schema)
    blocks = [variant for variant in found if variant.get("properties")]
    if len(found) > len(blocks):
        yield _row(path, field, found)
    for block in found:
        below = block.get("additionalProperties")
        if isinstance(below, dict) and "$ref" in below:
            blocks += [{"properties": {"*": below}}]
    for block in blocks:
        if str(block) not in seen:
            seen.add(str(block))
            for key, one in block["properties"].items():
                yield from _rows(f"{path}.{key}", one, schema, seen)


def _adapter_rows(schema: Schema) -> list[tuple[str, str, str, str]]:
    """Return a row for each setting; methods that share it share the row."""
    methods = schema["$defs"]["Adapter"]["properties"]["method"]["enum"]
    owners: dict[tuple[str, str, str, str], list[str]] = {}
    for name in methods:
        own = schema["$defs"][f"adapter.{name}"]
        for key, field in own["properties"].items():
            if key != "method":
                row = _row(f"adapter.{key}", field, expected.variants(field, schema))
                owners.setdefault(row, []).append(name)
    method = schema["$defs"]["Adapter"]["properties"]["method"]
    rows = [_row("adapter.method", method, [{"enum": methods}])]
    for row, names in owners.items():
        only = "" if len(names) == len(methods) else f" (only {', '.join(names)})"
        rows.append((*row[:3], row[3] + only))
    return rows


def _row(path: str, field: Schema, found: list[Schema]) -> tuple[str, str, str, str]:
    default = f"`{json.dumps(field['default'], ensure_ascii=False)}`" if "default" in field else ""
    return (f"`{path}`", expected.describe(found), default, field.get("description", ""))


def _tidied(schema: Any) -> Any:
    """Drop pydantic's titles, and give mappings that a factory makes their default."""
    if isinstance(schema, list):
        return [_tidied(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    tidy = {k: _tidied(v) for k, v in schema.items() if not (k == "title" and isinstance(v, str))}
    for key, field in tidy.get("properties", {}).items():
        if field.get("type") == "object" and key not in tidy.get("required", ()):
            field.setdefault("default", {})
    return tidy
