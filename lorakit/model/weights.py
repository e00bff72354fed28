"""A base's tensors as they are stored, read one by one without loading the model."""

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Protocol, Self

import torch
from torch import Tensor

from lorakit.errors import BadInput, RunFailed
from lorakit.storage import strict_json
from lorakit.storage.hashing import sha256_json
from lorakit.storage.paths import PICKLES, inside, refuse_pickle
from lorakit.storage.redact import printable
from lorakit.storage.tensors import ALL_ROWS, PIECE, TensorFile
from lorakit.threads import Threads

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SHARD = re.compile(r"[\w.-]+\.safetensors")
# transformers takes files of this name for a checkpoint of its own, and an adapter for a model.
_REFUSED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors|adapter_config\.json")
_POINTER = b"version https://git-lfs"
_SMALL = 1 << 20
_SAMPLES = 16


class TensorSource(Protocol):
    """Tensors by name: a file's, or what stands in for them."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """Return a tensor, or a run of its rows."""

    def close(self) -> None:
        """Close the file, if there is one."""


class Loaded:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self._tensors[name].dtype

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """Return a tensor, or a run of its rows."""
        return self._tensors[name][rows]

    def close(self) -> None:
        """Do nothing: there is no file."""


class Weights:
    """The tensors of a base over all its files, under the names that the files give them.

    `sources` maps the name of each file to what it holds, in the files' order; of two that hold a
    name the later one counts. What is `hidden` is no tensor of the model.
    """

    def __init__(self, sources: Mapping[str, TensorSource], hidden: Collection[str] = ()) -> None:
        self.sources = sources
        self.file_of = {name: file for file, source in sources.items() for name in source.names}
        for name in hidden:
            del self.file_of[name]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.file_of)

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(self.sources)

    @property
    def file_bytes(self) -> int:
        """The bytes of all files, headers included."""
        files = (file for file in self.sources.values() if isinstance(file, TensorFile))
        return sum(file.layout.size for file in files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, as it is stored."""
        return self.sources[self.file_of[name]].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype, as it is stored."""
        return self.sources[self.file_of[name]].dtype(name)

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """Return a tensor in new memory, or a run of its rows.

        Raises:
            RunFailed: when the file has changed or the disk cannot read it.
        """
        return self.sources[self.file_of[name]].read(name, rows)

    def stored_name(self, name: str) -> str | None:
        """Return what the files call a parameter of the model, None where they lack it.

        Files of a bare decoder (GPT-2's) leave out the first part of the path.
        """
        bare = name.partition(".")[2]
        return next((n for n in (name, bare) if n in self.file_of), None)

    def fingerprint(self) -> str:
        """Return a digest of the weights, whatever files they are in.

        Names, dtypes, shapes, all of small tensors and 16 rows of each large one: enough to tell
        a model from its fine-tuned children, in a fraction of the time that reading takes.
        """
        digest = hashlib.sha256()
        for name in sorted(self.names):
            shape, dtype = self.shape(name), self.dtype(name)
            digest.update(f"{name} {dtype} {list(shape)}\n".encode())
            for rows in _sampled(shape, dtype):
                stored = self.read(name, rows).reshape(-1).view(torch.uint8)
                digest.update(stored.numpy().tobytes())
        return digest.hexdigest()

    def sha256(self, threads: Threads) -> str:
        """Return a digest of every byte of the files, which threads read in pieces."""
        files = {name: file for name, file in self.sources.items() if isinstance(file, TensorFile)}
        pieces = [(n, at) for n, file in files.items() for at in range(0, file.layout.size, PIECE)]
        digests: dict[str, str] = {}
        threads.each(
            lambda piece: (f"{piece[0]} {piece[1]}", files[piece[0]].piece_sha256(piece[1])),
            pieces,
            lambda found: digests.update([found]),
        )
        return sha256_json(digests)

    def close(self) -> None:
        """Close the files; tensors that were read stay."""
        for source in self.sources.values():
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Unread:
    """A stored tensor that is read into new memory when transformers asks for all of it."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._weights, self._name = weights, name

    def __getitem__(self, everything: EllipsisType) -> Tensor:
        return self._weights.read(self._name)


def open_folder(folder: Path, *, links_into: Path | None = None) -> Weights:
    """Open the safetensors files of a model folder: one file, or those of its index.

    Args:
        folder: the model's folder.
        links_into: a cache in which the folder's links may end.

    Raises:
        BadInput: `security.path` or `security.pickle` for an entry that must not be opened,
            `model.bad-index` when index and files disagree, `model.not-found` without weights.
        RunFailed: `model.damaged` when a file's header does not describe its bytes.
    """
    refuse_disguises(folder)
    single, index = (inside(folder, name, links_into=links_into) for name in (SINGLE, INDEX))
    if single.is_file():
        return Weights({SINGLE: _open(single)})
    if not index.is_file():
        raise _no_weights(folder)
    placed = _weight_map(index)
    sources: dict[str, TensorSource] = {}
    try:
        for shard in dict.fromkeys(placed.values()):
            path = inside(folder, shard, links_into=links_into)
            if not path.is_file():
                message = f"the index names {shard}, which is not there"
                raise BadInput("model.bad-index", message, where=str(index))
            sources[shard] = _open(path)
        weights = Weights(sources)
        _check_index(weights, placed, index)
    except BaseException:
        for source in sources.values():
            source.close()
        raise
    return weights


def has_weights(folder: Path) -> bool:
    """Tell whether a folder has files that hold weights, or should not."""
    endings = (".safetensors", ".index.json", ".gguf", ".h5", ".msgpack", *PICKLES)
    return any(path.name.lower().endswith(endings) for path in folder.iterdir())


def refuse_disguises(folder: Path) -> None:
    """Refuse a folder with files that make transformers load something else than the model.

    Raises:
        BadInput: `model.bad-config`.
    """
    for path in sorted(folder.iterdir()):
        if _REFUSED.fullmatch(path.name):
            raise BadInput(
                "model.bad-config",
                f"the folder holds {path.name}: an adapter or a checkpoint, not only a model",
                where=str(path),
                help="give the folder of the base model, and the adapter on its own",
            )


def _open(path: Path) -> TensorFile:
    if path.stat().st_size < len(_POINTER) * 32 and path.read_bytes().startswith(_POINTER):
        raise RunFailed(
            "model.damaged",
            f"the file is a git-lfs pointer of {path.stat().st_size} bytes, not the weights",
            where=str(path),
            help="run `git lfs pull` where it was cloned",
        )
    return TensorFile(path, "model")


def _weight_map(index: Path) -> dict[str, str]:
    placed = strict_json.read_object(index, "model.bad-index").get("weight_map")
    if not isinstance(placed, dict) or not placed:
        message = "weight_map: expected a table of tensor names and files"
        raise BadInput("model.bad-index", message, where=str(index))
    for name, shard in placed.items():
        shown = printable(str(shard))
        if not isinstance(shard, str):
            message = f"weight_map: {printable(name)}: expected a file's name, found {shown}"
            raise BadInput("model.bad-index", message, where=str(index))
        if not _SHARD.fullmatch(shard):
            refuse_pickle(shard, index)
            outside = not re.fullmatch(r"[\w.-]+", shard) or shard in (".", "..")
            raise BadInput(
                "security.path" if outside else "security.pickle",
                f"weight_map: the entry '{shown}' "
                + ("could lead outside the folder" if outside else "is no .safetensors file"),
                where=str(index),
                help="only names of .safetensors files within the folder are opened",
            )
    return placed


def _check_index(weights: Weights, placed: Mapping[str, str], index: Path) -> None:
    held = sum(len(source.names) for source in weights.sources.values())
    if held != len(weights.names):
        raise BadInput("model.bad-index", "a tensor is in two files", where=str(index))
    for name, shard in placed.items():
        if weights.file_of.get(name) != shard:
            raise BadInput(
                "model.missing-tensor",
                f"{printable(name)} is missing from {shard}, where the index has it",
                where=str(index),
            )


def _no_weights(folder: Path) -> BadInput:
    found = sorted(path.name for path in folder.iterdir())
    if pickles := [name for name in found if Path(name).suffix.lower() in PICKLES]:
        return BadInput(
            "security.pickle",
            f"the weights are pickles ({pickles[0]}), which run code when they are loaded; "
            "expected model.safetensors",
            where=str(folder),
            help="convert them to .safetensors with the tool that wrote them",
        )
    return BadInput(
        "model.not-found",
        f"there is no {SINGLE} and no {INDEX} in the folder, only "
        f"{', '.join(map(printable, found[:8]))}",
        where=str(folder),
        help="fetch the model as .safetensors, or name a .gguf file itself",
    )


def _sampled(shape: tuple[int, ...], dtype: torch.dtype) -> list[slice]:
    size = dtype.itemsize
    for length in shape:
        size *= length
    if size <= _SMALL or shape[0] <= _SAMPLES:
        return [ALL_ROWS]
    rows = [k * (shape[0] - 1) // (_SAMPLES - 1) for k in range(_SAMPLES)]
    return [slice(row, row + 1) for row in rows]
