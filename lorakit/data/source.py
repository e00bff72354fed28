"""Rows of a source: a .jsonl, .json, .csv or .parquet file, or a data set of the hub.

Every row knows its file and line. Nothing is coerced: a number stays a number.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit.errors import BadInput, EnvironmentLacks, Place, one_of
from lorakit.recipe import files
from lorakit.recipe.sections import Source
from lorakit.storage import strict_json
from lorakit.storage.disk import storage_errors
from lorakit.storage.hashing import sha256_file
from lorakit.storage.paths import file_error, open_regular
from lorakit.storage.redact import printable
from lorakit.storage.text import MAX_BYTES

MAX_JSON_BYTES = 1 << 30
# Of a parquet file: rows that may take less than a byte each, and how often its bytes may repeat.
MOST_REPEATED_ROWS = 100_000
MOST_EXPANDED = 100

Numbered = tuple[int, dict[str, Any]]  # by the line, or by the row where there are no lines

_PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_SPLIT = re.compile(
    r"(?P<name>[\w.-]*)(?:\[(?P<from>-?[0-9]{1,18}%?)?:(?P<to>-?[0-9]{1,18}%?)?\])?"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its values, where it stands, and the number of its source."""

    value: dict[str, Any]
    place: Place
    source: int


@dataclass(frozen=True)
class Loaded:
    """The rows of one source."""

    source: Source
    rows: tuple[Row, ...]


def load(source: Source, number: int, *, folder: Path, offline: bool) -> Loaded:
    """Read the rows of a source; its path is relative to `folder`.

    Raises:
        BadInput: when the file is missing, of another kind, or has a row that cannot be read.
        EnvironmentLacks: `env.offline` for a hub id without network.
    """
    path = Path(source.path)
    on_hub = _is_hub_id(source.path, folder)
    if on_hub:
        rows = list(enumerate(_from_hub(source, offline), 1))
    else:
        path, reader = _file(source, folder)
        found = list(islice(reader(path), _needed(source)))
        rows = found[_slice(source, len(found))]
        if found and not rows:
            message = f"the split {source.split} leaves none of {len(found):,} rows"
            raise BadInput("data.empty", message, where=str(path))
    if not rows:
        raise file_error("data", "empty", "the file is empty: it has no rows", where=str(path))
    taken = rows[: source.max_samples]
    name = source.path if on_hub else str(path)
    return Loaded(source, tuple(Row(value, Place(name, line), number) for line, value in taken))


def digest(source: Source, *, folder: Path, offline: bool) -> tuple[str, str]:
    """Return what a source is called where there are several, and the digest of what it holds.

    That of a file is of its bytes. That of the hub is of the rows asked for, as they lie on the
    disk: one id has several subsets and splits.

    Raises:
        LorakitError: as `load` does, but for what a file holds.
    """
    if not _is_hub_id(source.path, folder):
        path, _ = _file(source, folder)  # a pipe would never end
        return source.path, sha256_file(path)
    table = _from_hub(source, offline).with_format("arrow")[:]
    found = hashlib.sha256(table.schema.serialize())
    for batch in table.to_batches():
        found.update(batch.serialize())
    return " ".join(filter(None, (source.path, source.subset, source.split))), found.hexdigest()


def check_found(source: Source, folder: Path) -> None:
    """Check that a source that will be read later is there: a file of a kind that is known.

    Raises:
        BadInput: as `load` does.
    """
    if not _is_hub_id(source.path, folder):
        _file(source, folder)


def _is_hub_id(path: str, folder: Path) -> bool:
    """Tell whether a path is neither there nor named like a file, nor in a folder that is there."""
    found = any(os.path.exists(folder / one) for one in (path, path.partition("/")[0]))
    like_a_file = Path(path).suffix.lower() in (*_READERS, *_PACKED, ".py", ".txt")
    return not found and not like_a_file and bool(_HUB_ID.fullmatch(path))


def _file(source: Source, folder: Path) -> tuple[Path, Callable[[Path], Iterator[Numbered]]]:
    """Return the file of a source and its reader, which the name's ending chooses."""
    path = files.given(source.path, folder)
    ending = path.suffix.lower()
    if ending in _PACKED:
        raise BadInput(
            "data.compressed",
            f"the file is compressed ({ending})",
            where=str(path),
            help="unpack it first",
        )
    if ending not in _READERS:
        raise BadInput(
            "data.not-a-file",
            f"not a regular data file: expected a name that ends in {one_of(_READERS)}, "
            f"found '{printable(path.name)}'",
            where=str(path),
        )
    return path, _READERS[ending]


def _jsonl(path: Path) -> Iterator[Numbered]:
    return strict_json.read_lines(path, "data")


def _json(path: Path) -> Iterator[Numbered]:
    value = strict_json.read(path, "data", max_bytes=MAX_JSON_BYTES)
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise BadInput(
            "data.not-an-object",
            'expected a list of objects, or an object whose "data" is one',
            where=str(path),
            help="when the file has one object per line, give it a name that ends in .jsonl",
        )
    lines = _element_lines(path.read_text("utf-8-sig"))
    for line, row in zip(lines, rows, strict=True):
        if not isinstance(row, dict):
            found = strict_json.dumps_line(row)
            raise BadInput(
                "data.not-an-object",
                f"expected an object, found {printable(found, 30)}",
                where=Place(str(path), line),
            )
        yield line, row


def _element_lines(text: str) -> Iterator[int]:
    """Yield the line of each element of the list; the text is known to be well formed."""
    decode = json.JSONDecoder().raw_decode
    at = _skip(text, 0)
    if text[at] == "{":
        key, at = decode(text, _skip(text, at + 1))
        while key != "data":
            _, at = decode(text, _skip(text, at))
            key, at = decode(text, _skip(text, at))
        at = _skip(text, at)
    at = _skip(text, at + 1)
    line, counted = 1, 0
    while text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        yield line
        at = _skip(text, decode(text, at)[1])


def _skip(text: str, at: int) -> int:
    """Return where the next key or value begins."""
    while text[at] in " \t\r\n:,":
        at += 1
    return at


def _csv(path: Path) -> Iterator[Numbered]:
    with open_regular(path, "data") as file, storage_errors(path):
        content = file.read()
    if content.startswith(b"\x1f\x8b"):
        message = "the bytes are gzip (.gz), not text"
        raise BadInput("data.compressed", message, where=str(path), help="unpack it first")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        offset = error.start - content.rfind(b"\n", 0, error.start) - 1
        message = f"not UTF-8: byte offset {offset} of the line is 0x{content[error.start]:02x}"
        raise BadInput("data.encoding", message, where=Place(str(path), line)) from None
    if (at := text.find("\0")) >= 0:
        place = Place(str(path), text.count("\n", 0, at) + 1)
        raise BadInput("data.syntax", "a NUL byte, which no text holds", where=place)
    csv.field_size_limit(MAX_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            if cells and not header:
                header = _header(cells, Place(str(path), line))
            elif cells:
                if len(cells) != len(header):
                    message = f"{len(cells)} cells, the header has {len(header)}"
                    raise BadInput("data.syntax", message, where=Place(str(path), line))
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadInput("data.syntax", f"not CSV: {error}", where=Place(str(path), line)) from None


def _header(cells: list[str], where: Place) -> list[str]:
    twice = next((name for name in cells if cells.count(name) > 1), None)
    if twice is not None:
        message = f"two columns are called '{printable(twice)}'"
        raise BadInput("data.duplicate-key", message, where=where)
    return cells


def _parquet(path: Path) -> Iterator[Numbered]:
    # Half a second to import, for this kind of file alone; it comes with `datasets`.
    parquet = import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path, memory_map=False) as file:
            _check_expanded(file.metadata, path)
            rows = file.read().to_pylist()
    except (ValueError, OSError) as error:  # Arrow's own errors are subclasses
        message = f"not parquet: {printable(' '.join(str(error).split()), 200)}"
        raise BadInput("data.syntax", message, where=str(path)) from None
    yield from enumerate(rows, 1)


def _check_expanded(metadata: Any, path: Path) -> None:
    """Refuse a few bytes that stand for very much: repeated values cost nothing in the file.

    Raises:
        BadInput: `data.too-large`.
    """
    size = path.stat().st_size
    rows = metadata.num_rows
    expanded = sum(metadata.row_group(at).total_byte_size for at in range(metadata.num_row_groups))
    if rows > max(size, MOST_REPEATED_ROWS) or expanded > max(MOST_EXPANDED * size, MAX_BYTES):
        message = f"{size:,} bytes that stand for {rows:,} rows of {expanded:,} bytes"
        raise BadInput("data.too-large", message, where=str(path), help="write it as .jsonl")


_READERS: dict[str, Callable[[Path], Iterator[Numbered]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _from_hub(source: Source, offline: bool) -> Any:
    """Return the rows of a data set of the hub, at the split asked for."""
    if offline:
        raise EnvironmentLacks(
            "env.offline",
            f"'{source.path}' is no file here, and the hub cannot be reached offline",
            help="name a file (relative to the recipe), or run without --offline",
        )
    table = _hub_table(source.path, source.subset, source.split or "train")
    return table.select(range(min(len(table), source.max_samples or len(table))))


@lru_cache(maxsize=16)
def _hub_table(path: str, subset: str | None, split: str) -> Any:
    """Return a mapped data set of the hub, asked for once a process; scripts never run."""
    # A second to import, for hub ids alone.
    datasets = import_module("datasets")
    try:
        return datasets.load_dataset(path, subset, split=split)
    except ConnectionError as error:
        raise EnvironmentLacks("env.offline", printable(str(error), 300), where=path) from None
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        raise BadInput(
            "data.not-found",
            printable(str(error), 300),
            where=path,
            help="name a file (relative to the recipe), or a data set of the hub and its split",
        ) from None


def _needed(source: Source) -> int | None:
    """Return how many rows must be read; None means all, for a slice needs their number."""
    return None if source.split and "[" in source.split else source.max_samples


def _slice(source: Source, rows: int) -> slice:
    """Return the rows that `split` asks for; a file has one split, `train`, and no subset."""
    if source.subset is not None:
        raise BadInput(
            "recipe.conflict",
            f"subset: '{printable(source.subset)}' is for hub data sets; {source.path} is a file",
            help="take the key out; with --set, data.train.subset- does",
        )
    if source.split is None:
        return slice(None)
    match = _SPLIT.fullmatch(source.split)
    if match is None or match["name"] not in ("", "train"):
        raise BadInput(
            "recipe.bad-choice",
            f"split: a file has the split train alone, got '{printable(source.split)}'",
            help="write train[:100] or train[10%:20%], or name another file",
        )

    def position(text: str | None) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * rows / 100) if text.endswith("%") else int(text)

    return slice(position(match["from"]), position(match["to"]))
