"""JSON and JSONL to the letter: UTF-8, no key twice, no NaN, bounded, each fault with its place.

`family` says whose file it is (`data`, `adapter`, `model`, `checkpoint`, or an id such as
`model.bad-index`) and so which ids its faults have: see `paths.file_error`.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.errors import Place
from lorakit.storage.disk import storage_errors
from lorakit.storage.paths import file_error, open_regular
from lorakit.storage.redact import printable
from lorakit.storage.text import BOM, MAX_BYTES, decode, place_after, read_text, too_large

MAX_DEPTH = 64
_BLOCK = 1 << 20
_TYPES = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
_STRING = r'"(?:[^"\\]++|\\.)*+"'
_BRACKET = re.compile(rf"{_STRING}|[{{}}\[\]]", re.DOTALL)
_TOKEN = re.compile(rf"{_STRING}|[{{}}\[\]:,]|[^\s{{}}\[\]:,\"]+", re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _Fault(Exception):
    """What is wrong with a text, and the text before it."""

    def __init__(self, kind: str, message: str, before: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.before = before


class _Refused(Exception):
    """The decoder met what JSON has not; it does not know where."""


def dumps(value: object) -> str:
    """Return a JSON document for people: indented, with a line end.

    Raises:
        ValueError: when a number is not finite.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def dumps_line(value: object) -> str:
    """Return a JSON document on one line, without a line end.

    Raises:
        ValueError: when a number is not finite.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def parse(content: bytes | str, place: Place, family: str) -> Any:
    """Return the value of one JSON document; `place` is where it begins.

    Raises:
        LorakitError: the family's error, with line and column, when it is not strictly JSON.
    """
    text = decode(content, place, family) if isinstance(content, bytes) else content
    try:
        _check_encodable(text)
        _check_depth(text)
        return _value(text)
    except _Fault as fault:
        where = place_after(fault.before, place)
        # A number that is written down is a setting; values of tensors are found elsewhere.
        numbers = fault.kind == "not-finite" and family != "data"
        kind = "bad-setting" if numbers else fault.kind
        raise file_error(family, kind, str(fault), where=where) from None


def read(path: Path, family: str, *, max_bytes: int = MAX_BYTES) -> Any:
    """Return the value of a JSON file.

    Raises:
        LorakitError: the family's error when it is missing, too large or not strictly JSON.
    """
    text = read_text(path, family, max_bytes=max_bytes)
    where = Place(str(path))
    if not text.strip():
        raise file_error(family, "empty", "the file is empty", where=where)
    return parse(text, where, family)


def read_object(path: Path, family: str, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        LorakitError: as `read` does, and when the document is not an object.
    """
    return _object(read(path, family, max_bytes=max_bytes), Place(str(path)), family)


def read_lines(path: Path, family: str = "data") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row of a JSONL file with its line, counted from 1 as the file stands on the disk.

    A BOM, CRLF, blank lines at the end and a last line without an end are fine.

    Raises:
        LorakitError: the family's error, with its line, when a line is not one JSON object.
    """
    file_name = str(path)
    blank, begun = None, False
    for number, line in _lines(path, family):
        where = Place(file_name, number)
        if number == 1:
            line = line.removeprefix(BOM)
        if not line.strip():
            blank = blank or where
            continue
        if blank:
            message, help = "an empty line among the rows", "take the line out"
            raise file_error(family, "syntax", message, where=blank, help=help)
        if not begun and line.lstrip().startswith(b"["):
            message = "the file begins with a list; JSONL is one object per line"
            help = "when the file is one list of rows, let its name end in .json"
            raise file_error(family, "not-an-object", message, where=where, help=help)
        begun = True
        yield number, _object(parse(line, where, family), where, family)
    if not begun:
        raise file_error(family, "empty", "the file is empty", where=file_name)


def _lines(path: Path, family: str) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines without their ends; never more than one long line is in memory."""
    number, line = 1, bytearray()
    with open_regular(path, family) as file, storage_errors(path):
        while block := file.read(_BLOCK):
            pieces = block.split(b"\n")
            for following, piece in enumerate(pieces, start=1):
                line += piece
                if len(line) > MAX_BYTES:
                    raise too_large("the line", MAX_BYTES, Place(str(path), number), family)
                if following < len(pieces):
                    yield number, bytes(line)
                    number, line = number + 1, bytearray()
    if line:
        yield number, bytes(line)


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Fault("encoding", "half of a surrogate pair", text[: error.start]) from None


def _check_depth(text: str) -> None:
    if text.count("{") + text.count("[") <= MAX_DEPTH:
        return
    depth = 0
    for match in _BRACKET.finditer(text):
        if match[0] in "{[":
            depth += 1
        elif match[0] in "}]":
            depth -= 1
        if depth > MAX_DEPTH:
            raise _Fault(
                "syntax", f"nested more than {MAX_DEPTH} levels deep", text[: match.start()]
            )


def _value(text: str) -> Any:
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        rest = printable(text[error.pos : error.pos + 40].rstrip(), 40)
        message = f"not JSON: {error.msg[0].lower()}{error.msg[1:]}, found {rest or 'the end'}"
        raise _Fault("syntax", message, text[: error.pos]) from None
    except (_Refused, ValueError):
        raise _first_refused(text) from None
    if "\\u" in text and _SURROGATE.search(text):
        try:
            dumps_line(value).encode()
        except UnicodeEncodeError:
            raise _first_refused(text) from None
    return value


def _first_refused(text: str) -> _Fault:
    """Walk over the tokens to what the decoder refused; all before it is well formed."""
    path: list[str | int] = []  # the key or the index at each open level
    keys: list[set[str]] = []
    previous = ""
    for match in _TOKEN.finditer(text):
        token = match[0]
        problem = None
        if token in "{[":
            path.append("" if token == "{" else 0)
            keys.append(set())
        elif token in "}]":
            path.pop()
            keys.pop()
        elif token == ",":
            level = path.pop()
            path.append(level + 1 if isinstance(level, int) else level)
        elif token != ":":
            problem = _scalar_problem(token)
            if not problem and path and isinstance(path[-1], str) and previous in "{,":
                path[-1] = json.loads(token)
                if path[-1] in keys[-1]:
                    problem = ("duplicate-key", "given twice")
                keys[-1].add(path[-1])
        if problem:
            kind, message = problem
            return _Fault(kind, f"{_dotted(path)}{message}", text[: match.start()])
        previous = token
    return _Fault("syntax", "not JSON", text)


def _scalar_problem(token: str) -> tuple[str, str] | None:
    try:
        value = _DECODER.decode(token)
    except _Refused:
        return "not-finite", f"{printable(token, 30)} is not a finite number"
    except ValueError:
        return "syntax", f"a number of {len(token):,} digits"
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        return "encoding", "half of a surrogate pair"
    return None


def _dotted(path: list[str | int]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    dotted = "".join(parts).removeprefix(".")
    return f"{printable(dotted)}: " if dotted else ""


def _object(value: Any, where: Place, family: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    found = _TYPES.get(type(value), "a number")
    raise file_error(family, "not-an-object", f"expected an object, found {found}", where=where)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _Refused
    return value


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Refused
    return value


def _refuse_constant(_: str) -> Any:
    raise _Refused


_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_duplicates, parse_float=_finite, parse_constant=_refuse_constant
)
