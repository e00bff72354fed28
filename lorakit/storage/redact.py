"""What is safe to show or share: no secrets, no control over the terminal, no folders."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

HIDDEN = "[redacted]"

_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 6  # shorter values are words such as `1` or `us`, which would eat whole messages
_SECRET_FORM = re.compile(
    r"""
      \bhf_[A-Za-z0-9]{20,}
    | \bsk-[A-Za-z0-9_-]{16,}
    | \b(?:gh[opsur]|github_pat)_[A-Za-z0-9_]{20,}
    | \bAKIA[A-Z0-9]{12,}
    | (?<=\bbearer\ ) [^\s"',;]+
    | (?<=://) [^\s/@]+ (?=@)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_ABSOLUTE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|file:")


def is_secret(name: str) -> bool:
    """Tell whether a variable or key of this name holds a secret."""
    return bool(_SECRET_NAME.search(name))


def redact(text: str, environment: Mapping[str, str]) -> str:
    """Hide the values of secret variables, and whatever has the form of a token or password."""
    values = {
        value
        for name, value in environment.items()
        if is_secret(name) and len(value.strip()) >= _SHORTEST
    }
    written = {form for value in values for form in _forms(value)}
    for form in sorted(written, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    return _SECRET_FORM.sub(HIDDEN, text)


def printable(text: str, limit: int = 80) -> str:
    r"""Return at most `limit` characters with everything invisible escaped.

    Control characters, ANSI sequences, line ends and bidirectional marks become code points.

    >>> printable("a\x1b[31m\u202eb\n")
    'a\\x1b[31m\\u202eb\\n'
    """
    shown = "".join(map(_visible, text[: limit + 1]))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _visible(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _forms(value: str) -> Iterator[str]:
    """Yield a value as it may stand in text, in JSON and in an address."""
    yield value
    yield value.strip()
    yield json.dumps(value)[1:-1]
    yield quote(value, errors="replace")
    yield quote(value, safe="", errors="replace")


def without_folders(value: Any) -> Any:
    """Return a JSON value with the last part alone of each absolute path: what may be shared."""
    if isinstance(value, Mapping):
        return {without_folders(key): without_folders(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(one) for one in value]
    if isinstance(value, str) and _ABSOLUTE.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value
