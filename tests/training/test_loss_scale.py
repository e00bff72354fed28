"""The loss scale of fp16: halved by an overflow, doubled again after many finite steps."""

import pytest
import torch

from lorakit.training import loss_scale
from lorakit.training.loss_scale import DOUBLES_AFTER, LARGEST, LossScale

CPU = torch.device("cpu")


def follow(scale: LossScale, *, finite: int, then: int = 0) -> tuple[float, int]:
    """Let a scale see finite steps and then overflows; return its value and count."""
    for spoilt in [0.0] * finite + [1.0] * then:
        scale.update(torch.tensor(spoilt))
    return scale.value.item(), int(scale.finite_steps)


def test_it_doubles_after_finite_steps_in_a_row_and_never_leaves_its_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_scale, "DOUBLES_AFTER", 3)
    scale = LossScale(CPU, 8.0)
    assert follow(scale, finite=2, then=1) == (4.0, 0)
    assert follow(scale, finite=2) == (4.0, 2)
    assert follow(scale, finite=1) == (8.0, 0)
    assert follow(scale, finite=7) == (32.0, 1)
    assert follow(scale, finite=0, then=9) == (1.0, 0)
    assert follow(LossScale(CPU, LARGEST), finite=9) == (LARGEST, 0)


def test_single_overflows_do_not_use_it_up() -> None:
    """One in each 2,500 steps, more often than it has powers of two."""
    scale = LossScale(CPU, LARGEST, DOUBLES_AFTER - 1)
    values = {follow(scale, finite=DOUBLES_AFTER + 500, then=1)[0] for _ in range(20)}
    assert values == {LARGEST / 2}


def test_it_goes_on_where_it_was() -> None:
    one, other = LossScale(CPU, 4.0), LossScale(CPU, 4.0)
    value, count = follow(other, finite=DOUBLES_AFTER // 2)
    other = LossScale(CPU, value, count)
    assert follow(one, finite=DOUBLES_AFTER) == follow(other, finite=DOUBLES_AFTER // 2) == (8.0, 0)
