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
from lorakit.model import base, checkpointing
from lorakit.model.families import decoder_layers
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
        "-s train.micro_batch_size=4 needs about 0.00 GiB, the same result; "
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
    monkeypatch.setattr(Runtime, "is_gpu", True)
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


@contextmanager
def needs_recomputed(patch: pytest.MonkeyPatch, layers: int, rows: int) -> Iterator[list[int]]:
    """Play a GPU where micro-batches of more rows run out of memory with fewer recomputed layers.

    What is given are the recomputed layers of each try.
    """
    real, tries = shortage.token_loss, []

    def limited(model: Any, batch: Any) -> torch.Tensor:
        loss = real(model, batch)
        forwards = [layer.forward for layer in decoder_layers(model)]
        tries.append(sum(isinstance(forward, checkpointing._Recomputed) for forward in forwards))
        if len(batch.rows) > rows and tries[-1] < layers:
            raise torch.OutOfMemoryError
        return loss

    with patch.context() as inside:
        inside.setattr(Runtime, "is_gpu", True)
        inside.setattr("lorakit.training.plan.Plan.compiled", False)
        inside.setattr(shortage, "token_loss", limited)
        yield tries


@pytest.mark.parametrize(
    ("settings", "rows"), [({"micro_batch_size": 8}, 1), ({"batch_size": 1}, 0)], ids=str
)
@pytest.mark.parametrize("layers", [1, 2])
def test_layers_are_recomputed_where_the_size_is_not_ours_to_choose(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    rows: int,
    layers: int,
) -> None:
    """Because it is the user's, or because a row has no half; as many as it takes, no more."""
    _, records, expected = carry_out(folder, tmp_path / "whole", max_steps=3, **settings)
    with needs_recomputed(monkeypatch, layers, rows) as tries:
        _, found, tensors = carry_out(folder, tmp_path / "tried", max_steps=3, **settings)
    noted = facts(tmp_path / "tried")
    assert noted["recomputed_layers"] == tries[-1] == layers
    assert "halved" not in noted
    if "micro_batch_size" in settings:
        assert noted["micro_batch_limit"] == 8
    assert [r.loss for r in found] == pytest.approx([r.loss for r in records], rel=1e-5)
    assert largest_difference(expected, tensors) < 1e-3


def test_a_size_that_no_recomputing_helps_is_the_users_to_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"micro_batch_size": 8, "max_steps": 1}
    with needs_recomputed(monkeypatch, 9, 4) as tries, pytest.raises(RunFailed) as caught:
        carry_out(folder, tmp_path / "stopped", **settings)
    assert tries == [0, 1, 2]
    assert "step 1, a micro-batch of 1 x " in caught.value.message
    assert "train.on_oom=halve" in str(caught.value.help)
    with needs_recomputed(monkeypatch, 9, 4) as tries:
        carry_out(folder, tmp_path / "halved", on_oom="halve", **settings)
        assert tries == [0, 1, 2, 2]
        carry_out(folder, tmp_path / "said", gradient_checkpointing=False, **settings)
    assert tries == [0, 1, 2, 2]  # both are the recipe's: there is nothing to try
    noted = facts(tmp_path / "halved")
    assert (noted["micro_batch_limit"], noted["recomputed_layers"]) == (4, 2)


def test_the_peak_of_a_try_is_its_own_and_that_of_the_run_the_highest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU whose mark rises with the tokens of a micro-batch and falls only when it is reset."""
    real, mark = shortage.token_loss, 10**6

    def marked(model: Any, batch: Any) -> torch.Tensor:
        nonlocal mark
        tokens = batch.input_ids.numel()
        mark = max(mark, 1000 * tokens)
        if tokens > 60:
            raise torch.OutOfMemoryError
        return real(model, batch)

    def reset_peak(_: Runtime) -> None:
        nonlocal mark
        mark = 0

    monkeypatch.setattr(Runtime, "is_gpu", True)
    monkeypatch.setattr("lorakit.training.plan.Plan.compiled", False)
    monkeypatch.setattr(Runtime, "peak_bytes", lambda _: mark)
    monkeypatch.setattr(Runtime, "reset_peak", reset_peak)
    monkeypatch.setattr(shortage, "token_loss", marked)
    outcome, records, _ = carry_out(folder, tmp_path / "run", max_steps=1)
    probe = facts(tmp_path / "run")["probe"]
    assert probe["measured_bytes"] == mark == 1000 * probe["tokens"] <= 60_000
    assert outcome.peak_memory_bytes == records[-1].mem_peak == 10**6  # of loading


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 8}], ids=str)
@pytest.mark.parametrize("times", [1, 6])
def test_a_gpu_that_takes_more_than_expected_is_given_less(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    settings: dict[str, Any],
) -> None:
    """Estimate and peak are noted; the loss and the adapter stay what they are.

    A size that is the user's stays too: more layers are recomputed.
    """
    for name in ("OVERHEAD", "LIBRARIES", "KERNELS", "CONTEXT"):
        monkeypatch.setattr(memory, name, 0)
    monkeypatch.setattr(Runtime, "is_gpu", True)
    monkeypatch.setattr("lorakit.training.plan.Plan.compiled", False)
    _, records, expected = carry_out(folder, tmp_path / "whole", **settings)
    probe = facts(tmp_path / "whole")["probe"]
    room = 2 * probe["estimated_bytes"]
    monkeypatch.setattr(Runtime, "free_bytes", lambda _: room)
    peak = times * probe["estimated_bytes"]
    monkeypatch.setattr(Runtime, "peak_bytes", lambda _: peak)
    _, found, tensors = carry_out(folder, tmp_path / "tried", **settings)
    noted = facts(tmp_path / "tried")
    assert noted["probe"] == probe | {"measured_bytes": peak}
    assert ("recomputed_layers" in noted) is (times > 1)
    if times > 1 and settings:
        assert noted["recomputed_layers"] > 0
        assert noted["micro_batch_limit"] == settings["micro_batch_size"]
    elif times > 1:
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
