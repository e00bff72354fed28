"""Adapter methods: one file each, and this folder is their registry.

Names, summaries and other tools' names are read from the files without importing torch; the rest
is imported when it is asked for.
"""

import ast
import difflib
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import UnknownMethod, one_of

if TYPE_CHECKING:
    from lorakit.adapters._attach import attach, attach_layers, set_training, switched_off
    from lorakit.adapters._file import save
    from lorakit.adapters._layer import Adapted, Layer, layers_of, trainable
    from lorakit.adapters._linear import LowRank
    from lorakit.adapters._method import Method, MethodSettings
    from lorakit.adapters._read import Saved, read
    from lorakit.adapters._saved import attach_saved, check_base, merge_layers

__all__ = [
    "Adapted",
    "Layer",
    "LowRank",
    "Method",
    "MethodSettings",
    "Saved",
    "attach",
    "attach_layers",
    "attach_saved",
    "check_base",
    "foreign",
    "get",
    "layers_of",
    "merge_layers",
    "names",
    "paper",
    "read",
    "save",
    "servable",
    "set_training",
    "settings_for",
    "summary",
    "switched_off",
    "trainable",
]

_FOLDER = Path(__file__).parent
_HOMES = {
    name: module
    for module, names in {
        "_attach": "attach attach_layers set_training switched_off",
        "_file": "save",
        "_layer": "Adapted Layer layers_of trainable",
        "_linear": "LowRank",
        "_method": "Method MethodSettings",
        "_read": "Saved read",
        "_saved": "attach_saved check_base merge_layers",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(f"{__name__}.{_HOMES[name]}"))[name]


def names() -> tuple[str, ...]:
    """Return the names of all methods."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("[!_]*.py")))


def summary(name: str) -> str:
    """Return what a method is, in one line: the first of its file."""
    return (ast.get_docstring(_parsed(name)) or "").partition("\n")[0]


def paper(name: str) -> str | None:
    """Return the arXiv number of the paper that a method's file names."""
    found = re.search(r"arXiv\s+(\d{4}\.\d{5})", ast.get_docstring(_parsed(name)) or "")
    return found[1] if found else None


def servable(name: str) -> dict[str, str]:
    """Return for each program that serves adapters `yes` or `no: why`, as a method's file says.

    That is what holds for every adapter of the method; `Method.servable` looks at one.
    """
    reasons = _constant(name, "SERVABLE") or {}
    return {reader: f"no: {why}" if why else "yes" for reader, why in reasons.items()}


def foreign() -> dict[str, str]:
    """Return what other tools call the methods: their name, and how a recipe says it."""
    return {other: f"adapter.method (= {name})" for name in names() for other in _foreign(name)}


def get(name: str) -> "type[Method]":
    """Return a method by its name.

    Raises:
        UnknownMethod: with the nearest name.
    """
    if name not in names():
        meant = {other.lower(): known for known in names() for other in (known, *_foreign(known))}
        near = [meant[one] for one in difflib.get_close_matches(name.lower(), meant, n=1)]
        hint = f"did you mean '{near[0]}'? " if near else ""
        help = f"{hint}the methods are {one_of(names())}"
        message, best = f"there is no method '{name}'", next(iter(near), None)
        raise UnknownMethod("adapter.unknown-method", message, help=help, meant=best)
    module = import_module(f"{__name__}.{name}")
    method = import_module(f"{__name__}._method").Method
    members = [m for m in vars(module).values() if isinstance(m, type) and issubclass(m, method)]
    (found,) = (member for member in members if member.__module__ == module.__name__)
    return found


def settings_for(name: str) -> "type[MethodSettings]":
    """Return the schema of a method's settings: the recipe's adapter section.

    Raises:
        UnknownMethod: with the nearest name.
    """
    return get(name).Settings


def _parsed(name: str) -> ast.Module:
    return ast.parse((_FOLDER / f"{name}.py").read_text(encoding="utf-8"))


def _foreign(name: str) -> tuple[str, ...]:
    """Return what other tools call a method; empty when its file does not say."""
    return tuple(_constant(name, "FOREIGN") or ())


def _constant(name: str, constant: str) -> Any:
    """Return the value of a constant of a method's file, None when it has none."""
    for node in _parsed(name).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == constant:
            return ast.literal_eval(node.value)
    return None
