from pathlib import Path

import pytest
import torch

from lorakit.errors import BadInput, CheckFailed, Place
from lorakit.evaluation.gates import judge, limits, verdict
from lorakit.evaluation.metrics import Tally, from_marks
from lorakit.recipe.origin import Origin
from lorakit.recipe.sections import Eval, Gate


def origin() -> Origin:
    places = {("eval", "gates"): Place("r.yaml", 5), ("eval", "gates", "loss"): Place("r.yaml", 6)}
    return Origin(Path("r.yaml"), b"", places)


def gates(**by_metric: Gate):
    return limits(Eval(metrics=tuple(by_metric), gates=by_metric), origin())


def level(value: float, rows: int = 8) -> Tally:
    return Tally(torch.full((rows,), value, dtype=torch.float64), torch.ones(rows).double())


@pytest.mark.parametrize(
    ("gate", "value", "passed", "limit"),
    [
        (Gate(max=1.5), 1.5, True, 1.5),
        (Gate(max=1.5), 1.6, False, 1.5),
        (Gate(min=1.5), 1.5, True, 1.5),
        (Gate(min=1.5), 1.4, False, 1.5),
        (Gate(max="base"), 2.0, True, 2.0),
        (Gate(max="base - 5%"), 1.9, True, 1.9),
        (Gate(max="base - 5%"), 1.91, False, 1.9),
        (Gate(max="base - 0.5"), 1.6, False, 1.5),
        (Gate(max="base * 0.5"), 1.0, True, 1.0),
        (Gate(max="baseline + 2%"), 3.05, True, 3.06),
        (Gate(max="baseline + 2%"), 3.07, False, 3.06),
    ],
)
def test_bounds_with_base_2_and_baseline_3(gate, value, passed, limit):
    (one,) = judge(gates(loss=gate), {"loss": level(value)}, {"loss": level(2)}, {"loss": 3.0})
    assert one.passed is passed
    assert one.limit == pytest.approx(limit)
    assert one.value == value


def test_each_side_of_a_gate_is_judged_at_its_own_place():
    low, high = judge(gates(loss=Gate(min=1, max=2)), {"loss": level(3)}, {}, {})
    assert (low.passed, high.passed) == (True, False)
    assert high.gate.place == Place("r.yaml", 6)


def test_the_verdict_names_the_first_missed_gate():
    found = judge(
        gates(loss=Gate(max=1), stop_rate=Gate(min=0.5)),
        {"loss": level(2), "stop_rate": level(1)},
        {},
        {},
    )
    error = verdict(found)
    assert isinstance(error, CheckFailed)
    assert (error.id, error.exit_code) == ("check.gate-missed", 1)
    assert error.message == "1 of 2 gates missed: loss is 2.000, its gate is max 1"
    (relative,) = judge(
        gates(loss=Gate(max="base - 5%")), {"loss": level(3)}, {"loss": level(2)}, {}
    )
    assert str(relative) == "loss is 3.000, its gate is max base - 5% (1.900)"
    assert verdict(found[1:]) is None


@pytest.mark.parametrize(
    ("gate", "measured", "base"),
    [
        (Gate(max=9), {}, {}),
        (Gate(max=9), {"loss": level(float("nan"))}, {}),
        (Gate(min=1), {"loss": level(float("inf"))}, {}),
        (Gate(max="base"), {"loss": level(1)}, {}),
        (Gate(max="baseline"), {"loss": level(1)}, {"loss": level(1)}),
        (Gate(max=9, confidence=0.9), {"loss": level(float("nan"))}, {}),
    ],
)
def test_what_was_not_computed_is_never_a_pass(gate, measured, base):
    found = judge(gates(loss=gate), measured, base, {})
    assert not found[0].passed
    error = verdict(found)
    assert isinstance(error, BadInput)
    assert (error.id, error.exit_code) == ("eval.not-computed", 2)


def test_a_confident_bound_asks_more_of_few_rows_than_of_many():
    def passes(rows: int) -> bool:
        marks = from_marks([place % 10 < 7 for place in range(rows)])
        sure = gates(exact_match=Gate(min=0.6, confidence=0.95))
        return judge(sure, {"exact_match": marks}, {}, {})[0].passed

    assert not passes(10)
    assert passes(1000)


def test_confidence_against_the_base_is_paired_over_rows():
    """Rows differ a lot, the two models always by the same little: only pairs show it."""
    spread = torch.linspace(0, 100, 50, dtype=torch.float64)
    ones = torch.ones(50, dtype=torch.float64)
    sure = gates(loss=Gate(max="base", confidence=0.99))
    better, base = {"loss": Tally(spread - 0.01, ones)}, {"loss": Tally(spread, ones)}
    assert judge(sure, better, base, {})[0].passed
    assert not judge(sure, base, better, {})[0].passed


def test_a_confident_gate_passes_about_as_often_as_it_promises():
    """Rows whose true share lies exactly on the bound pass a 90 % gate in about 10 % of draws."""
    generator = torch.Generator().manual_seed(3)
    sure = gates(exact_match=Gate(min=0.5, confidence=0.9))
    draws = [torch.rand(60, generator=generator) < 0.5 for _ in range(100)]
    passed = [judge(sure, {"exact_match": from_marks(d.tolist())}, {}, {})[0].passed for d in draws]
    assert 2 <= sum(passed) <= 22
