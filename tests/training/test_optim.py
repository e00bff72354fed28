"""The schedule, the steps and states of each optimizer, and the gate against spoilt steps."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lorakit.adapters._copies import stacked
from lorakit.errors import EnvironmentLacks, RunFailed
from lorakit.recipe.sections import Optimizer, Train
from lorakit.storage.tensors import TensorFile, write_tensors
from lorakit.training import optim
from lorakit.training.gradients import Gradients
from lorakit.training.memory import state_bytes

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


# Those that a CPU has.
NAMES = ("adamw", "adamw_8bit", "lion_8bit", "sgd", "adafactor")
PLENTY = 1 << 40


def test_after_a_step_the_copies_of_its_factors_are_new(name: Optimizer) -> None:
    """Fused kernels change a tensor behind autograd's back."""
    named = tensors()
    optimizer, A = made(name, named, rate=0.1), named["A"]
    before = stacked([A], torch.bfloat16)
    assert stacked([A], torch.bfloat16) is before
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optim.take_step(optimizer, torch.zeros(()))
    after = stacked([A], torch.bfloat16)
    assert torch.equal(after, A.bfloat16())
    assert not torch.equal(after, before)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> Optimizer:
    return request.param


def tensors() -> dict[str, nn.Parameter]:
    """Return two matrices, the larger one of a size whose states are held in 8 bits, and a norm."""
    draw = torch.Generator().manual_seed(3)
    shapes = {"A": (64, 80), "B": (3, 4), "m": (5,)}
    return {key: nn.Parameter(torch.randn(shape, generator=draw)) for key, shape in shapes.items()}


def made(
    name: Optimizer, named: dict[str, nn.Parameter], rate: float = 1e-2, decay: float = 0.0
) -> torch.optim.Optimizer:
    section = Train(learning_rate=rate, weight_decay=decay)
    return optim.build(section, [{"params": list(named.values())}], name, PLENTY)


def state_of(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    return optim.state_tensors(optimizer, {p: key for key, p in named.items()})


def run(
    named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int
) -> list[float]:
    """Take steps towards zero, every gradient in one buffer as in a run."""
    gradients, losses = Gradients(named), []
    for _ in range(steps):
        gradients.zero()
        loss = sum((p**4 + p**2).sum() for p in named.values())
        loss.backward()
        optim.take_step(optimizer, torch.tensor(0.0))
        losses.append(loss.item())
    return losses


def test_each_comes_down(name: Optimizer) -> None:
    named = tensors()
    losses = run(named, made(name, named, rate=1e-3 if name == "sgd" else 1e-2), 20)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_a_spoilt_step_changes_neither_weights_nor_moments(name: Optimizer) -> None:
    named = tensors()
    optimizer = made(name, named)
    run(named, optimizer, 2)
    before = copy.deepcopy([*named.values(), *state_of(optimizer, named).values()])
    gradients = Gradients(named)
    gradients.flat.fill_(float("nan"))
    optim.take_step(optimizer, torch.tensor(1.0))
    after = [*named.values(), *state_of(optimizer, named).values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    run(named, optimizer, 1)
    assert not torch.equal(before[0], named["A"])


def test_state_survives_the_disk_bit_for_bit(name: Optimizer, tmp_path: Path) -> None:
    whole = tensors()
    run(whole, made(name, whole), 5)
    halved = tensors()
    first = made(name, halved)
    run(halved, first, 3)
    write_tensors(tmp_path / "state.safetensors", state_of(first, halved), {})
    with TensorFile(tmp_path / "state.safetensors", "checkpoint") as file:
        state = {key: file.read(key) for key in file.names}
    second = made(name, halved)
    optim.load_state_tensors(second, halved, state)
    run(halved, second, 2)
    assert all(torch.equal(whole[key], halved[key]) for key in whole)


def test_states_take_the_bytes_that_are_foretold(name: Optimizer) -> None:
    named = tensors()
    optimizer = made(name, named)
    run(named, optimizer, 1)
    state = state_of(optimizer, named)
    taken = sum(t.nbytes for key, t in state.items() if not key.startswith("step/"))
    assert taken == sum(state_bytes(tuple(p.shape), name) for p in named.values())
    for paged, unpaged in optim.UNPAGED.items():
        assert state_bytes((512, 512), paged) == state_bytes((512, 512), unpaged)


def test_states_of_large_tensors_are_held_in_8_bits() -> None:
    for name in ("adamw_8bit", "lion_8bit"):
        named = tensors()
        optimizer = made(name, named)
        run(named, optimizer, 1)
        kinds = {key: t.dtype for key, t in state_of(optimizer, named).items()}
        assert kinds["state1/A"] is torch.uint8
        assert kinds["state1/B"] is torch.float32


def test_paged_states_come_back_as_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    named = tensors()
    first = made("adamw_8bit", named)
    run(named, first, 2)
    state = state_of(first, named)
    again, pages = made("adamw_8bit", named), []
    take = again.get_state_buffer

    def page(*args: Any, **kwargs: Any) -> torch.Tensor:
        pages.append(take(*args, **kwargs))
        return pages[-1]

    monkeypatch.setattr(again, "get_state_buffer", page)
    optim.load_state_tensors(again, named, state)
    assert len(pages) == 2 * len(named)
    kept = {id(value) for one in again.state.values() for value in one.values()}
    assert all(id(one) in kept for one in pages)
    assert state.keys() == state_of(again, named).keys()
    assert all(torch.equal(state[key], one) for key, one in state_of(again, named).items())


def test_state_of_other_parameters_is_refused() -> None:
    named = tensors()
    with pytest.raises(RunFailed, match="does not fit"):
        optim.load_state_tensors(made("adamw", named), named, {"exp_avg/other": torch.zeros(1)})


def test_biases_and_norms_do_not_decay(name: Optimizer) -> None:
    named = tensors()
    before = copy.deepcopy(named)
    optimizer = made(name, named, rate=0.25, decay=0.5)
    Gradients(named)  # all zero
    optim.take_step(optimizer, torch.tensor(0.0))
    torch.testing.assert_close(named["A"], before["A"] * (1 - 0.25 * 0.5))
    assert torch.equal(named["m"], before["m"])


def test_groups_keep_their_rate() -> None:
    named = tensors()
    groups = [{"params": [named["A"]], "lr": 0.25}, {"params": [named["B"], named["m"]], "lr": 4.0}]
    optimizer = optim.build(Train(), groups, "adamw", PLENTY)
    assert optim.set_rate(optimizer, 0.5) == 0.125
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 2.0, 2.0]


def test_lion_is_that_of_the_paper() -> None:
    named = {"B": tensors()["B"]}
    expected, moment = named["B"].detach().clone(), torch.zeros(3, 4)
    optimizer = made("lion_8bit", named, rate=0.01, decay=0.1)
    for _ in range(4):
        grad = 4 * expected**3 + 2 * expected
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * (0.9 * moment + 0.1 * grad).sign()
        moment = 0.99 * moment + 0.01 * grad
    run(named, optimizer, 4)
    torch.testing.assert_close(named["B"].data, expected)


def test_small_tensors_of_the_8_bit_adamw_take_the_steps_of_adamw() -> None:
    small, plain = {"B": tensors()["B"]}, {"B": tensors()["B"]}
    run(small, made("adamw_8bit", small, decay=0.1), 6)
    run(plain, made("adamw", plain, decay=0.1), 6)
    torch.testing.assert_close(small["B"], plain["B"])


def test_adafactor_moves_a_matrix_of_zeros_at_the_rate_that_was_given() -> None:
    named = {"B": nn.Parameter(torch.zeros(64, 8)), "A": nn.Parameter(torch.zeros(8, 64))}
    gradients = Gradients(named)
    named["B"].grad.normal_(generator=torch.Generator().manual_seed(0))
    optim.take_step(made("adafactor", named, rate=1e-3), torch.tensor(0.0))
    assert named["B"].square().mean().sqrt().item() == pytest.approx(1e-3, rel=0.05)
    assert not named["A"].any()
    assert gradients.flat.isfinite().all()


@pytest.mark.parametrize(("paged", "instead"), optim.UNPAGED.items())
def test_without_a_gpu_nothing_is_paged(paged: Optimizer, instead: Optimizer) -> None:
    name, (notice,) = optim.resolve(Train(optimizer=paged), torch.device("cpu"))
    assert name == instead
    assert (notice.id, instead in notice.message) == ("run.optimizer", True)
    assert optim.resolve(Train(optimizer=paged), torch.device("meta")) == (paged, [])
    strict = Train(optimizer=paged, strict_optimizer=True)
    with pytest.raises(EnvironmentLacks, match=paged) as lacks:
        optim.resolve(strict, torch.device("cpu"))
    assert (lacks.value.id, lacks.value.exit_code) == ("env.missing-device", 4)


def test_what_a_cpu_has_is_taken_as_it_is(name: Optimizer) -> None:
    section = Train(optimizer=name, strict_optimizer=True)
    assert optim.resolve(section, torch.device("cpu")) == (name, [])


def test_without_bitsandbytes_its_optimizers_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optim, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentLacks, match=r"train\.optimizer: lion_8bit") as lacks:
        optim.resolve(Train(optimizer="lion_8bit"), torch.device("cpu"))
    assert "pip install" in (lacks.value.help or "")
    assert optim.resolve(Train(), torch.device("cpu")) == ("adamw", [])


def test_states_larger_than_what_is_free_are_refused() -> None:
    groups = [{"params": list(tensors().values())}]
    needed = sum(state_bytes(tuple(p.shape), "adamw_8bit") for p in groups[0]["params"])
    optim.build(Train(), groups, "adamw_8bit", needed)
    with pytest.raises(RunFailed, match="adamw_8bit take") as refused:
        optim.build(Train(), groups, "adamw_8bit", needed - 1)
    assert refused.value.id == "run.out-of-memory"
