"""Write a recipe as YAML that reads back as the same recipe, from any folder."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

from lorakit.recipe import files
from lorakit.recipe.origin import Origin
from lorakit.recipe.sections import Recipe, Source
from lorakit.recipe.yaml_nodes import Path as Keys
from lorakit.recipe.yaml_nodes import resolve
from lorakit.storage.redact import printable

_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./@+-]*")
_LONGEST_KEY = 1000  # YAML looks for the colon of a simple key 1,024 characters ahead
_SOURCES = {("data", "train"), ("data", "eval"), ("eval", "data")}
_BRACED = {("output_dir",), ("merge", "out")}


def dump(recipe: Recipe, *, defaults: bool = True, origins: bool = False) -> str:
    """Return the recipe's YAML.

    Local paths become absolute. A comment names the origin of each key that the recipe's own file
    does not set, such as `--set train.learning_rate`.

    Args:
        recipe: what to write.
        defaults: write the keys that nobody set, too.
        origins: a comment for every key that somebody set.
    """
    writer = _Writer(recipe.origin, origins)
    values = recipe.model_dump(exclude_unset=not defaults)
    head = f"# Resolved from {printable(str(recipe.origin.path), 500)}\n"
    return head + "".join(f"{line}\n" for line in writer.mapping(values, ()))


@dataclass(frozen=True)
class _Writer:
    origin: Origin
    origins: bool

    def mapping(self, values: dict[str, Any], path: Keys) -> Iterator[str]:
        for key, value in values.items():
            yield from self.entry(key, value, (*path, key))

    def entry(self, key: str, value: Any, path: Keys) -> Iterator[str]:
        head = f"{_text(key)}:"
        if len(head) > _LONGEST_KEY:
            yield f"? {_text(key)}"
            head = ":"
        if path in _SOURCES and isinstance(value, list | tuple):
            value = [_short(source) for source in value]
            value = value[0] if len(value) == 1 and isinstance(value[0], str) else value
        if isinstance(value, dict) and value:
            yield head
            yield from (f"  {line}" for line in self.mapping(value, path))
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield head + self.comment(path)
            for index, item in enumerate(value):
                below = (*path, index)
                is_text = isinstance(item, str)
                lines = [self.inline(item, below)] if is_text else self.mapping(item, below)
                signs = chain(["  - "], repeat("    "))
                yield from (sign + line for sign, line in zip(signs, lines, strict=False))
        else:
            yield f"{head} {self.inline(value, path)}{self.comment(path)}"

    def inline(self, value: Any, path: Keys) -> str:
        if isinstance(value, list | tuple):
            return f"[{', '.join(self.inline(item, path) for item in value)}]"
        if isinstance(value, str):
            return _text(self.resolved(value, path))
        return json.dumps(value)

    def resolved(self, text: str, path: Keys) -> str:
        """Make a local path absolute, and escape what the reader would expand."""
        if path in _BRACED:
            text = text.replace("{", "{{").replace("}", "}}")
        folder = self.origin.folder
        if files.is_path_key(path) and not os.path.isabs(text) and files.is_local(text, folder):
            text = os.path.abspath(folder / os.path.expanduser(text))
        return text.replace("${", "$${")

    def comment(self, path: Keys) -> str:
        place = self.origin.places.get(path)
        if place is None or (place.file == str(self.origin.path) and not self.origins):
            return ""
        return f"  # {printable(str(place), 500)}"


def _short(source: dict[str, Any]) -> dict[str, Any] | str:
    """Leave out the defaults of a source: many of them would bury what differs."""
    fields = Source.model_fields
    said = {
        key: value
        for key, value in source.items()
        if value != fields[key].get_default(call_default_factory=True)
    }
    return said["path"] if set(said) == {"path"} else said


def _text(text: str) -> str:
    if _PLAIN.fullmatch(text) and resolve(text) == text:
        return text
    # json leaves everything above ASCII as it is; YAML allows only what can be printed.
    return "".join(
        c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False)
    )
