"""The JSON Schema of recipes, for editors, completion and the reference page."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import create_model

from lorakit.errors import UnknownMethod
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


def settings_for(method: str) -> type[Adapter]:
    """Return a stand-in for a method's settings, for readers that must not wait for torch.

    It knows the keys and defaults of the shipped schema and takes any value.

    Raises:
        UnknownMethod: with the nearest name.
    """
    known = _methods()
    if method not in known:
        near = expected.nearest(method, known)
        help = f"did you mean '{near}'?" if near else "`lorakit methods` lists them"
        message = f"there is no method {expected.shown(method)}"
        raise UnknownMethod("adapter.unknown-method", message, help=help, meant=near)
    return _stand_in(method, known[method])


def settings_of_any() -> type[Adapter]:
    """Return a stand-in with the keys of every method, none of which must be there."""
    return _stand_in(
        "any", {key: {"default": None} for keys in _methods().values() for key in keys}
    )


def _methods() -> dict[str, Schema]:
    """Return the schemas of each method's keys, as the shipped schema has them."""
    known = shipped()["$defs"]
    names = [name for name in known if name.startswith("adapter.")]
    return {name.removeprefix("adapter."): known[name]["properties"] for name in names}


def _stand_in(name: str, fields: Schema) -> type[Adapter]:
    # The defaults are plain values, so that a recipe of these settings can be written out.
    keys = {key: (Any, field.get("default", ...)) for key, field in fields.items()}
    settings: type[Adapter] = create_model(name, __base__=Adapter, **keys)  # type: ignore[call-overload]  # keys known at run time only
    return settings


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
