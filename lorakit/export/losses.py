"""What merging costs an adapter that was trained on a base in 4 or 8 bits, on held-out rows.

Weights are read as they are used, and merged ones are computed then: nothing is written, and the
memory that this takes does not depend on the model's depth.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, get_args

from torch import Tensor

from lorakit.adapters import Layer, attach_layers, merge_layers
from lorakit.data.batches import eval_batches
from lorakit.data.tokens import Example
from lorakit.devices import resolve_dtype
from lorakit.export.blocks import MergedTensors
from lorakit.export.merge import MergePlan
from lorakit.export.target import open_target
from lorakit.model.base import skeleton
from lorakit.model.sites import find_sites
from lorakit.model.streamed import streamed
from lorakit.model.weights import Weights
from lorakit.recipe.sections import BaseWeights
from lorakit.runtime import Runtime
from lorakit.scoring import score
from lorakit.storage.tensors import ALL_ROWS
from lorakit.threads import Threads

TOKENS = 1 << 13  # that are measured at most
# Of one batch's logits. Each batch reads all weights, so there should be few.
LOGITS_BYTES = 512 << 20


@dataclass(frozen=True)
class Losses:
    """Loss a trained token over `rows` rows: before the merge, and after either.

    `trained` is that of the adapter on the base as training held it; `original` and `dequantised`
    name the weights that it is merged into. Weights that are stored quantised have no original.
    """

    rows: int
    trained: float
    original: float | None
    dequantised: float

    def facts(self) -> dict[str, Any]:
        """Return the numbers for `merge_report.json`."""
        return asdict(self)

    def __str__(self) -> str:
        told = [f"{self.trained:.4f} as trained"]
        if self.original is not None:
            told.append(f"{self.original:.4f} merged into the original weights")
        told.append(f"{self.dequantised:.4f} merged into the dequantised ones")
        counted = f"{self.rows:,} held-out {'row' if self.rows == 1 else 'rows'}"
        return f"loss {', '.join(told)} ({counted})"


class Merged:
    """Tensors that are merged when they are read."""

    def __init__(self, tensors: MergedTensors) -> None:
        self._tensors = tensors
        self._units = {name: unit for unit in tensors.units for name in unit.names.values()}
        self.shape, self.dtype = tensors.shape, tensors.dtype

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._units)

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """Return a tensor as it would be written, or a run of its rows."""
        unit = self._units[name]
        if unit.flipped and rows != ALL_ROWS:
            return self.read(name)[rows]
        blocks = self._tensors.blocks(unit, rows)
        return next(block.merged for block in blocks if block.name == name)

    def close(self) -> None:
        """Do nothing: the base's files belong to another."""


def few(rows: Iterable[Example]) -> list[Example]:
    """Return the first rows that have something to measure, as many as `TOKENS` suffice for."""
    chosen: list[Example] = []
    tokens = 0
    for row in rows:
        tokens += len(row.ids)
        if chosen and tokens > TOKENS:
            break
        if row.trained:
            chosen.append(row)
    return chosen


def measure(
    plan: MergePlan,
    rows: Sequence[Example],
    runtime: Runtime,
    advance: Callable[[int], None] = lambda _: None,
) -> Losses:
    """Compute the losses of an adapter before and after its merge into either kind of weights.

    `advance` hears how many rows more are done; each is gone over three times.

    Raises:
        RunFailed: `model.not-finite` when a merged number overflows.
    """
    saved, base, device = plan.saved, plan.base, runtime.device
    trained_in = "fp32" if (saved.passport or {}).get("dtype") == "float32" else "auto"
    budget = LOGITS_BYTES // (4 * base.config.get_text_config().vocab_size)

    def loss(weights: Weights, layers: Mapping[str, Layer]) -> float:
        compute: Any = {"dtype": resolve_dtype(trained_in, device), "threads": threads}
        model = streamed(base, weights, device=device, **compute)
        attach_layers(saved.method(), model, layers)
        nll = tokens = 0.0
        for batch in eval_batches(rows, budget, packing=False):
            for one in score(model, [batch]):
                nll, tokens = nll + one.nll, tokens + one.tokens
            advance(len(batch.rows))
        return nll / tokens

    with ExitStack() as stack:
        opened: dict[BaseWeights, Weights] = {plan.options.base_weights: plan.tensors.weights}
        for which in get_args(BaseWeights):
            if which not in opened and not (which == "original" and base.stored):
                opened[which] = stack.enter_context(open_target(saved, base, which))
        threads = stack.enter_context(Threads())
        # A GPU takes its layers away from the merge's, which are on the CPU.
        own = merge_layers(saved, find_sites(skeleton(base)))
        own = {name: layer.to(device) for name, layer in own.items()}
        trained = loss(opened["dequantised"], own)
        after = {
            which: loss(Weights({"merged": Merged(plan.tensors.over(weights))}), {})
            for which, weights in opened.items()
        }
    return Losses(len(rows), trained, after.get("original"), after["dequantised"])
