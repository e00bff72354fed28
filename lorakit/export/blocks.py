"""The merged tensors, block by block: what `merge` writes and what its check computes again."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.adapters import Layer
from lorakit.errors import BadInput, RunFailed
from lorakit.model.sites import Site
from lorakit.model.weights import Weights
from lorakit.storage.tensors import ALL_ROWS, TensorFile

# Of one block in fp32. A few of these fit in a core's cache, and the allocator hands the same
# memory out again; that of large blocks it returns to the kernel, which clears it anew each time
# (measured on a 2.2 GB base: 31 s of the kernel's time at 64 MiB, 4 s at 1 MiB).
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Unit:
    """Stored tensors that are computed together: those of one adapted module, or one other.

    `names` maps `weight` and `bias` to what the files call them; a tensor that is only copied
    stands under its own name. `flipped` says that the weight is stored as (inputs, outputs).
    """

    names: Mapping[str, str]
    layer: Layer | None = None
    flipped: bool = False


@dataclass(frozen=True)
class Block:
    """Rows of one tensor from `row` on: merged, in the output's dtype, and as the base has them."""

    name: str
    row: int
    merged: Tensor
    base: Tensor


class MergedTensors:
    """What the merged model's tensors are: a pure function of the base's files and the layers.

    Args:
        weights: the base's tensors.
        layers: the adapter's layers, by the module that they change.
        sites: the places of the model; conv1d ones are stored the other way round.
        dtype: of every floating-point tensor; None keeps each one's own.
        scale: how much of the adapter's change is merged; 1 is all of it.

    Raises:
        BadInput: `model.missing-tensor` when a layer finds no tensor to change,
            `adapter.not-mergeable` when it finds one that holds no floating-point numbers.
    """

    def __init__(
        self,
        weights: Weights,
        layers: Mapping[str, Layer],
        sites: Sequence[Site],
        *,
        dtype: torch.dtype | None = None,
        scale: float = 1.0,
    ) -> None:
        self.weights, self.layers, self.scale, self._dtype = weights, layers, scale, dtype
        self._sites = sites
        self.units = _units(weights, layers, sites)

    def over(self, weights: Weights) -> "MergedTensors":
        """Return the same merge into other weights of the same model."""
        dtype, scale = self._dtype, self.scale
        return MergedTensors(weights, self.layers, self._sites, dtype=dtype, scale=scale)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, which is the base's."""
        return self.weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is written in."""
        own = self.weights.dtype(name)
        return self._dtype if self._dtype and own.is_floating_point else own

    def size(self, name: str) -> int:
        """Return how many numbers a tensor holds."""
        return math.prod(self.shape(name))

    def bytes(self, unit: Unit) -> int:
        """Return how many bytes a unit takes in the output."""
        return sum(self.size(name) * self.dtype(name).itemsize for name in unit.names.values())

    def copied_from(self, unit: Unit) -> TensorFile | None:
        """Return the file whose bytes are a tensor's that nothing changes, None for any other."""
        name, *_ = unit.names.values()
        if unit.layer or self.dtype(name) != self.weights.dtype(name):
            return None
        source = self.weights.sources[self.weights.file_of[name]]
        return source if isinstance(source, TensorFile) else None

    @torch.no_grad()
    def blocks(self, unit: Unit, rows: slice) -> list[Block]:
        """Return rows of a unit's tensors; threads may ask for others at the same time.

        Raises:
            RunFailed: `model.not-finite` when a number overflows, by merging or by rounding.
        """
        base = {part: self.weights.read(name, rows) for part, name in unit.names.items()}
        merged = self._merged(unit, base, rows)
        blocks = []
        for part, name in unit.names.items():
            dtype = self.dtype(name)
            block = Block(name, rows.start or 0, merged[part].to(dtype), base[part])
            if (unit.layer or dtype != base[part].dtype) and dtype.is_floating_point:
                _check_finite(block, merged[part])
            blocks.append(block)
        return blocks

    def _merged(self, unit: Unit, base: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
        if unit.layer is None:
            return base
        merged = _flip(unit, unit.layer.merged(_flip(unit, base), rows))
        if self.scale != 1:
            merged = {
                part: torch.lerp(base[part].to(tensor.dtype), tensor, self.scale)
                for part, tensor in merged.items()
            }
        return merged

    def slices(self, unit: Unit) -> Iterator[slice]:
        """Yield rows that fit into a block; a flipped weight's outputs are no rows: all at once."""
        first, *_ = unit.names.values()
        shape = self.shape(first)
        if unit.flipped or not shape:
            yield ALL_ROWS
            return
        step = max(1, BLOCK_BYTES // (4 * max(1, math.prod(shape[1:]))))
        for start in range(0, shape[0], step):
            yield slice(start, min(start + step, shape[0]))


def _units(
    weights: Weights, layers: Mapping[str, Layer], sites: Sequence[Site]
) -> tuple[Unit, ...]:
    """Return every stored tensor exactly once, in the files' order."""
    known = {site.name: site for site in sites}
    owner: dict[str, Unit] = {}
    for module, layer in layers.items():
        site = known[module]
        found = {part: weights.stored_name(f"{module}.{part}") for part in ("weight", "bias")}
        names = {part: name for part, name in found.items() if name is not None}
        if "weight" not in names:
            # Of two modules that share a weight, the files may hold one.
            if site.tied is None or weights.stored_name(f"{site.tied}.weight") is None:
                raise BadInput(
                    "model.missing-tensor",
                    f"the base's files hold no {module}.weight, which the adapter changes",
                )
            continue
        for name in names.values():
            if not weights.dtype(name).is_floating_point:
                raise BadInput(
                    "adapter.not-mergeable",
                    f"{name} is stored as {weights.dtype(name)}: the base is quantised",
                    help="merge into what it was made from with --base ID_OR_DIR, or into what it "
                    "holds with --base-weights dequantised",
                )
        unit = Unit(names, layer, site.kind == "conv1d")
        owner |= dict.fromkeys(names.values(), unit)
    units: list[Unit] = []
    placed: set[str] = set()
    for name in weights.names:
        if name not in placed:
            units.append(owner.get(name) or Unit({"": name}))
            placed.update(units[-1].names.values())
    return tuple(units)


def _flip(unit: Unit, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a weight that is stored as (inputs, outputs) around."""
    if not unit.flipped:
        return dict(tensors)
    return {**tensors, "weight": tensors["weight"].t()}


def _check_finite(block: Block, wide: Tensor) -> None:
    """Check a block by its extremes before rounding: finding them costs far less than asking each.

    A NaN is handed on, and is not within the limits.
    """
    limit = torch.finfo(block.merged.dtype).max
    low, high = (end.item() for end in wide.aminmax()) if wide.numel() else (0.0, 0.0)
    if -limit <= low and high <= limit:
        return
    if wrong := int((~block.merged.isfinite()).sum()):
        raise RunFailed(
            "model.not-finite",
            f"{block.name}: {wrong} of {block.merged.numel()} merged numbers from row {block.row} "
            f"on are not finite as {str(block.merged.dtype).removeprefix('torch.')}",
            help="nothing was written; --dtype bf16 or fp32 holds larger numbers than fp16",
        )
