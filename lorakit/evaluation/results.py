"""What an evaluation found: the metrics and answers of adapter and base, row by row."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.data.tokens import Prompt
from lorakit.errors import Place
from lorakit.evaluation.generation import Generation
from lorakit.evaluation.metrics import HIGHER_IS_BETTER, Tally, bootstrap
from lorakit.recipe.sections import GENERATED


@dataclass(frozen=True)
class Measured:
    """One model's metrics; `answers` is empty where no metric needs them."""

    metrics: Mapping[str, Tally]
    answers: Sequence[Generation]

    def marks(self, row: int) -> dict[str, bool]:
        """Return what the answer to one prompt counts for."""
        return {
            name: bool(self.metrics[name].parts[row]) for name in self.metrics if name in GENERATED
        }


@dataclass(frozen=True)
class Results:
    """Both measurements; `adapter` is None where only the base was measured.

    `rows` are the places of the rows that were scored, `prompts` what was answered.
    """

    adapter: Measured | None
    base: Measured
    rows: Sequence[Place]
    prompts: Sequence[Prompt]

    @property
    def main(self) -> Measured:
        """The measurement that the gates judge."""
        return self.adapter or self.base

    def worst(self, metric: str, count: int = 3) -> list[int]:
        """Return the rows that this metric is worst on, worst first, ties by index."""
        tally = self.main.metrics[metric]
        ratios = tally.parts / tally.weights
        descending = not HIGHER_IS_BETTER[metric]
        worst: list[int] = ratios.argsort(descending=descending, stable=True)[:count].tolist()
        return worst

    def facts(self, baseline: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        """Return every metric as JSON values; what is not a finite number is None."""
        return {
            name: {
                "adapter": finite(self.adapter.metrics[name].value) if self.adapter else None,
                "base": finite(base.value),
                "baseline": baseline.get(name),
                "stderr": finite(self.main.metrics[name].stderr),
                "n": base.n,
                "diff_ci95": _interval(self.adapter.metrics[name], base) if self.adapter else None,
                "higher_is_better": HIGHER_IS_BETTER[name],
            }
            for name, base in self.base.metrics.items()
        }

    def samples(self) -> list[dict[str, Any]]:
        """Return every generated row as JSON values."""
        ours = self.adapter
        return [
            {
                "id": row,
                "place": str(prompt.place),
                "prompt": prompt.text,
                "reference": prompt.reference,
                "output": ours.answers[row].text if ours else None,
                "base_output": answer.text,
                "scores": ours.marks(row) if ours else None,
                "base_scores": self.base.marks(row),
            }
            for row, (prompt, answer) in enumerate(
                zip(self.prompts, self.base.answers, strict=False)
            )
        ]


def finite(value: float) -> float | None:
    """Return the value where it is a finite number: JSON has no others."""
    return value if math.isfinite(value) else None


def _interval(adapter: Tally, base: Tally) -> list[float] | None:
    """Return the paired 95 % bootstrap interval of adapter minus base."""
    found = bootstrap(lambda rows: adapter.over(rows) - base.over(rows), adapter.n)
    ends: list[float] = found.quantile(torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    return ends if all(map(math.isfinite, ends)) else None
