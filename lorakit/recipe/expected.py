"""What a value had to be: sentences made from the JSON Schema of the recipe.

A field's schema is a list of variants: `auto` or a positive integer. One sentence names them all,
so a wrong value has one problem however many validators refused it.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from lorakit.errors import one_of
from lorakit.recipe.yaml_nodes import Path, resolve
from lorakit.storage.redact import printable

Schema = dict[str, Any]

_WORDS = {"string": "text", "object": "a mapping", "null": "null"}
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems"}
_BOUNDS |= {"minLength", "maxLength", "pattern"}
_ARTICLES = {"integer": "an integer", "number": "a number"}
# A maximum from here on only keeps the absurd out: it is named to those alone who pass it.
_GUARD = 1_000_000
_OLD_BOOLEANS = {"yes": True, "on": True, "y": True, "no": False, "off": False, "n": False}


def variants(schema: Schema, root: Schema) -> list[Schema]:
    """Resolve references and alternatives into a flat list."""
    if "$ref" in schema:
        return variants(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "then" in schema:
        return variants(schema["then"], root)
    several = schema.get("anyOf") or schema.get("oneOf") or [schema, *schema.get("allOf", ())]
    return [
        found for one in several for found in ([schema] if one is schema else variants(one, root))
    ]


def at(root: Schema, path: Path) -> list[Schema]:
    """Return the variants of the value at a path below the root schema."""
    found = variants(root, root)
    for key in path:
        below: list[Schema] = []
        for variant in found:
            other = variant.get("items" if isinstance(key, int) else "additionalProperties")
            schema = variant.get("properties", {}).get(key, other)
            if isinstance(schema, dict):
                below += variants(schema, root)
        found = below
    return found


def keys(found: Iterable[Schema]) -> list[str]:
    """Return the keys that a mapping may have here."""
    return list(dict.fromkeys(key for variant in found for key in variant.get("properties", {})))


def judge(value: Any, found: Sequence[Schema]) -> tuple[str, str, str | None]:
    """Say what is wrong with a value: an error id, a sentence, and a likely fix if there is one."""
    help = suggestion(value, found)
    same = [variant for variant in found if _is_type(value, variant.get("type"))]
    bounded = [variant for variant in same if _BOUNDS & set(variant)]
    if same and _is_number(value) and not math.isfinite(value):
        return "out-of-range", f"must be a finite number, got {shown(value)}", help
    if value == "" and bounded:
        return "out-of-range", "must not be empty", help
    if bounded and not isinstance(value, str):
        wanted = _range(_met(bounded[0], value)) if _is_number(value) else describe(found)
        return "out-of-range", f"must be {wanted}, got {shown(value)}", help
    id = "bad-choice" if same else "wrong-type"
    return id, f"expected {describe(found)}, got {shown(value)}", help


def describe(found: Iterable[Schema]) -> str:
    """Name everything that a value may be."""
    words: dict[str, bool] = {}
    for variant in found:
        fixed = ["true", "false"] if variant.get("type") == "boolean" else choices([variant])
        words |= dict.fromkeys(map(str, fixed), True) if fixed else {_describe_one(variant): False}
    return ("one of " if len(words) > 2 and all(words.values()) else "") + one_of(words)


def choices(found: Iterable[Schema]) -> list[Any]:
    """Return the words that a value may be one of."""
    fixed = [v.get("enum", [v["const"]] if "const" in v else []) for v in found]
    return [choice for some in fixed for choice in some]


def shown(value: Any) -> str:
    """Write a value into a message: short, and with nothing invisible."""
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"'{printable(value)}'"
    return printable(json.dumps(value, ensure_ascii=False))


def nearest(word: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """Return the known word that was probably meant."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, likeness)), None)


def suggestion(value: Any, found: Sequence[Schema]) -> str | None:
    """Guess what was meant by a wrong value: the first likely meaning that would be right."""
    if value is None and any(variant.get("type") == "object" for variant in found):
        return "nothing stands below this key"
    words = [choice for choice in choices(found) if isinstance(choice, str)]
    likely: list[Any] = []
    if isinstance(value, str):
        near = nearest(value, words) or nearest(value.lower(), words)
        grouped = re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", value)
        number = resolve(value.replace("_", "").replace(",", "" if grouped else ".")[:20])
        likely = [number, _OLD_BOOLEANS.get(value.lower()), near, [value]]
        likely += [{key: value} for key in keys(found)[:1]]
    elif _is_number(value) and math.isfinite(value):
        likely = [
            *([int(value)] if value == int(value) else []),
            *([value / 100] if value > 1 else []),
            [value],
            *(
                []
                if any("type" in v and _is_type(value, v["type"]) for v in found)
                else [str(value)]
            ),
        ]
    meant = next((one for one in likely if one is not None and accepts(one, found)), None)
    if meant == [value]:  # which is not known to be right: the word itself is not checked here
        return f"a list of one is written {_written(meant)}"
    return None if meant is None else f"did you mean {_written(meant)}?"


def accepts(value: Any, found: Iterable[Schema]) -> bool:
    """Tell whether the schema, as far as it says, has nothing against a value."""
    return any(_accepts_one(value, variant) for variant in found)


def _accepts_one(value: Any, schema: Schema) -> bool:
    allowed = choices([schema])
    if not _is_type(value, schema.get("type")) or (allowed and value not in allowed):
        return False
    if isinstance(value, str):
        matches = re.search(schema.get("pattern", ""), value)
        return bool(matches) and len(value) >= schema.get("minLength", 0)
    if isinstance(value, list):
        inside = [schema.get("items", {})] * len(value)
        return len(value) >= schema.get("minItems", 0) and all(map(_accepts_one, value, inside))
    if isinstance(value, dict):
        inside = schema.get("properties", {})
        return all(_accepts_one(item, inside.get(key, {})) for key, item in value.items())
    return not _is_number(value) or (
        schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
        and schema.get("exclusiveMinimum", -math.inf) < value
        and value < schema.get("exclusiveMaximum", math.inf)
    )


def _describe_one(schema: Schema) -> str:
    schema = _met(schema)
    kind = schema.get("type", "")
    if kind == "array":
        several = "a list of at least one" if schema.get("minItems") else "a list"
        entries = [str(choice) for choice in choices([schema.get("items", {})])]
        if entries:
            return f"{several} of {one_of(entries)}"
        return f"{several} entry" if schema.get("minItems") else several
    if kind in _ARTICLES:
        if kind == "integer" and schema.get("minimum") == 1 and "maximum" not in schema:
            return "a positive integer"
        words = _range(schema)
        return f"{_ARTICLES[kind]} {'of ' * words.startswith('at ')}{words}".strip()
    if "examples" in schema:
        return f"text such as {shown(schema['examples'][0])}"
    if "pattern" in schema:
        return f"text that matches {schema['pattern']}"
    return _WORDS.get(kind, "another value")


def _met(schema: Schema, value: float = 0) -> Schema:
    """Return a schema with the one bound that a number meets, where its maximum is a guard."""
    guard = schema.get("maximum", 0)
    if guard < _GUARD:
        return schema
    others = {"minimum", "exclusiveMinimum"} if value > guard else {"maximum"}
    return {key: bound for key, bound in schema.items() if key not in others}


def _range(schema: Schema) -> str:
    """Name the bounds of a number: `in [0, 1)`, `greater than 0`, `at least 8`."""
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if schema.get("type") == "integer" and low == 1 and high is below is None:
        return "a positive integer (greater than 0)"
    left = f"[{low}" if low is not None else f"({above}" if above is not None else ""
    right = f"{high}]" if high is not None else f"{below})" if below is not None else ""
    if left and right:
        return f"in {left}, {right}"
    if left:
        return f"at least {low}" if low is not None else f"greater than {above}"
    return (f"at most {high}" if high is not None else f"less than {below}") if right else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_type(value: Any, kind: str | None) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, int):
        return kind in ("integer", "number")
    types = {float: "number", str: "string", list: "array", dict: "object"}
    return kind == types.get(type(value))


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_written(item)}" for key, item in value.items()) + "}"
    return shown(value).removeprefix("the boolean ")
