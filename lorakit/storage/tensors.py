"""Safetensors files, read row by row without mapping them and written without a copy in memory.

A mapped file counts against memory limits and dies of SIGBUS when it shrinks; the library neither
syncs what it writes nor honours the umask (version 0.8). `header.py` has the format.
"""

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from lorakit.storage.disk import copy_all, create, require_space, storage_errors, write_all
from lorakit.storage.header import (
    PREFIX,
    Damage,
    ForeignDtype,
    Layout,
    header_length,
    layout,
    read_header,
)
from lorakit.storage.paths import file_error, open_regular

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ALL_ROWS = slice(None)
PIECE = 16 << 20  # bytes that are digested as one

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFile:
    """A safetensors file whose header was checked when it was opened.

    Args:
        path: the file.
        family: whose file it is, for the ids of its errors: `model`, `adapter`, `checkpoint`.

    Raises:
        LorakitError: `family.not-found` or `family.not-a-file`.
        RunFailed: `family.damaged` when the header does not describe the file's bytes exactly.
    """

    def __init__(self, path: Path, family: str) -> None:
        self.path = path
        self.family = family
        self._file = open_regular(path, family)
        try:
            with self._errors():
                self.layout, self.metadata = self._read_header()
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.layout.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.layout.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return DTYPES[self.layout.entries[name].dtype]

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """Return a tensor, or a run of its rows, in new memory; only those bytes are read.

        Raises:
            RunFailed: when the file has shrunk or the disk cannot read it.
        """
        entry = self.layout.entries[name]
        first, shape = 0, entry.shape
        if rows != ALL_ROWS:
            first, last, step = rows.indices(shape[0])
            if step != 1:
                raise ValueError("rows are read one after the other")
            shape = (max(0, last - first), *shape[1:])
        tensor = torch.empty(shape, dtype=DTYPES[entry.dtype])
        with self._errors():
            self._read_into(_bytes_of(tensor), entry.start + first * entry.row_bytes)
        # A BOOL byte on disk may be other than 0 or 1, which torch.bool must not hold.
        return tensor.view(torch.uint8) != 0 if entry.dtype == "BOOL" else tensor

    def copy(self, name: str, target: int, offset: int) -> None:
        """Copy a tensor's bytes to `offset` in an open file; they do not pass through memory.

        Raises:
            OSError: when the disk refuses.
        """
        entry = self.layout.entries[name]
        copy_all(self._file.fileno(), target, entry.start, entry.end, offset)

    def piece_sha256(self, start: int) -> str:
        """Return the digest of `PIECE` bytes of the file from `start` on, or of what is left.

        Raises:
            RunFailed: when the file has shrunk or the disk cannot read it.
        """
        piece = bytearray(min(PIECE, self.layout.size - start))
        with self._errors():
            self._read_into(memoryview(piece), start)
        return hashlib.sha256(piece).hexdigest()

    def close(self) -> None:
        """Close the file; tensors that were read stay."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_header(self) -> tuple[Layout, dict[str, str]]:
        size = os.fstat(self._file.fileno()).st_size
        if size < PREFIX:
            raise Damage(f"expected at least {PREFIX} bytes, found {size}")
        prefix = bytearray(PREFIX)
        self._read_into(memoryview(prefix), 0)
        text = bytearray(header_length(bytes(prefix), size))
        self._read_into(memoryview(text), PREFIX)
        entries, metadata = read_header(bytes(text), size)
        return Layout(bytes(prefix + text), entries), metadata

    def _read_into(self, target: memoryview, offset: int) -> None:
        while target:
            count = os.preadv(self._file.fileno(), [target], offset)
            if not count:
                raise Damage(f"the file ends at byte {offset:,}, {len(target):,} bytes early")
            target, offset = target[count:], offset + count

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with storage_errors(self.path):
                yield
        except ForeignDtype as found:
            # What weights are not, by their shape or their numbers, has one word in a model.
            kind = "shape-mismatch" if self.family.startswith("model") else "wrong-dtype"
            help = "save it again in one of these, or fetch it in one of them"
            raise file_error(
                self.family, kind, str(found), where=str(self.path), help=help
            ) from None
        except Damage as damage:
            help = "fetch or write the file again"
            raise file_error(
                self.family, "damaged", str(damage), where=str(self.path), help=help
            ) from None


class TensorWriter:
    """A new safetensors file whose layout is known first and whose rows come in any order.

    Threads may write at the same time. The header is written last, so that no reader takes half a
    file for a whole one; leaving the `with` block without `finish` removes the file.

    Args:
        path: the file, which must not exist; inside a folder that is being published.
        layout: of this file: `laid_out`, or that of another file.

    Raises:
        RunFailed: when the disk refuses, or has too little space for the whole file.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        self.size = layout.size
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in layout.entries}
        self._finished = False
        with storage_errors(path, self.size):
            require_space(path, self.size)
            self._descriptor = create(path)

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Write a tensor, or some of its rows from `row` on.

        Raises:
            RunFailed: when the disk refuses.
            ValueError: when shape, dtype or rows are not those announced.
        """
        entry = self.layout.entries[name]
        last = row + (tensor.shape[0] if tensor.dim() else 1)
        alike = tensor.dim() == len(entry.shape) and tensor.shape[1:] == entry.shape[1:]
        if tensor.dtype != DTYPES[entry.dtype] or not alike or not 0 <= row <= last <= entry.rows:
            got = f"{tuple(tensor.shape)} {tensor.dtype} from row {row}"
            raise ValueError(f"{name} is {entry.shape} {entry.dtype}, got {got}")
        self._written[name].append((row, last))
        with storage_errors(self.path, self.size):
            write_all(self._descriptor, _bytes_of(tensor), entry.start + row * entry.row_bytes)

    def copy(self, name: str, source: TensorFile) -> None:
        """Copy a whole tensor from another file; its bytes do not pass through memory.

        Raises:
            RunFailed: when the disk refuses.
            ValueError: when shape or dtype are not those announced.
        """
        entry, theirs = self.layout.entries[name], source.layout.entries[name]
        if (entry.shape, entry.dtype) != (theirs.shape, theirs.dtype):
            got = f"{theirs.shape} {theirs.dtype}"
            raise ValueError(f"{name} is {entry.shape} {entry.dtype}, got {got}")
        self._written[name].append((0, entry.rows))
        with storage_errors(self.path, self.size):
            source.copy(name, self._descriptor, entry.start)

    def finish(self) -> None:
        """Write the header and read it again; the folder's publication pushes it to the disk.

        Who wrote the tensors compares them; a metadata entry of the header nobody would miss.

        Raises:
            RunFailed: when the disk refuses, or holds another header than it was given.
            ValueError: when a row was not written, or twice.
        """
        for name, spans in self._written.items():
            row, rows = 0, self.layout.entries[name].rows
            for first, last in sorted(spans):
                if first != row:
                    raise ValueError(f"{name}: row {min(first, row)} was left out or written twice")
                row = last
            if row != rows:
                raise ValueError(f"{name}: {row} of {rows} rows were written")
        with storage_errors(self.path, self.size):
            write_all(self._descriptor, self.layout.header)
            if os.pread(self._descriptor, len(self.layout.header), 0) != self.layout.header:
                raise OSError(errno.EIO, "the header just written is not what the disk holds")
        self._finished = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        if not self._finished:
            self.path.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a new safetensors file, inside a folder that is being published.

    Raises:
        RunFailed: when the disk refuses.
    """
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with TensorWriter(path, laid_out(shapes, metadata)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()


def laid_out(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    metadata: Mapping[str, str] | None = None,
) -> Layout:
    """Return the layout of a new file with tensors of these shapes and dtypes.

    Args:
        shapes: shape and dtype of each tensor.
        metadata: texts for the header, beside `format`.
    """
    named = {name: (_NAMES[dtype], shape) for name, (shape, dtype) in shapes.items()}
    return layout(named, metadata or {})


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, row after row."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
