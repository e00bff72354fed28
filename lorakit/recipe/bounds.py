"""The bound of a gate: a number, or a reference changed by an amount.

`base` is the same model without its adapter, `baseline` the figure in a committed file; either
may be followed by `+ 0.02`, `- 5%` or `* 1.02`. A percentage is of the reference's value.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.storage.redact import printable

_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_BOUND = re.compile(rf"\s*(base|baseline)\s*(?:([+*-])\s*({_NUMBER})\s*(%)?)?\s*")


@dataclass(frozen=True)
class Bound:
    """Where a metric must stay: `amount` itself, or `reference` changed by `amount`."""

    text: str
    reference: Literal["base", "baseline"] | None
    operation: Literal["+", "*"]
    amount: float

    def limit(self, references: Mapping[str, float]) -> float:
        """Return the number that the bound means; NaN when its reference is absent."""
        if self.reference is None:
            return self.amount
        value = references.get(self.reference, math.nan)
        return value * self.amount if self.operation == "*" else value + self.amount


def read_bound(bound: float | str) -> Bound:
    """Read one bound.

    >>> read_bound("base - 5%").limit({"base": 2.0})
    1.9

    Raises:
        ValueError: when the text is no bound.
    """
    if not isinstance(bound, str):
        return Bound(f"{bound:g}", None, "+", bound)
    found = _BOUND.fullmatch(bound)
    if not found:
        raise ValueError(
            "expected a number, or base or baseline with + - * and %, such as base - 5%, "
            f"got '{printable(bound)}'"
        )
    reference: Any
    reference, sign, number, percent = found.groups()
    amount = float(number or 0)
    if not math.isfinite(amount):
        raise ValueError(f"expected a finite number, got {printable(number)}")
    if percent and sign == "*":
        raise ValueError(
            f"* and % do not go together in {bound!r}; write {reference} * {amount / 100:g}"
        )
    text = " ".join(part for part in (reference, sign, f"{number or ''}{percent or ''}") if part)
    signed = -amount if sign == "-" else amount
    if percent:
        return Bound(text, reference, "*", 1 + signed / 100)
    return Bound(text, reference, "*" if sign == "*" else "+", signed)
