"""The files of a merged model: which tensor goes where, and how they are written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.export.blocks import MergedTensors, Unit
from lorakit.model.weights import INDEX, SINGLE
from lorakit.storage import strict_json
from lorakit.storage.disk import storage_errors
from lorakit.storage.header import Layout
from lorakit.storage.tensors import ALL_ROWS, TensorFile, TensorWriter, laid_out
from lorakit.threads import Threads


@dataclass(frozen=True)
class Shard:
    """One file before it is written: its units, and which bytes are whose."""

    units: Sequence[Unit]
    layout: Layout


def planned_shards(tensors: MergedTensors, limit: int) -> dict[str, Shard]:
    """Return what goes into which file.

    Where no dtype changes and the base's files are small enough, the new ones are laid out as
    they are: to the byte, so that a file system that can share blocks shares what is copied.
    Else files are filled up to `limit` bytes; a unit that is larger has a file of its own.
    """
    if kept := _as_in_base(tensors, limit):
        return kept
    groups: list[list[Unit]] = []
    size = limit
    for unit in tensors.units:
        size += tensors.bytes(unit)
        if size > limit:
            groups.append([])
            size = tensors.bytes(unit)
        groups[-1].append(unit)
    count = len(groups)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    return {
        name: Shard(group, _layout(tensors, group))
        for name, group in zip(names if count > 1 else [SINGLE], groups, strict=True)
    }


def write_shard(
    tensors: MergedTensors,
    path: Path,
    shard: Shard,
    threads: Threads,
    advance: Callable[[int], None],
) -> None:
    """Write one file; `advance` hears how many bytes more are written.

    Raises:
        RunFailed: `model.not-finite`, or when the disk refuses.
    """

    def write(piece: tuple[Unit, slice]) -> int:
        unit, rows = piece
        if source := tensors.copied_from(unit):
            (name,) = unit.names.values()
            writer.copy(name, source)
            return tensors.bytes(unit)
        blocks = tensors.blocks(unit, rows)
        for block in blocks:
            writer.write(block.name, block.merged, block.row)
        return sum(block.merged.nbytes for block in blocks)

    pieces = (
        (unit, rows)
        for unit in shard.units
        for rows in ([ALL_ROWS] if tensors.copied_from(unit) else tensors.slices(unit))
    )
    with TensorWriter(path, shard.layout) as writer:
        threads.each(write, pieces, advance)
        writer.finish()


def write_index(shards: Mapping[str, Shard], folder: Path, total: int) -> None:
    """Write which tensor is in which file, where there are several; `total` is their bytes."""
    if len(shards) == 1:
        return
    files = {name: file for file, shard in shards.items() for name in shard.layout.entries}
    index = {"metadata": {"total_size": total}, "weight_map": files}
    with storage_errors(folder):
        (folder / INDEX).write_text(strict_json.dumps(index), encoding="utf-8")


def _as_in_base(tensors: MergedTensors, limit: int) -> dict[str, Shard] | None:
    """Return the base's own files; None when the result is no such set of files."""
    weights = tensors.weights
    units: dict[str, list[Unit]] = {file: [] for file in weights.files}
    for unit in tensors.units:
        files = {weights.file_of[name] for name in unit.names.values()}
        if len(files) > 1 or any(
            tensors.dtype(name) != weights.dtype(name) for name in unit.names.values()
        ):
            return None
        units[files.pop()].append(unit)
    shards = {}
    for file, source in weights.sources.items():
        if not isinstance(source, TensorFile) or sum(map(tensors.bytes, units[file])) > limit:
            return None
        shards[file] = Shard(units[file], source.layout)
    return shards


def _layout(tensors: MergedTensors, units: Sequence[Unit]) -> Layout:
    names = [name for unit in units for name in unit.names.values()]
    return laid_out({name: (tensors.shape(name), tensors.dtype(name)) for name in names})
