"""What is safe to show or share: no secrets, no control over the terminal, no folders."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

HIDDEN = "[redacted]"

_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 6  # shorter values are words such as `1` or `us`, which would eat whole messages
_TOKEN = r"""
      \bhf_[A-Za-z0-9]{20,}
    | \b(?:gh[opsur]|github_pat)_[A-Za-z0-9_]{20,}
    | \bAKIA[A-Z0-9]{12,}
    """
_SECRET_FORM = re.compile(
    _TOKEN
    + r"""
    | \bsk-[A-Za-z0-9_-]{16,}
    | (?<=\bbearer\ ) [^\s"',;]+
    | (?<=://) [^\s/@]+ (?=@)
    """,
    re.VERBOSE | re.IGNORECASE,
)
# What is a secret beyond doubt: a file may be called sk-learn-questions, and a king the bearer of a
# crown. A digit among the last 16 or more characters tells a key from words.
_CERTAIN_SECRET = re.compile(
    _TOKEN
    + r"""
    | \bsk-(?:[A-Za-z0-9]+[_-]+)* (?=[A-Za-z]*[0-9]) [A-Za-z0-9]{16,}
    | (?<=\bbearer\ ) (?=[^\s"',;0-9]*[0-9]) [^\s"',;]{16,}
    | (?<=://) [^\s/@:]+ : [^\s/@]+ (?=@)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_LEAST_VALUE = 12  # of a secret variable's value, from which on it is no word of another text
# Control characters, what ends a line, and the marks that reverse the direction of writing.
_STEERING = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
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


def secret_in(text: str, environment: Mapping[str, str]) -> int | None:
    """Return where a text holds what is a secret beyond doubt, None where it holds none.

    That is a token or a password in an address, or the value of a secret variable that is long
    enough, and no path.
    """
    found = _CERTAIN_SECRET.search(text)
    starts = [
        text.find(value)
        for name, value in environment.items()
        if is_secret(name) and len(value) >= _LEAST_VALUE and not re.search(r"[\s/\\]", value)
    ]
    return min(
        [found.start()] if found else [start for start in starts if start >= 0], default=None
    )


def steers(text: str) -> str | None:
    """Return the first character that would steer a terminal, as code points, None without one."""
    found = _STEERING.search(text)
    return f"U+{ord(found[0]):04X}" if found else None


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
