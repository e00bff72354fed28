"""The header of a safetensors file: which bytes belong to which tensor.

The format (huggingface.co/docs/safetensors): 8 bytes with the header's length, little-endian; the
header, JSON `{name: {dtype, shape, data_offsets}, "__metadata__": {text: text}}`; then the bytes of
the tensors without gaps, their offsets counted from the header's end.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lorakit.errors import LorakitError, Place, one_of
from lorakit.storage import strict_json
from lorakit.storage.redact import printable

MAX_HEADER = 16 << 20  # bytes
MAX_TENSORS = 65_536
WIDTHS = {  # bytes of one element
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
# Others that the format knows: whole files, of which lorakit reads no tensor.
_FOREIGN = frozenset(
    "F4 F6_E2M3 F6_E3M2 F8_E4M3 F8_E4M3FNUZ F8_E5M2 F8_E5M2FNUZ F8_E8M0 U16 U32 U64 C64".split()
)
PREFIX = 8  # bytes before the header

_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = 2**60  # times 8 bytes: a file's offsets are 63 bits


class Damage(Exception):
    """What is wrong with the bytes of a file, as yet without its name."""


class ForeignDtype(Damage):
    """A tensor of a file that is whole, in a dtype that lorakit does not read."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: what it is, and which bytes of the file it takes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * WIDTHS[self.dtype]


class Layout(NamedTuple):
    """What a file begins with, up to the data, and where each tensor's bytes go."""

    header: bytes
    entries: dict[str, Entry]

    @property
    def size(self) -> int:
        return max((entry.end for entry in self.entries.values()), default=len(self.header))


def header_length(prefix: bytes, size: int) -> int:
    """Return the header's length in bytes, from the first 8 bytes of a file of `size` bytes.

    Raises:
        Damage: when the header does not fit in the file, or is too long.
    """
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise Damage(f"expected a header of at most {MAX_HEADER:,} bytes, found {length:,}")
    if size < PREFIX + length:
        raise Damage(f"expected at least {PREFIX + length:,} bytes, found {size:,}")
    return length


def read_header(text: bytes, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the tensors and the metadata that a header names, for a file of `size` bytes.

    Raises:
        Damage: when they do not tile the file exactly, or anything about them is not plain.
    """
    if not text.startswith(b"{"):
        raise Damage("the header is no JSON object")
    try:
        header = strict_json.parse(text, Place("header"), "checkpoint")
    except LorakitError as error:
        raise Damage(f"bad header: {error.message}") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Damage("the header's metadata is no table of texts")
    if len(header) > MAX_TENSORS:
        raise Damage(f"expected at most {MAX_TENSORS:,} tensors, found {len(header):,}")
    data = PREFIX + len(text)
    entries = {name: _entry(name, value, data) for name, value in header.items()}
    _check_tiling(entries, data, size)
    return entries, metadata


def layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Layout:
    """Return how a new file is laid out.

    Args:
        tensors: dtype and shape of each.
        metadata: texts beside `format`.

    Raises:
        ValueError: when `read_header` would refuse the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    # Wide dtypes first, as the library does: each tensor then begins at a multiple of its width.
    for name in sorted(tensors, key=lambda name: (-WIDTHS[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        start, offset = offset, offset + math.prod(shape) * WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, offset]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        entries, _ = read_header(text, PREFIX + len(text) + offset)
        header_length(prefix := len(text).to_bytes(PREFIX, "little"), PREFIX + len(text))
    except Damage as damage:
        raise ValueError(str(damage)) from None
    return Layout(prefix + text, entries)


def _entry(name: str, value: Any, data: int) -> Entry:
    """Return an entry of the header; `data` is the byte at which the tensors begin."""
    shown = f"tensor {printable(name)}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise Damage(f"{shown} has no dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if isinstance(dtype, str) and dtype in _FOREIGN:
        raise ForeignDtype(f"{printable(name, 200)} is {dtype}; expected F32, F16 or BF16")
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise Damage(f"{shown} has dtype {printable(str(dtype), 20)}, not {one_of(WIDTHS)}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise Damage(f"{shown} has a shape or offsets that are no counts")
    if len(shape) > _MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
        raise Damage(f"{shown} has an impossible shape")
    start, end = offsets
    size = math.prod(shape) * WIDTHS[dtype]
    if end - start != size:
        raise Damage(f"{shown} needs {size:,} bytes, found {end - start:,}")
    return Entry(dtype, tuple(shape), data + start, data + end)


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


def _check_tiling(entries: Mapping[str, Entry], data: int, size: int) -> None:
    expected = max((entry.end for entry in entries.values()), default=data)
    if size != expected:
        raise Damage(f"expected {expected:,} bytes, found {size:,}")
    end = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            what = "overlaps another" if entry.start < end else "follows a hole"
            raise Damage(f"tensor {printable(name)} {what}")
        end = entry.end
