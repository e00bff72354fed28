"""PEFT's `adapter_config.json`: fields read strictly, patterns as PEFT means them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from lorakit.errors import BadInput
from lorakit.model.patterns import ending, searched
from lorakit.storage.redact import printable

V = TypeVar("V")

# What PEFT writes by itself into keys that name something to import; it is never imported here.
IMPORTS: Mapping[str, str] = {
    "megatron_core": r"megatron\.core",
    "auto_mapping": r"transformers(\.models\..+)?",
}

LARGEST = torch.finfo(torch.float32).max

_LONGEST_PATTERN = 10_000
_PLAIN = re.compile(r"[\w.]+")
_LAYER = r".*?\.[^.]*\.(\d+)\."


@dataclass(frozen=True)
class Found:
    """What an adapter's file holds: adapted modules, whole copies, and every tensor's shape.

    Tensors are called by module path and name, as `Layer.tensors` calls them.
    """

    modules: tuple[str, ...]
    copies: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class PeftConfig:
    """The values of one `adapter_config.json`, and its path for messages.

    Every method raises BadInput, `adapter.bad-setting` for a value and `adapter.bad-pattern` for an
    expression that cannot be used.
    """

    values: Mapping[str, Any]
    path: str

    def wrong(
        self, key: str, message: str, id: str = "adapter.bad-setting", help: str | None = None
    ) -> BadInput:
        """Return the error about a key."""
        help = help or "save the adapter again, or put the setting right by hand"
        return BadInput(id, f"{key}: {message}", where=self.path, help=help)

    def integer(self, key: str, least: int = 1, hint: str = "") -> int:
        """Return a whole number of at least `least`; `hint` is added to the error."""
        return self._integer(key, self.values.get(key), least, hint)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number."""
        return self._number(key, self.values.get(key, default))

    def positive(self, key: str, default: float) -> float:
        """Return a finite number greater than 0."""
        return self._positive(key, self.values.get(key, default))

    def share(self, key: str, most: float) -> float:
        """Return a number from 0, its default, to `most`."""
        value = self.number(key, 0.0)
        if not 0 <= value <= most:
            raise self.wrong(key, f"expected a number in [0, {most}], found {shown(value)}")
        return value

    def flag(self, key: str) -> bool:
        """Return true or false, false when absent or null."""
        value = self.values.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.wrong(key, f"expected true or false, found {shown(value)}")
        return value

    def text(self, key: str) -> str | None:
        """Return a text, None when absent or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, f"expected a text or null, found {shown(value)}")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """Return a list of names, empty when absent or null."""
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise self.wrong(key, f"expected a list of names, found {shown(value)}")
        return tuple(value)

    def integers_by_module(self, key: str, modules: Sequence[str]) -> dict[str, int]:
        """Return for each module the whole number of the first pattern of a table that fits it."""
        table = self._table(key).items()
        values = {p: self._integer(f"{key}: {printable(p)}", v) for p, v in table}
        return self._by_module(key, values, modules)

    def numbers_by_module(self, key: str, modules: Sequence[str]) -> dict[str, float]:
        """Return for each module the positive number of the first pattern of a table that fits."""
        table = self._table(key).items()
        values = {p: self._positive(f"{key}: {printable(p)}", v) for p, v in table}
        return self._by_module(key, values, modules)

    def named(self, key: str, modules: Sequence[str]) -> set[str]:
        """Return the modules that a list of names, or one expression for whole names, means."""
        value = self.values.get(key)
        if isinstance(value, str):
            return set(self._fullmatch(key, [value], modules)[0])
        return {module for entry in self.names(key) for module in ending(entry, modules)}

    def targeted(self, modules: Sequence[str]) -> set[str]:
        """Return the modules that PEFT would adapt, by `target_modules` and what narrows it."""
        chosen = self.named("target_modules", modules) - self.named("exclude_modules", modules)
        layers = self.values.get("layers_to_transform")
        if layers is None or layers == [] or isinstance(self.values.get("target_modules"), str):
            return chosen
        layers = layers if isinstance(layers, list) else [layers]
        wanted = {self._integer("layers_to_transform", layer, least=0) for layer in layers}
        exact = self.names("target_modules")
        return {module for module in chosen if module in exact or self._layer(module) in wanted}

    def refuse_imports(self) -> None:
        """Refuse keys that name code to import, but for what PEFT writes by itself.

        Raises:
            BadInput: `security.import`.
        """
        for key, harmless in IMPORTS.items():
            value = self.values.get(key)
            module = value.get("parent_library") if isinstance(value, dict) else value
            if value and not (isinstance(module, str) and re.fullmatch(harmless, module)):
                message = f"{shown(value)}: imports are not followed"
                raise self.wrong(key, message, "security.import")

    def refuse_unknown(
        self, read: frozenset[str], fixed: Mapping[str, tuple[Any, ...]]
    ) -> list[str]:
        """Refuse settings that may change the maths in ways lorakit does not know; return odd keys.

        Args:
            read: keys that somebody else judges.
            fixed: known keys, and the only values that are right here.
        """
        odd = []
        for key, value in self.values.items():
            if key in fixed and value not in fixed[key]:
                raise self.wrong(key, f"{shown(value)} is not supported")
            if key in fixed or key in read or key in IMPORTS or not value:
                continue
            if isinstance(value, bool | str | dict | list):
                raise self.wrong(key, f"unknown setting with the value {shown(value)}")
            odd.append(key)
        return odd

    def _layer(self, module: str) -> int | None:
        """Return the number after a name of `layers_pattern` in a path, else the first one."""
        value = self.values.get("layers_pattern") or []
        entries = [value] if isinstance(value, str) else list(self.names("layers_pattern"))
        if not all(_PLAIN.fullmatch(entry) for entry in entries):
            message = "unsupported: not a plain name"
            raise self.wrong("layers_pattern", message, "adapter.bad-pattern")
        searches = [rf"(?:^|.*?\.){entry}\.(\d+)\." for entry in entries] or [_LAYER]
        found = next((match for search in searches if (match := re.match(search, module))), None)
        return int(found[1]) if found else None

    def _integer(self, key: str, value: Any, least: int = 1, hint: str = "") -> int:
        if type(value) is not int or value < least:
            message = f"expected an integer of at least {least}, found {shown(value)}{hint}"
            raise self.wrong(key, message)
        return value

    def _number(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not -LARGEST <= value <= LARGEST:
            raise self.wrong(key, f"expected a finite number of fp32, found {shown(value)}")
        return float(value)

    def _positive(self, key: str, value: Any) -> float:
        if (number := self._number(key, value)) <= 0:
            raise self.wrong(key, f"expected a number greater than 0, found {shown(value)}")
        return number

    def _table(self, key: str) -> dict[str, Any]:
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, f"expected a table of patterns, found {shown(value)}")
        return value or {}

    def _by_module(self, key: str, values: Mapping[str, V], modules: Sequence[str]) -> dict[str, V]:
        """Return the value of the first pattern that fits a module, whole or after a dot."""
        written = [p for p in values if not _PLAIN.fullmatch(p)]
        whole = [rf"(.*\.)?({pattern})" for pattern in written]
        fits = dict(zip(written, self._fullmatch(key, whole, modules), strict=True))
        found: dict[str, V] = {}
        for pattern, value in values.items():
            meant = fits[pattern] if pattern in fits else ending(pattern, modules)
            found = {**dict.fromkeys(meant, value), **found}
        return found

    def _fullmatch(
        self, key: str, patterns: Sequence[str], names: Sequence[str]
    ) -> list[list[str]]:
        """Match a stranger's expressions within the limits that recipes' own have."""
        if (length := max(map(len, patterns), default=0)) > _LONGEST_PATTERN:
            message = f"unsupported: {length:,} characters"
            raise self.wrong(key, message, "adapter.bad-pattern", "write a list of module names")
        try:
            return searched(patterns, names)
        except BadInput as error:
            message = f"unsupported: {error.message}"
            raise self.wrong(
                key, message, "adapter.bad-pattern", "write a list of module names"
            ) from None


def shown(value: Any) -> str:
    """Write a value of the file into a message."""
    return printable(json.dumps(value, ensure_ascii=False))
