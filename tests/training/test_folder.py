"""Who may write to a run's folder, and what its status says afterwards."""

import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import BadInput, Interrupted, LorakitError, RunFailed
from lorakit.processes import Signalled
from lorakit.runtime import Runtime
from lorakit.training import checkpoint
from lorakit.training import folder as folder_module
from lorakit.training.checkpoint import State
from lorakit.training.folder import RunFolder, check_free, opened

ALONE = Runtime(torch.device("cpu"))
PINNED = {"seed": 1}


def status(path: Path) -> str:
    return str(json.loads((path / "run.json").read_text())["status"])


def fail(path: Path, error: LorakitError, *, at_work: bool) -> None:
    """Let a run fail in its folder, before its first step or after it."""
    with opened(path, "start", ALONE, PINNED) as folder:
        assert status(folder.path) == "running"
        folder.at_work = at_work
        raise error


def test_a_new_folder_is_made_and_ends_finished(tmp_path: Path) -> None:
    with opened(tmp_path / "run", "start", ALONE, PINNED) as folder:
        folder.write("plan.json", "{}")
        folder.note(device="cpu")
        assert status(folder.path) == "running"
    assert status(tmp_path / "run") == "finished"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["device"] == "cpu"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("no"), "failed"),
        (Interrupted("run.interrupted", "stopped"), "interrupted"),
        (Signalled(signal.SIGINT), "interrupted"),
    ],
)
def test_the_status_says_how_it_ended(tmp_path: Path, error: BaseException, expected: str) -> None:
    with pytest.raises(type(error)), opened(tmp_path / "run", "start", ALONE, PINNED):
        raise error
    assert status(tmp_path / "run") == expected


def test_a_second_start_is_refused_and_overwrite_removes_the_first(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with opened(path, "start", ALONE, PINNED) as folder:
        folder.write("old.txt", "old")
    with (
        pytest.raises(BadInput, match="a run that is finished") as caught,
        opened(path, "start", ALONE, PINNED),
    ):
        pass
    assert caught.value.id == "output.not-empty"
    assert (path / "old.txt").exists()
    with opened(path, "overwrite", ALONE, PINNED):
        assert not (path / "old.txt").exists()


@pytest.mark.parametrize("mode", ["start", "overwrite", "resume", "resume-or-start"])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path, mode: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match=r"thesis\.tex"), opened(tmp_path, mode, ALONE, PINNED):  # type: ignore[arg-type]
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_resume_without_a_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with (
        pytest.raises(BadInput, match="no checkpoint") as caught,
        opened(tmp_path / "run", "resume", ALONE, PINNED),
    ):
        pass
    assert caught.value.id == "checkpoint.none"
    assert not (tmp_path / "run").exists()
    with opened(tmp_path / "run", "resume-or-start", ALONE, PINNED) as folder:
        assert folder.resume is None


def test_two_runs_cannot_hold_one_folder(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "run", "start", ALONE, PINNED),
        pytest.raises(LorakitError) as caught,
        opened(tmp_path / "run", "resume-or-start", ALONE, PINNED),
    ):
        pass
    assert caught.value.id == "run.locked"


def test_a_start_into_a_live_runs_folder_says_who_holds_it(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "run", "start", ALONE, PINNED),
        pytest.raises(LorakitError, match=f"pid {os.getpid()} on ") as caught,
    ):
        check_free(tmp_path / "run", "start")
    assert caught.value.id == "run.locked"


@pytest.mark.parametrize("error", [BadInput("usage", "no"), RunFailed("model.not-finite", "no")])
def test_a_run_that_is_refused_before_its_first_step_leaves_nothing(
    tmp_path: Path, error: LorakitError
) -> None:
    (tmp_path / "runs").mkdir()
    for path in (tmp_path / "runs/a", tmp_path / "other/b"):
        with pytest.raises(type(error)):
            fail(path, error, at_work=False)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["runs"]


def test_a_run_that_fails_at_work_or_in_a_folder_that_was_there_says_so(tmp_path: Path) -> None:
    error = RunFailed("run.not-finite", "NaN in step 1")
    with pytest.raises(RunFailed):
        fail(tmp_path / "run", error, at_work=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFailed):
        fail(tmp_path / "empty", error, at_work=False)
    assert status(tmp_path / "run") == status(tmp_path / "empty") == "failed"


def test_a_run_that_came_to_no_step_gives_its_place_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(RuntimeError), opened(path, "start", ALONE, PINNED):
        raise RuntimeError
    assert status(path) == "failed"
    for name in ("plan.json", "log.txt"):
        (path / name).write_text("as a run leaves it")
    (path / "checkpoints").mkdir()
    with opened(path, "start", ALONE, PINNED):
        assert sorted(entry.name for entry in path.iterdir()) == [".lock", "run.json"]


@pytest.mark.parametrize("kept", ["metrics.jsonl", "notes.txt", "checkpoints/step-000001"])
def test_a_failed_run_with_something_to_keep_stays(tmp_path: Path, kept: str) -> None:
    path = tmp_path / "run"
    with pytest.raises(RuntimeError), opened(path, "start", ALONE, PINNED):
        raise RuntimeError
    (path / kept).parent.mkdir(exist_ok=True)
    (path / kept).write_text("{}\n")
    with (
        pytest.raises(BadInput, match="a run that is failed"),
        opened(path, "start", ALONE, PINNED),
    ):
        pass
    assert (path / kept).exists()


@pytest.mark.parametrize(
    ("status", "told"),
    [("running", "a run that was killed; it began 9:00"), ("interrupted", "is interrupted since")],
)
def test_a_start_says_what_became_of_the_run_that_is_there_and_what_goes_on(
    tmp_path: Path, status: str, told: str
) -> None:
    """Nobody holds the folder, so nothing runs there; nothing goes on without a checkpoint."""
    facts = {"status": status, "started": "9:00", "updated": "9:05"}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    helps = []
    for _ in range(2):
        with (
            pytest.raises(BadInput, match=told) as caught,
            opened(tmp_path, "start", ALONE, PINNED),
        ):
            pass
        helps.append(str(caught.value.help))
        if len(helps) == 1:
            with pytest.raises(BadInput) as none, opened(tmp_path, "resume", ALONE, PINNED):
                pass
            assert (none.value.id, none.value.help) == ("checkpoint.none", "run with --overwrite")
        checkpoint.save(
            tmp_path / "checkpoints", State(step=2), PINNED, {}, lambda path: path.mkdir()
        )
    assert helps[0] == "--overwrite removes it, --out takes another folder"
    assert helps[1] == f"--resume goes on with it, {helps[0]}"


def test_a_run_that_ended_between_the_question_and_the_lock_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"

    def another_run(*_: object) -> None:
        path.mkdir()
        (path / "run.json").write_text('{"status": "finished"}')
        (path / "adapter").mkdir()

    monkeypatch.setattr(folder_module, "check_free", another_run)
    with pytest.raises(BadInput, match="is finished"), opened(path, "start", ALONE, PINNED):
        pass
    assert (path / "adapter").exists()


def test_a_resume_that_is_refused_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with opened(path, "start", ALONE, PINNED) as folder:
        checkpoint.save(folder.checkpoints, State(step=3), PINNED, {}, lambda path: path.mkdir())
    before = (path / "run.json").read_bytes()
    other = {"seed": 2}
    with (
        pytest.raises(BadInput, match="seed was 1 and is 2"),
        opened(path, "resume", ALONE, other),
    ):
        pass
    assert (path / "run.json").read_bytes() == before
    with opened(path, "resume", ALONE, other, allow_inexact=True) as folder:
        assert folder.resume is not None
        assert folder.resume.state.step == 3
    resumes = json.loads((path / "run.json").read_text())["resumes"]
    assert resumes == [{"step": 3, "changed": {"seed": [1, 2]}}]


def test_what_a_kill_leaves_can_be_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / ".tmp-run.json-4194305-0123abcd").write_text("{")
    with opened(path, "start", ALONE, PINNED) as folder:
        (folder.checkpoints / ".trash-step-000008-4194305-0123abcd").mkdir(parents=True)
    with opened(path, "resume-or-start", ALONE, PINNED) as folder:
        assert not list(path.rglob(".t*-*"))
        folder.write("plan.json", "{}")
        folder.adapter.mkdir()
    real = Path.unlink

    def killed(entry: Path, missing_ok: bool = False) -> None:
        if entry.name == "plan.json":
            raise KeyboardInterrupt
        real(entry, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt), opened(path, "overwrite", ALONE, PINNED):
        pass
    monkeypatch.undo()
    with opened(path, "overwrite", ALONE, PINNED):
        assert not (path / "plan.json").exists()


def test_the_reason_of_a_failure_holds_no_secret_and_goes_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    path = tmp_path / "run"
    with pytest.raises(RuntimeError), opened(path, "start", ALONE, PINNED):
        raise RuntimeError("sent correct-horse-battery")
    failed = json.loads((path / "run.json").read_text())
    assert failed["ended_by"].startswith("sent ")
    assert "battery" not in failed["ended_by"]
    checkpoint.save(path / "checkpoints", State(step=3), PINNED, {}, lambda path: path.mkdir())
    with opened(path, "resume", ALONE, PINNED):
        pass
    assert "ended_by" not in json.loads((path / "run.json").read_text())


@pytest.mark.parametrize("mode", ["start", "resume", "resume-or-start"])
def test_a_run_whose_facts_are_no_object_is_damaged(tmp_path: Path, mode: str) -> None:
    def save_adapter(target: Path) -> None:
        target.mkdir()

    checkpoint.save(tmp_path / "checkpoints", State(step=2), PINNED, {}, save_adapter)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(LorakitError) as caught, opened(tmp_path, mode, ALONE, PINNED):  # type: ignore[arg-type]
        pass
    assert caught.value.id == "checkpoint.damaged"


def test_a_signal_while_the_end_is_noted_can_be_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, note = tmp_path / "run", RunFolder.note

    def signalled(self: RunFolder, **facts: Any) -> None:
        if facts.get("status") == "finished":
            raise Signalled(signal.SIGTERM)
        note(self, **facts)

    monkeypatch.setattr(RunFolder, "note", signalled)
    with pytest.raises(Interrupted), opened(path, "start", ALONE, PINNED) as folder:
        checkpoint.save(folder.checkpoints, State(step=2), PINNED, {}, lambda path: path.mkdir())
    assert status(path) == "interrupted"


def test_a_checkpoint_of_another_account_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    with opened(path, "start", ALONE, PINNED) as folder:
        assert folder.notices == ()
        checkpoint.save(folder.checkpoints, State(step=2), PINNED, {}, lambda path: path.mkdir())
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with opened(path, "resume", ALONE, PINNED) as folder:
        assert [notice.id for notice in folder.notices] == ["checkpoint.of-another"]


def test_a_place_where_all_may_replace_the_run_is_told() -> None:
    with tempfile.TemporaryDirectory() as name:  # those of pytest are closed to others
        Path(name).chmod(0o777)
        with opened(Path(name, "run"), "start", ALONE, PINNED) as folder:
            assert [notice.id for notice in folder.notices] == ["output.open-to-all"]


def test_rows_that_a_resume_takes_again_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with opened(path, "start", ALONE, PINNED) as folder:
        checkpoint.save(folder.checkpoints, State(step=2), PINNED, {}, lambda path: path.mkdir())
        rows = [{"step": 2, "loss": 1.5}, {"step": 3, "loss": 1.25}, {"step": 3, "skipped": True}]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        folder.metrics.write_text(text + '{"step": 4, "lo')
    with opened(path, "resume", ALONE, PINNED) as folder:
        found = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert found == [rows[0], *(row | {"superseded": True} for row in rows[1:])]


def test_rows_of_a_start_that_came_to_no_checkpoint_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with opened(path, "start", ALONE, PINNED) as folder:
        folder.metrics.write_text('{"step": 1, "loss": 1.5}\n')
    with opened(path, "resume-or-start", ALONE, PINNED) as folder:
        assert json.loads(folder.metrics.read_text())["superseded"] is True


def test_a_resume_sets_aside_what_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with opened(path, "start", ALONE, PINNED) as folder:
        for step in (2, 4):
            checkpoint.save(
                folder.checkpoints, State(step=step), PINNED, {}, lambda path: path.mkdir()
            )
        (folder.checkpoints / "step-000004" / "state.json").write_text("{}")
    with opened(path, "resume", ALONE, PINNED) as folder:
        assert [notice.id for notice in folder.notices] == ["checkpoint.skipped"]
        names = {entry.name for entry in folder.checkpoints.iterdir()}
        assert names == {"step-000002", ".bad-step-000004"}
