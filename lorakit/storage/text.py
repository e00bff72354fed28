"""Bytes of a stranger as text: strictly UTF-8, bounded, and a packed file named for what it is."""

from pathlib import Path

from lorakit.errors import LorakitError, Place
from lorakit.storage.disk import storage_errors
from lorakit.storage.paths import file_error, open_regular

MAX_BYTES = 64 << 20
BOM = b"\xef\xbb\xbf"

_PACKED = {
    b"\x1f\x8b": "gzip (.gz)",
    b"\x28\xb5\x2f\xfd": "zstd (.zst)",
    b"\xfd7zXZ": "xz (.xz)",
    b"BZh": "bzip2 (.bz2)",
    b"PK\x03\x04": "zip (.zip)",
}


def read_text(path: Path, family: str, *, max_bytes: int = MAX_BYTES) -> str:
    """Return the text of a file, without a BOM.

    Raises:
        LorakitError: the family's error when it is missing, no regular file, too large, packed or
            not UTF-8.
        RunFailed: when the disk refuses.
    """
    with open_regular(path, family) as file, storage_errors(path):
        content = file.read(max_bytes + 1)
    where = Place(str(path))
    _refuse_packed(content, where, family)
    if len(content) > max_bytes:
        raise too_large("the file", max_bytes, where, family)
    return decode(content.removeprefix(BOM), where, family)


def decode(content: bytes, place: Place, family: str) -> str:
    """Return bytes that begin at `place` as text.

    Raises:
        LorakitError: the family's error, with line and column, when they are packed or not UTF-8.
    """
    _refuse_packed(content, place, family)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        offset = error.start - content.rfind(b"\n", 0, error.start) - 1
        message = f"not UTF-8: byte offset {offset} of the line is 0x{content[error.start]:02x}"
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            message += ", which begins UTF-16"
        where = place_after(content[: error.start].decode(), place)
        raise file_error(family, "encoding", message, where=where) from None


def place_after(before: str, place: Place) -> Place:
    """Return the place of what follows the text `before`, which begins a line at `place`."""
    line = (place.line or 1) + before.count("\n")
    return Place(place.file, line, len(before) - before.rfind("\n"))


def too_large(what: str, limit: int, where: Place, family: str) -> LorakitError:
    """Return the error of something longer than `limit` bytes."""
    size = f"{limit >> 20} MiB" if limit >> 20 else f"{limit:,} bytes"
    return file_error(family, "too-large", f"{what} is longer than {size}", where=where)


def _refuse_packed(content: bytes, place: Place, family: str) -> None:
    if content.startswith(tuple(_PACKED)):
        name = next(name for magic, name in _PACKED.items() if content.startswith(magic))
        message, help = f"the bytes are {name}, not text", "unpack the file first"
        raise file_error(family, "compressed", message, where=place, help=help)
