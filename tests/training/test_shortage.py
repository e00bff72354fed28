"""Memory that runs out in the middle of a run: what is said, and what goes on as if it had not."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lorakit.cli.app import app
from lorakit.errors import RunFailed
from lorakit.model import base
from lorakit.runtime import Runtime
from lorakit.training import loop, memory, shortage
from tests.training.test_loop import carry_out, folder, largest_difference

__all__ = ["folder"]


@contextmanager
def little_memory(patch: pytest.MonkeyPatch, tokens: int, *, from_call: int = 1) -> Iterator[None]:
    """Let micro-batches of more tokens run out of memory, from a call of the loss on."""
    real, calls = loop.token_loss, 0

    def limited(model: Any, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = real(model, batch)
        if calls >= from_call and batch.input_ids.numel() > tokens:
            raise torch.OutOfMemoryError(f"tried to allocate {batch.input_ids.numel()} tokens")
        return loss

    with patch.context() as inside:
        inside.setattr(loop, "token_loss", limited)
        yield


def facts(run: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / "run.json").read_text())
    return read


@pytest.mark.parametrize("size", ["auto", 8])
def test_a_halved_run_ends_as_one_that_had_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: Any
) -> None:
    """Bound: rounding of fp32 sums in another order, through six steps of AdamW."""
    plenty = {"on_oom": "halve", "micro_batch_size": size}
    whole, records, expected = carry_out(folder, tmp_path / "whole", **plenty)
    with little_memory(monkeypatch, 60, from_call=3):
        outcome, found, tensors = carry_out(folder, tmp_path / "halved", **plenty)
    assert (outcome.steps, outcome.tokens) == (whole.steps, whole.tokens)
    assert [r.step for r in found] == [r.step for r in records]
    assert [r.loss for r in found] == pytest.approx([r.loss for r in records], rel=1e-5)
    assert largest_difference(expected, tensors) < 1e-3
    noted = facts(tmp_path / "halved")
    assert [entry["step"] for entry in noted["halved"]] == [4, 4]
    assert noted["micro_batch_tokens"] == noted["halved"][-1]["tokens"] <= 60
    assert "halved" not in facts(tmp_path / "whole")


def test_the_message_says_where_and_what_would_fit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"micro_batch_size": 8, "save_every": 1}
    monkeypatch.setattr(memory, "OVERHEAD", 0)  # a tiny model's activations are nothing beside it
    monkeypatch.setattr(memory, "LIBRARIES", 0)
    monkeypatch.setattr(memory, "KERNELS", 0)
    with little_memory(monkeypatch, 0, from_call=2), pytest.raises(RunFailed) as caught:
        carry_out(folder, tmp_path / "run", **settings)
    error = caught.value
    assert (error.id, error.exit_code) == ("run.out-of-memory", 3)
    assert "step 2, a micro-batch of 1 x " in error.message
    assert "weights 0.0" in error.message
    assert "the last checkpoint is intact" in error.message
    assert error.help is not None
    assert error.help == (
        "-s train.micro_batch_size=4 needs about 0.0 GiB, the same result; "
        "-s train.on_oom=halve makes micro-batches smaller by itself"
    )
    assert isinstance(error.__cause__, torch.OutOfMemoryError)
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == ["step-000001"]
    assert facts(tmp_path / "run")["status"] == "failed"
    alone = {"batch_size": 1, "max_steps": 1}
    with little_memory(monkeypatch, 0), pytest.raises(RunFailed) as caught:
        carry_out(folder, tmp_path / "alone", **alone)
    assert "halve" not in str(caught.value.help)  # a single row has no half
    carry_out(folder, tmp_path / "run", "resume", **settings | {"on_oom": "halve"})


@pytest.mark.parametrize("steps", [0, 1])
def test_what_auto_chose_is_not_what_the_message_proposes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """`auto` would choose again what did not fit; no checkpoint is intact before there is one."""
    monkeypatch.setattr(memory, "OVERHEAD", 0)
    monkeypatch.setattr(memory, "LIBRARIES", 0)
    monkeypatch.setattr(memory, "KERNELS", 0)
    with (
        little_memory(monkeypatch, 0, from_call=1 + steps),
        pytest.raises(RunFailed, match=f"step {1 + steps}, ") as caught,
    ):
        carry_out(folder, tmp_path / "run", save_every=1)
    assert re.match(r"(-s train\.\S+=\S+ )+needs about", str(caught.value.help))
    assert ("intact" in caught.value.message) is bool(steps)


def test_memory_that_runs_out_while_loading(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(base, "load", load)
    with pytest.raises(RunFailed, match="memory ran out") as caught:
        carry_out(folder, tmp_path / "run")
    assert (caught.value.id, caught.value.exit_code) == ("run.out-of-memory", 3)
    assert "intact" not in caught.value.message
    assert "halve" not in str(caught.value.help)  # a step's micro-batches are not yet there


def test_halving_ends_at_a_single_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with little_memory(monkeypatch, 0), pytest.raises(RunFailed, match="step 1") as caught:
        carry_out(folder, tmp_path / "run", on_oom="halve")
    assert caught.value.id == "run.out-of-memory"


def test_a_gpu_is_tried_before_the_first_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU that says of itself what a GPU does; nothing of the trial may be left in the run."""
    _, records, expected = carry_out(folder, tmp_path / "whole")
    monkeypatch.setattr(Runtime, "lags", True)
    monkeypatch.setattr("lorakit.training.plan.Plan.compiled", False)
    real = shortage.token_loss

    def limited(model: Any, batch: Any) -> torch.Tensor:
        loss = real(model, batch)
        if batch.input_ids.numel() > 60:
            raise torch.OutOfMemoryError
        return loss

    monkeypatch.setattr(shortage, "token_loss", limited)
    _, found, tensors = carry_out(folder, tmp_path / "tried")
    noted = facts(tmp_path / "tried")
    assert noted["micro_batch_tokens"] <= 60
    assert {entry["step"] for entry in noted["halved"]} == {1}
    assert [r.loss for r in found] == pytest.approx([r.loss for r in records], rel=1e-5)
    assert largest_difference(expected, tensors) < 1e-3


@pytest.mark.parametrize("times", [1, 6])
def test_a_gpu_that_takes_more_than_expected_is_given_less(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Estimate and peak are noted; the loss and the adapter stay what they are."""
    for name in ("OVERHEAD", "LIBRARIES", "KERNELS", "CONTEXT"):
        monkeypatch.setattr(memory, name, 0)
    monkeypatch.setattr(Runtime, "lags", True)
    monkeypatch.setattr("lorakit.training.plan.Plan.compiled", False)
    _, records, expected = carry_out(folder, tmp_path / "whole")
    probe = facts(tmp_path / "whole")["probe"]
    room = 2 * probe["estimated_bytes"]
    monkeypatch.setattr(Runtime, "free_bytes", lambda _: room)
    peak = times * probe["estimated_bytes"]
    monkeypatch.setattr(Runtime, "peak_bytes", lambda _: peak)
    _, found, tensors = carry_out(folder, tmp_path / "tried")
    noted = facts(tmp_path / "tried")
    assert noted["probe"] == probe | {"measured_bytes": peak}
    assert ("recomputed_layers" in noted) is (times > 1)
    if times > 1:
        assert noted["micro_batch_tokens"] < probe["tokens"]
    assert [r.loss for r in found] == pytest.approx([r.loss for r in records], rel=1e-5)
    assert largest_difference(expected, tensors) < 1e-3


def test_another_error_stays_what_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(loop, "token_loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        carry_out(folder, tmp_path / "run", on_oom="halve")


def test_a_resume_goes_on_in_the_smaller_micro_batches(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {folder / 'model'}\n"
        f"data: {{train: {folder / 'rows.jsonl'}}}\n"
        "adapter: {rank: 4}\n"
        "train: {batch_size: 8, max_steps: 3, save_every: 1, on_oom: halve}\n"
        f"output_dir: {run}\n"
    )

    def trained(*options: str) -> int:
        return CliRunner().invoke(app, ["train", str(recipe), *options]).exit_code

    with little_memory(monkeypatch, 60), little_memory(monkeypatch, 0, from_call=12):
        assert trained() == 3
    first = facts(run)
    with little_memory(monkeypatch, 60):
        assert trained("--resume") == 0
    noted = facts(run)
    steps = [entry["step"] for entry in first["halved"]]
    assert steps.count(1) > 0
    assert noted["halved"] == first["halved"]
    assert noted["micro_batch_limit"] == first["micro_batch_limit"] <= 60
