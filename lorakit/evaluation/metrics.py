"""Metrics as sums per row: a value is always total over total, never a mean of means."""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor

from lorakit.scoring import RowScore

HIGHER_IS_BETTER = {
    "loss": False,
    "perplexity": False,
    "token_accuracy": True,
    "exact_match": True,
    "json_valid": True,
    "stop_rate": True,
}
RESAMPLES = 1000
DRAWN_AT_ONCE = 1 << 20  # row indices
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]*\.?[0-9]+)")


@dataclass(frozen=True)
class Tally:
    """One metric over the rows: the value is `sum(parts) / sum(weights)`, or e to that power.

    `parts` and `weights` are float64 of shape (rows,).
    """

    parts: Tensor
    weights: Tensor
    exponential: bool = False

    @property
    def n(self) -> int:
        return len(self.parts)

    @property
    def value(self) -> float:
        return float(self.over(torch.arange(self.n)))

    @property
    def stderr(self) -> float:
        """Standard error of the ratio of two totals (delta method); 0 for a single row."""
        ratio = self.parts.sum() / self.weights.sum()
        residual = (self.parts - ratio * self.weights).square().sum() * self.n / max(1, self.n - 1)
        error = float(residual.sqrt() / self.weights.sum())
        return error * self.value if self.exponential else error

    def over(self, rows: Tensor) -> Tensor:
        """Return the value over these rows: indices (..., rows), repeats allowed."""
        ratio = self.parts[rows].sum(-1) / self.weights[rows].sum(-1)
        return ratio.exp() if self.exponential else ratio


def bootstrap(statistic: Callable[[Tensor], Tensor], rows: int) -> Tensor:
    """Return a statistic over 1,000 resamples of the rows, always the same ones: (resamples,).

    Rows are drawn once for everything inside `statistic`, so that differences are paired.
    """
    generator = torch.Generator().manual_seed(0)
    at_once = max(1, DRAWN_AT_ONCE // rows)
    sizes = (min(at_once, RESAMPLES - done) for done in range(0, RESAMPLES, at_once))
    draws = (torch.randint(rows, (size, rows), generator=generator) for size in sizes)
    return torch.cat([statistic(draw) for draw in draws])


def from_scores(name: str, scores: Sequence[RowScore]) -> Tally:
    """Return `loss`, `perplexity` or `token_accuracy` over trained tokens."""
    parts = [score.hits if name == "token_accuracy" else score.nll for score in scores]
    return Tally(_column(parts), _column(s.tokens for s in scores), name == "perplexity")


def from_marks(marks: Sequence[bool]) -> Tally:
    """Return the share of rows that are marked."""
    return Tally(_column(marks), torch.ones(len(marks), dtype=torch.float64))


def matches(output: str, reference: str, normalize: Iterable[str]) -> bool:
    """Say whether two texts are equal after the named normalisations, applied in this order.

    >>> matches("It costs $1,250.00.", "#### 1250", ["number"])
    True
    >>> matches('{"b": 1.0, "a": true}', '{"a":true,"b":1}', ["json"])
    True
    """
    for name in normalize:
        output, reference = NORMALIZATIONS[name](output), NORMALIZATIONS[name](reference)
    return output == reference


def is_json(text: str) -> bool:
    """Say whether a text is one JSON value by RFC 8259: NaN and Infinity are not JSON."""
    try:
        _parse_json(text)
    except (ValueError, RecursionError):
        return False
    return True


def _column(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def _without_punctuation(text: str) -> str:
    kept = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
    return " ".join(kept.split())


def _last_number(text: str) -> str:
    """Keep the last number, written plainly; a text without one stays as it is."""
    found = NUMBER.findall(text)
    if not found:
        return text
    value = Decimal(found[-1].replace(",", ""))
    plain = f"{value:f}" if value else "0"
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def _canonical_json(text: str) -> str:
    """Write a JSON value in one way, keys sorted; a text that is no JSON stays as it is."""
    try:
        return json.dumps(_parse_json(text), sort_keys=True)
    except (ValueError, RecursionError):
        return text


def _parse_json(text: str) -> object:
    return json.loads(text, parse_float=_json_float, parse_constant=_refuse)


def _json_float(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


NORMALIZATIONS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "casefold": str.casefold,
    "punctuation": _without_punctuation,
    "number": _last_number,
    "json": _canonical_json,
}
