"""The schedule's laws, the flat gradients, and the gate that keeps a spoilt step out."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lorakit.errors import RunFailed
from lorakit.recipe.sections import Train
from lorakit.training import optim

SCHEDULES = st.sampled_from(["cosine", "linear", "constant", "wsd"])


@given(SCHEDULES, st.integers(1, 400), st.one_of(st.floats(0, 0.99), st.integers(1, 500)))
def test_the_rate_is_positive_and_at_most_the_highest_in_every_step(
    schedule: str, steps: int, warmup: float
) -> None:
    section = Train(schedule=schedule, warmup=float(warmup))
    rates = [optim.factor(section, step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    rising = min(optim.warmup_steps(section, steps), steps)
    assert rates[:rising] == sorted(rates[:rising])
    assert rates[rising:] == sorted(rates[rising:], reverse=True)


@given(SCHEDULES, st.integers(10, 300))
def test_warm_up_ends_at_the_highest_rate(schedule: str, steps: int) -> None:
    section = Train(schedule=schedule, warmup=5.0)
    assert optim.factor(section, 4, steps) == 1.0


def two_tensors() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in (("A", (3, 4)), ("m", (5,)))
    }


def test_gradients_are_views_of_one_buffer() -> None:
    named = two_tensors()
    gradients = optim.Gradients(named)
    (named["A"].sum() * 2 + named["m"].sum() * 3).backward()
    assert torch.equal(gradients.flat, torch.cat([torch.full((12,), 2.0), torch.full((5,), 3.0)]))
    gradients.zero()
    assert named["A"].grad is not None
    assert not named["A"].grad.any()


def test_clipping_equals_torchs_own() -> None:
    named, reference = two_tensors(), two_tensors()
    gradients = optim.Gradients(named)
    for parameters in (named, reference):
        (parameters["A"].pow(2).sum() * 50 + parameters["m"].sum()).backward()
    norm = gradients.clip(0.7)
    expected = nn.utils.clip_grad_norm_(reference.values(), 0.7)
    torch.testing.assert_close(norm, expected)
    for name in named:
        torch.testing.assert_close(named[name].grad, reference[name].grad)


def test_a_parameter_without_gradient_is_named() -> None:
    named = two_tensors()
    watch = optim.Gradients(named).watch()
    named["A"].sum().backward()
    with pytest.raises(RunFailed, match=r"m$") as caught:
        watch.finish()
    assert caught.value.id == "run.no-gradient"


def test_a_spoilt_step_changes_neither_weights_nor_moments() -> None:
    named = two_tensors()
    gradients = optim.Gradients(named)
    optimizer = optim.build(Train(), [{"params": list(named.values())}])
    named["A"].pow(2).sum().backward()
    optim.finite_gate(optimizer, torch.tensor(0.0))
    optimizer.step()
    names = {parameter: name for name, parameter in named.items()}
    before = copy.deepcopy([*named.values(), *optim.state_tensors(optimizer, names).values()])
    gradients.flat.fill_(float("nan"))
    optim.finite_gate(optimizer, torch.tensor(1.0))
    optimizer.step()
    after = [*named.values(), *optim.state_tensors(optimizer, names).values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    gradients.zero()
    optim.finite_gate(optimizer, torch.tensor(0.0))
    optimizer.step()
    assert not torch.equal(before[0], named["A"])


def test_optimizer_state_survives_a_round_trip_bit_for_bit() -> None:
    def run(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> None:
        gradients = optim.Gradients(named)
        for _ in range(steps):
            gradients.zero()
            sum(p.pow(3).sum() for p in named.values()).backward()
            optimizer.step()

    whole = two_tensors()
    run(whole, optim.build(Train(), [{"params": list(whole.values())}]), 5)

    halved = two_tensors()
    first = optim.build(Train(), [{"params": list(halved.values())}])
    run(halved, first, 3)
    state = optim.state_tensors(first, {p: n for n, p in halved.items()})
    second = optim.build(Train(), [{"params": list(halved.values())}])
    optim.load_state_tensors(second, halved, {k: v.clone() for k, v in state.items()})
    run(halved, second, 2)
    assert all(torch.equal(whole[name], halved[name]) for name in whole)


def test_state_of_other_parameters_is_refused() -> None:
    named = two_tensors()
    optimizer = optim.build(Train(), [{"params": list(named.values())}])
    with pytest.raises(RunFailed, match="does not fit"):
        optim.load_state_tensors(optimizer, named, {"exp_avg/other": torch.zeros(1)})


def test_biases_and_norms_do_not_decay_and_groups_keep_their_rate() -> None:
    named = two_tensors()
    optimizer = optim.build(Train(weight_decay=0.5), [{"params": list(named.values()), "lr": 0.25}])
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {named["A"]: 0.5, named["m"]: 0.0}
    assert optim.set_rate(optimizer, 0.5) == 0.125
