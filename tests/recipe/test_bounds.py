"""Bounds of gates."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.recipe.bounds import read_bound

AMOUNTS = st.floats(0, 1e6, allow_subnormal=False)


@given(AMOUNTS, st.floats(-1e3, 1e3))
def test_arithmetic(amount: float, value: float) -> None:
    references = {"base": value, "baseline": value + 1}
    assert read_bound(f"base + {amount!r}").limit(references) == value + amount
    assert read_bound(f"baseline - {amount!r}").limit(references) == value + 1 - amount
    assert read_bound(f"base*{amount!r}").limit(references) == value * amount
    assert read_bound(f"base - {amount!r}%").limit(references) == pytest.approx(
        value * (1 - amount / 100)
    )


def test_numbers_and_bare_references() -> None:
    assert read_bound(0.5).limit({}) == 0.5
    assert read_bound(" base ").limit({"base": 2.0}) == 2.0
    assert math.isnan(read_bound("baseline").limit({"base": 2.0}))


@pytest.mark.parametrize(
    "text",
    "0.5,bass,base +,base 5,base - x,base + 1 + 1,base * 5%,5% base,base - 1e999,base / 2,".split(
        ","
    ),
)
def test_what_is_no_bound(text: str) -> None:
    with pytest.raises(ValueError, match=r"base|finite"):
        read_bound(text)
