"""Kernels are chosen once: alike in every process, and the same again when a run goes on."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit.errors import BadInput, Interrupted
from lorakit.model import elementwise, loss
from lorakit.runtime import Runtime
from lorakit.training import run
from lorakit.training.checkpoint import newest
from lorakit.training.folder import RunFolder
from lorakit.training.run import choose_kernels, choose_loss
from tests.model.test_loss import frozen, stand_in
from tests.training.test_loop import ALONE, carry_out, folder

__all__ = ["folder"]

CPU = torch.device("cpu")


class Outvoted(Runtime):
    """A process beside another one, which votes against what this one can."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.add_(1)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU say of itself what a GPU does, and compile nothing."""
    monkeypatch.setattr(Runtime, "is_gpu", True)
    monkeypatch.setattr("lorakit.training.plan.Plan.compiled", False)


def compiler(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> list[Any]:
    """Put a compiler in place that works, or fails for a reason; return its calls."""
    calls: list[Any] = []
    monkeypatch.setattr(run, "fuse_kernels", lambda *given: calls.append(given) or reason)
    return calls


def given(*, compiled: bool) -> Any:
    """Return as much of a plan as a choice of kernels asks for."""
    train = SimpleNamespace(compile="auto", deterministic=False)
    setup, recipe = SimpleNamespace(tokens=20, share=1.0), SimpleNamespace(train=train)
    return SimpleNamespace(compiled=compiled, dtype=torch.float32, setup=setup, recipe=recipe)


def noted(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((path / "run.json").read_text())
    return read


def begin(folder: Path, path: Path) -> None:
    with pytest.raises(Interrupted):
        carry_out(folder, path, stop_after=2)


def test_a_run_goes_on_with_the_loss_that_it_began_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, 0.9)
    begin(folder, tmp_path / "theirs")
    calls = stand_in(monkeypatch, 1.1)
    begin(folder, tmp_path / "ours")
    assert noted(tmp_path / "theirs")["loss_kernel"] == "liger"
    carry_out(folder, tmp_path / "theirs", "resume")  # although ours is faster now
    assert noted(tmp_path / "theirs")["loss_kernel"] == "liger"
    assert len(calls) > 1
    calls = stand_in(monkeypatch, 0.9)
    carry_out(folder, tmp_path / "ours", "resume")  # although ours is slower now
    assert noted(tmp_path / "ours")["loss_kernel"] == "own"
    assert not calls


def test_a_run_whose_loss_is_not_there_any_more_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, 0.9)
    begin(folder, tmp_path / "run")
    stand_in(monkeypatch, 0.9, factor=None)
    with pytest.raises(BadInput, match="loss_kernel was 'liger' and is \"own, for Liger's") as told:
        carry_out(folder, tmp_path / "run", "resume")
    assert told.value.id == "checkpoint.changed"
    carry_out(folder, tmp_path / "run", "resume", allow_inexact=True)
    assert noted(tmp_path / "run")["loss_kernel"].startswith("own, for Liger's fails")
    assert "loss_kernel" in noted(tmp_path / "run")["resumes"][-1]["changed"]
    passport = json.loads((tmp_path / "run/adapter/lorakit.json").read_text())
    assert "loss_kernel was 'liger'" in passport["resumed_inexactly"][0]


def test_a_run_goes_on_compiled_if_it_began_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.training.plan.Plan.compiled", True)
    compiler(monkeypatch, "no g++")
    begin(folder, tmp_path / "apart")
    calls = compiler(monkeypatch, None)
    begin(folder, tmp_path / "compiled")
    assert len(calls) == 1
    carry_out(folder, tmp_path / "apart", "resume")
    assert len(calls) == 1
    assert noted(tmp_path / "apart")["compiled"] is False
    compiler(monkeypatch, "no g++")
    with pytest.raises(BadInput, match="compiled was True and is False"):
        carry_out(folder, tmp_path / "compiled", "resume")


def test_all_processes_take_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = given(compiled=True)
    compiler(monkeypatch, None)
    said: list[str] = []
    assert choose_kernels(plan, ALONE, None)  # type: ignore[arg-type]
    assert not choose_kernels(plan, Outvoted(CPU, 0, 2), SimpleNamespace(say=said.append))
    assert said == [
        "not compiled, so elementwise steps take longer: it does not in another process"
    ]
    stand_in(monkeypatch, 0.9)
    assert choose_loss(plan, ALONE, frozen("llama"), None) == "liger"
    assert choose_loss(plan, Outvoted(CPU, 0, 2), frozen("llama"), None).startswith("own, as in")
    assert loss._liger is None


def test_a_process_that_does_not_write_may_choose_too(folder: Path, tmp_path: Path) -> None:
    begin(folder, tmp_path / "run")
    found, _ = newest(tmp_path / "run/checkpoints")
    before = noted(tmp_path / "run")
    other = RunFolder(tmp_path / "run", False, {}, dict(before), found)
    other.chose(compiled=before["compiled"])
    with pytest.raises(BadInput):
        other.chose(compiled=not before["compiled"])
    assert noted(tmp_path / "run") == before


def test_what_an_earlier_run_chose_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, 0.9)
    choose_loss(given(compiled=False), ALONE, frozen("llama"), None)
    monkeypatch.setattr(elementwise, "_fuses", True)
    choose_kernels(given(compiled=False), ALONE, None)  # type: ignore[arg-type]
    assert loss._liger is None
    assert not elementwise._fuses
