"""The first check of a merge: the bytes that were written, against what is computed again."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakit.errors import CheckFailed
from lorakit.export.blocks import MergedTensors, Unit
from lorakit.model.weights import open_folder
from lorakit.threads import Threads


@dataclass(frozen=True)
class Written:
    """What reading the files again has shown: tensors in all, adapted ones, and those changed."""

    tensors: int
    adapted: int
    changed: int


def check_written(
    tensors: MergedTensors, folder: Path, threads: Threads, advance: Callable[[int], None]
) -> Written:
    """Open what was written, compute every block again and compare it bit for bit.

    `advance` hears how many bytes more are found equal.

    Raises:
        CheckFailed: `check.merge` when a tensor is missing, left over or different, and when
            nothing differs from the base although the adapter is not zero.
        RunFailed: `model.damaged` when a file's header is broken.
    """
    expected = [name for unit in tensors.units for name in unit.names.values()]
    changed: set[str] = set()
    with open_folder(folder) as found:
        if set(found.names) != set(expected):
            odd = sorted(set(found.names) ^ set(expected))
            raise CheckFailed("check.merge", f"the files do not hold what was merged: {odd[0]}")

        def check(piece: tuple[Unit, slice]) -> int:
            blocks = tensors.blocks(*piece)
            for block in blocks:
                if not _same(found.read(block.name, piece[1]), block.merged):
                    raise CheckFailed(
                        "check.merge",
                        f"{block.name}: {found.file_of[block.name]} does not hold what was "
                        f"merged, from row {block.row} on",
                        help="the disk or the memory is at fault: merge again, elsewhere",
                    )
                if (
                    piece[0].layer
                    and block.name not in changed
                    and not _same(block.base.to(block.merged.dtype), block.merged)
                ):
                    changed.add(block.name)
            return sum(block.merged.nbytes for block in blocks)

        pieces = ((unit, rows) for unit in tensors.units for rows in tensors.slices(unit))
        threads.each(check, pieces, advance)
    layers = [unit.layer for unit in tensors.units if unit.layer]
    adapted = sum(len(unit.names) for unit in tensors.units if unit.layer)
    if not changed and tensors.scale and not all(layer.untouched() for layer in layers):
        raise CheckFailed(
            "check.merge",
            f"none of {adapted} adapted tensors differs from the base although the adapter is not "
            "zero: its changes are lost in rounding",
            help="merge with --dtype fp32",
        )
    return Written(len(expected), adapted, len(changed))


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are the same to the bit; bytes are also compared the fastest."""
    x, y = (t.contiguous().reshape(-1).view(torch.uint8).numpy() for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and bool((x == y).all())
