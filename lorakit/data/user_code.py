"""A format of the user's own: `data.format: module:function`, run only with --allow-local-code."""

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorakit.data.formats import Conversation, Format, detect
from lorakit.errors import BadInput, Notice
from lorakit.storage.redact import printable

_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def load(name: str, *, allowed: bool) -> tuple[Format, Notice]:
    """Import a function `row -> row or Conversation` and return it as a format, with a notice.

    What it returns is a `Conversation`, or a row of one of lorakit's formats.

    Raises:
        BadInput: `security.local-code` when it may not run, `security.import` when there is no such
            module or function.
    """
    if not allowed:
        raise BadInput(
            "security.local-code",
            f"data.format: '{printable(name)}' names code, which does not run by itself",
            help="read that code, then pass --allow-local-code",
        )
    function = _imported(name)

    def read(row: Mapping[str, Any]) -> Conversation:
        try:
            result = function(dict(row))
        except (Exception, SystemExit) as error:
            message = f"{name} raised {type(error).__name__}: {printable(str(error), 200)}"
            raise BadInput("data.format-failed", message) from error
        if isinstance(result, Conversation):
            return result
        if not isinstance(result, Mapping):
            message = f"{name} returned {type(result).__name__}; a row or a Conversation expected"
            raise BadInput("data.format-failed", message)
        return detect(result).read(result)

    notice = Notice("security.local-code", f"runs code: {name} turns each row into a conversation")
    return Format(name, read), notice


def _imported(name: str) -> Callable[[dict[str, Any]], Any]:
    """Import from the working folder or from what is installed: never from beside the data."""
    module, _, function = name.partition(":")
    if not _NAME.fullmatch(name):
        message = f"data.format: expected module:function, got '{printable(name)}'"
        raise BadInput("security.import", message)
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (Exception, SystemExit) as error:
        said = printable(f"{type(error).__name__}: {error}", 200)
        message = f"data.format: cannot import '{module}': {said}"
        help = "modules come from the working folder or from what is installed"
        raise BadInput("security.import", message, help=help) from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        message = f"data.format: module '{module}' has no function '{function}'"
        raise BadInput("security.import", message)
    return found  # type: ignore[no-any-return]  # what it takes and returns is up to the user
