"""Who may write to a run's folder, and what its status says afterwards."""

import json
from pathlib import Path

import pytest
import torch

from lorakit.errors import BadInput, Interrupted, LorakitError
from lorakit.runtime import Runtime
from lorakit.training.folder import opened

ALONE = Runtime(torch.device("cpu"))


def status(path: Path) -> str:
    return str(json.loads((path / "run.json").read_text())["status"])


def test_a_new_folder_is_made_and_ends_finished(tmp_path: Path) -> None:
    with opened(tmp_path / "run", "start", ALONE) as folder:
        folder.write("plan.json", "{}")
        folder.note(device="cpu")
        assert status(folder.path) == "running"
    assert status(tmp_path / "run") == "finished"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["device"] == "cpu"


@pytest.mark.parametrize(
    ("error", "expected"),
    [(RuntimeError("no"), "failed"), (Interrupted("run.interrupted", "stopped"), "interrupted")],
)
def test_the_status_says_how_it_ended(tmp_path: Path, error: Exception, expected: str) -> None:
    with pytest.raises(type(error)), opened(tmp_path / "run", "start", ALONE):
        raise error
    assert status(tmp_path / "run") == expected


def test_a_second_start_is_refused_and_overwrite_removes_the_first(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with opened(path, "start", ALONE) as folder:
        folder.write("old.txt", "old")
    with (
        pytest.raises(BadInput, match="a run that is finished") as caught,
        opened(path, "start", ALONE),
    ):
        pass
    assert caught.value.id == "output.not-empty"
    assert (path / "old.txt").exists()
    with opened(path, "overwrite", ALONE):
        assert not (path / "old.txt").exists()


@pytest.mark.parametrize("mode", ["start", "overwrite"])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path, mode: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match=r"thesis\.tex"), opened(tmp_path, mode, ALONE):  # type: ignore[arg-type]
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_resume_without_a_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with (
        pytest.raises(BadInput, match="no checkpoint") as caught,
        opened(tmp_path / "run", "resume", ALONE),
    ):
        pass
    assert caught.value.id == "checkpoint.none"
    with opened(tmp_path / "run", "resume-or-start", ALONE) as folder:
        assert folder.resume is None


def test_two_runs_cannot_hold_one_folder(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "run", "start", ALONE),
        pytest.raises(LorakitError) as caught,
        opened(tmp_path / "run", "resume-or-start", ALONE),
    ):
        pass
    assert caught.value.id == "run.locked"
