"""Gates: bounds on metrics that decide the exit code of `eval`.

With `confidence` a bound must hold at that one-sided confidence: over 1,000 paired resamples of
the rows, all but that share keep the margin on the right side.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.errors import BadInput, CheckFailed, LorakitError, Place
from lorakit.evaluation.metrics import Tally, bootstrap
from lorakit.evaluation.results import finite
from lorakit.recipe.bounds import Bound, read_bound
from lorakit.recipe.origin import Origin
from lorakit.recipe.sections import Eval


@dataclass(frozen=True)
class Limit:
    """One bound of one metric, from a gate of the recipe, and where it stands there."""

    metric: str
    side: Literal["min", "max"]
    bound: Bound
    confidence: float | None
    place: Place

    def __str__(self) -> str:
        sure = f" at {self.confidence:.0%}" if self.confidence else ""
        return f"{self.side} {self.bound.text}{sure}"


@dataclass(frozen=True)
class Judgement:
    """What became of a limit; numbers that are not finite are None.

    `margin` is by how much the bound holds: at the asked confidence, else by the plain values.
    """

    gate: Limit
    limit: float | None
    value: float | None
    margin: float | None

    def __str__(self) -> str:
        limit = f" ({shown(self.limit)})" if self.gate.bound.reference else ""
        return f"{self.gate.metric} is {shown(self.value)}, its gate is {self.gate}{limit}"

    @property
    def computed(self) -> bool:
        return None not in (self.limit, self.value, self.margin)

    @property
    def passed(self) -> bool:
        return self.computed and self.margin is not None and self.margin >= 0


def limits(section: Eval, origin: Origin) -> tuple[Limit, ...]:
    """Return every bound of the recipe's gates."""
    return tuple(
        Limit(
            metric,
            side,
            read_bound(bound),
            gate.confidence,
            origin.place("eval", "gates", metric, side),
        )
        for metric, gate in section.gates.items()
        for side, bound in _sides(gate.min, gate.max)
        if bound is not None
    )


def judge(
    gates: Sequence[Limit],
    measured: Mapping[str, Tally],
    base: Mapping[str, Tally],
    baseline: Mapping[str, float],
) -> tuple[Judgement, ...]:
    """Compare what was measured with every limit. What is missing counts as not computed."""
    return tuple(
        _judge(gate, measured.get(gate.metric), base.get(gate.metric), baseline.get(gate.metric))
        for gate in gates
    )


def verdict(judgements: Sequence[Judgement]) -> LorakitError | None:
    """Return the error that the gates end the command with, None when all passed.

    A gate that was not computed is never a pass: it is wrong input (exit 2), before any gate that
    was missed (exit 1).
    """
    for one in judgements:
        if not one.computed:
            without = one.gate.bound.reference == "baseline" and one.limit is None
            return BadInput(
                "eval.not-computed",
                f"the gate {one.gate} on {one.gate.metric} cannot be judged: its value is "
                f"{shown(one.value)}, its limit {shown(one.limit)}",
                where=one.gate.place,
                help="give --baseline FILE with this metric"
                if without
                else "what is not a finite number never passes a gate",
            )
    missed = [one for one in judgements if not one.passed]
    if not missed:
        return None
    first = missed[0]
    return CheckFailed(
        "check.gate-missed",
        f"{len(missed)} of {len(judgements)} gates missed: {first}",
        where=first.gate.place,
    )


def shown(value: float | None) -> str:
    """Write a metric's value for people."""
    return "not known" if value is None else f"{value:.4g}" if abs(value) >= 10 else f"{value:.3f}"


def _judge(
    gate: Limit, measured: Tally | None, base: Tally | None, baseline: float | None
) -> Judgement:
    if measured is None:
        return Judgement(gate, None, None, None)
    known: dict[str, Any] = {} if baseline is None else {"baseline": baseline}

    def limit(rows: Tensor) -> Tensor:
        references = known if base is None else {**known, "base": base.over(rows)}
        return torch.as_tensor(gate.bound.limit(references), dtype=torch.float64)

    def margin(rows: Tensor) -> Tensor:
        over = measured.over(rows) - limit(rows)
        return over if gate.side == "min" else -over

    everything = torch.arange(measured.n)
    held = float(margin(everything))
    if gate.confidence and math.isfinite(held):
        held = float(bootstrap(margin, measured.n).quantile(1 - gate.confidence))
    return Judgement(gate, finite(float(limit(everything))), finite(measured.value), finite(held))


def _sides(
    least: float | str | None, most: float | str | None
) -> tuple[tuple[Literal["min", "max"], float | str | None], ...]:
    return ("min", least), ("max", most)
