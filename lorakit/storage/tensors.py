"""Safetensors files, read row by row without mapping them and written without a copy in memory.

A mapped file counts against memory limits and dies of SIGBUS when it shrinks; the library neither
syncs what it writes nor honours the umask (version 0.8). `header.py` has the format.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from lorakit.storage.disk import create, require_space, storage_errors, write_all
from lorakit.storage.header import PREFIX, Damage, Entry, header_length, layout, read_header
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

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 8 << 20  # bytes


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
                self._entries, self.metadata = self._read_header()
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return DTYPES[self._entries[name].dtype]

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """Return a tensor, or a run of its rows, in new memory; only those bytes are read.

        Raises:
            RunFailed: when the file has shrunk or the disk cannot read it.
        """
        entry = self._entries[name]
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

    def close(self) -> None:
        """Close the file; tensors that were read stay."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        size = os.fstat(self._file.fileno()).st_size
        if size < PREFIX:
            raise Damage(f"expected at least {PREFIX} bytes, found {size}")
        prefix = bytearray(PREFIX)
        self._read_into(memoryview(prefix), 0)
        text = bytearray(header_length(bytes(prefix), size))
        self._read_into(memoryview(text), PREFIX)
        return read_header(bytes(text), size)

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
        except Damage as damage:
            help = "fetch or write the file again"
            raise file_error(
                self.family, "damaged", str(damage), where=str(self.path), help=help
            ) from None


class TensorWriter:
    """A new safetensors file whose shapes are known first and whose rows come in any order.

    The header is written last, so that no reader takes half a file for a whole one; leaving the
    `with` block without `finish` removes the file.

    Args:
        path: the file, which must not exist; inside a folder that is being published.
        shapes: shape and dtype of each tensor.
        metadata: texts for the header, beside `format`.

    Raises:
        RunFailed: when the disk refuses, or has too little space for the whole file.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        named = {name: (_NAMES[dtype], shape) for name, (shape, dtype) in shapes.items()}
        self._header, self._entries = layout(named, metadata or {})
        self.size = max((e.end for e in self._entries.values()), default=len(self._header))
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in self._entries}
        self._hash = hashlib.sha256(self._header)
        self._hashed = len(self._header)  # bytes, from the start of the file
        self._finished = False
        with storage_errors(path, self.size):
            require_space(path, self.size)
            self._descriptor = create(path)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors as they stand in the file: in this order nothing is read again."""
        return tuple(self._entries)

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Write a tensor, or some of its rows from `row` on.

        Raises:
            RunFailed: when the disk refuses.
            ValueError: when shape, dtype or rows are not those announced.
        """
        entry = self._entries[name]
        last = row + (tensor.shape[0] if tensor.dim() else 1)
        alike = tensor.dim() == len(entry.shape) and tensor.shape[1:] == entry.shape[1:]
        if tensor.dtype != DTYPES[entry.dtype] or not alike or not 0 <= row <= last <= entry.rows:
            got = f"{tuple(tensor.shape)} {tensor.dtype} from row {row}"
            raise ValueError(f"{name} is {entry.shape} {entry.dtype}, got {got}")
        self._written[name].append((row, last))
        data = _bytes_of(tensor.detach().cpu().contiguous())
        offset = entry.start + row * entry.row_bytes
        with storage_errors(self.path, self.size):
            write_all(self._descriptor, data, offset)
        if offset == self._hashed:  # what comes in order need not be read again
            self._hash.update(data)
            self._hashed += len(data)

    def finish(self) -> str:
        """Push the file to the disk and return its SHA-256.

        Raises:
            RunFailed: when the disk refuses.
            ValueError: when a row was not written, or twice.
        """
        for name, spans in self._written.items():
            row = 0
            for first, last in sorted(spans):
                if first != row:
                    raise ValueError(f"{name}: row {min(first, row)} was left out or written twice")
                row = last
            if row != self._entries[name].rows:
                raise ValueError(f"{name}: {row} of {self._entries[name].rows} rows were written")
        with storage_errors(self.path, self.size):
            write_all(self._descriptor, self._header)
            os.fsync(self._descriptor)
            while block := os.pread(self._descriptor, _BLOCK, self._hashed):
                self._hash.update(block)
                self._hashed += len(block)
        self._finished = True
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        if not self._finished:
            self.path.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a new safetensors file, hashed on the way, and return its SHA-256.

    Raises:
        RunFailed: when the disk refuses.
    """
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with TensorWriter(path, shapes, metadata) as writer:
        for name in writer.names:
            writer.write(name, tensors[name])
        return writer.finish()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
