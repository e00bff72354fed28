"""Checkpoints come back whole, a damaged one is passed over by name, and old ones go."""

import errno
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from lorakit.errors import BadInput, LorakitError, RunFailed
from lorakit.storage import disk, manifest
from lorakit.storage.hashing import sha256_file
from lorakit.training import checkpoint
from lorakit.training.checkpoint import State

PINNED = {"seed": 1, "versions.torch": "2"}


def write(folder: Path, step: int, value: float = 1.0) -> Path:
    def adapter(path: Path) -> None:
        path.mkdir()
        (path / "adapter_config.json").write_text("{}")

    state = State(step=step, tokens=10 * step, best_loss=0.5, best_step=1, method={"ranks": [1, 2]})
    return checkpoint.save(folder, state, PINNED, {"exp_avg/A": torch.full((3, 2), value)}, adapter)


def test_the_newest_comes_back_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, 2)
    write(tmp_path, 10, value=7.0)
    found, notices = checkpoint.newest(tmp_path)
    assert found is not None
    assert not notices
    assert found.state == State(
        step=10, tokens=100, best_loss=0.5, best_step=1, method={"ranks": [1, 2]}
    )
    assert found.pinned == PINNED
    assert torch.equal(found.optimizer_tensors()["exp_avg/A"], torch.full((3, 2), 7.0))
    assert (found.adapter / "adapter_config.json").is_file()


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize("file", ["optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_one_is_skipped_by_name(tmp_path: Path, file: str) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    content = bytearray((newest / file).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / file).write_bytes(content)
    found, notices = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.state.step == 1
    assert [notice.id for notice in notices] == ["checkpoint.skipped"]
    assert "skipped step 2" in notices[0].message
    assert "resuming from step 1" in notices[0].message


def test_one_under_another_number_is_skipped(tmp_path: Path) -> None:
    shutil.copytree(write(tmp_path, 1), tmp_path / "step-000007")
    found, notices = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.state.step == 1
    assert "skipped step 7: it holds step 1" in notices[0].message


def test_one_that_the_disk_cannot_read_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)

    def read(path: Path) -> str:
        if path.is_relative_to(newest):
            raise OSError(errno.EIO, "Input/output error")
        return sha256_file(path)

    monkeypatch.setattr(manifest, "sha256_file", read)
    found, notices = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.state.step == 1
    assert "EIO" in notices[0].message


@pytest.mark.parametrize(
    "written",
    [
        "[]",
        "{}",
        '{"schema": "1", "state": {}, "pinned": {}}',
        '{"schema": 1, "state": [], "pinned": {}}',
        '{"schema": 1, "state": {}, "pinned": null}',
    ],
)
def test_a_forged_state_is_damage(tmp_path: Path, written: str) -> None:
    forge(write(tmp_path, 1), written)
    with pytest.raises(LorakitError) as caught:
        checkpoint.newest(tmp_path)
    assert caught.value.id == "checkpoint.damaged"


@pytest.mark.parametrize("key", [one.name for one in fields(State)])
def test_each_value_of_a_state_has_its_type(tmp_path: Path, key: str) -> None:
    folder = write(tmp_path, 1)
    content = json.loads((folder / "state.json").read_text())
    content["state"][key] = "other"
    forge(folder, json.dumps(content))
    with pytest.raises(RunFailed, match=rf"state\.{key}") as caught:
        checkpoint.newest(tmp_path)
    assert caught.value.id == "checkpoint.damaged"


@pytest.mark.parametrize(
    ("key", "value"),
    [("loss_scale", 0.0), ("loss_scale", 2.0**17), ("finite_steps", -1), ("finite_steps", 2000)],
)
def test_a_loss_scale_that_no_run_can_have_is_damage(
    tmp_path: Path, key: str, value: float
) -> None:
    folder = write(tmp_path, 1)
    content = json.loads((folder / "state.json").read_text())
    content["state"][key] = value
    forge(folder, json.dumps(content))
    with pytest.raises(RunFailed, match=rf"state\.{key} is {value}"):
        checkpoint.newest(tmp_path)


def test_one_that_holds_no_figures_yet_opens_and_its_tokens_have_no_time(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    content = json.loads((folder / "state.json").read_text())
    for key in ("seconds", "training_seconds", "untimed_tokens", "peak_bytes"):
        del content["state"][key]
    forge(folder, json.dumps(content))
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None
    state = found.state
    assert (state.tokens, state.seconds, state.rate(state.tokens)) == (10, 0.0, 0.0)
    state.tokens, state.seconds, state.training_seconds = 40, 4.0, 3.0
    assert state.rate(state.tokens) == 30 / 3


@pytest.mark.parametrize(("key", "value"), [("training_seconds", 2.5), ("untimed_tokens", -1)])
def test_figures_that_no_run_can_have_are_damage(tmp_path: Path, key: str, value: float) -> None:
    folder = write(tmp_path, 1)
    content = json.loads((folder / "state.json").read_text())
    content["state"] |= {"seconds": 2.0, key: value}
    forge(folder, json.dumps(content))
    with pytest.raises(RunFailed, match=rf"state\.{key} is {value}"):
        checkpoint.newest(tmp_path)


def forge(folder: Path, state: str) -> None:
    (folder / "state.json").write_text(state)
    (folder / "manifest.json").unlink()
    manifest.write_manifest(folder)


def test_a_moment_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(RunFailed, match="exp_avg/A") as caught:
        write(tmp_path, 2, value=float("nan"))
    assert caught.value.id == "run.not-finite"
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_disk_too_small_for_another_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(tmp_path, 1)
    size = sum(path.stat().st_size for path in first.rglob("*"))
    monkeypatch.setattr(disk, "free_space", lambda _: size)
    with pytest.raises(RunFailed, match=f"{size:,} bytes needed") as caught:
        write(tmp_path, 2)
    assert caught.value.id == "storage.full"
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize(
    ("what", "id"), [("a value", "checkpoint.damaged"), ("a name", "storage.io")]
)
def test_a_disk_that_keeps_other_bytes_is_found_out(
    what: str, id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        wrong = bytearray(data)
        if (what == "a name") == (offset == 0):  # the header comes first in the file
            wrong[-1 if offset else bytes(wrong).index(b"exp_avg")] ^= 1
        is_tensors = os.readlink(f"/proc/self/fd/{descriptor}").endswith("optimizer.safetensors")
        return real(descriptor, bytes(wrong) if is_tensors else data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(RunFailed) as caught:
        write(tmp_path, 1)
    assert caught.value.id == id
    assert not list(tmp_path.iterdir())


def test_what_is_damaged_is_set_aside_and_never_counted(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    checkpoint.set_damaged_aside(tmp_path, 2)
    checkpoint.prune(tmp_path, keep=2, best=None)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".bad-step-000003", "step-000001", "step-000002"]


def test_none_good_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        (write(tmp_path, step) / "optimizer.safetensors").unlink()
    with pytest.raises(RunFailed, match=r"step 2.*step 1") as caught:
        checkpoint.newest(tmp_path)
    assert caught.value.id == "checkpoint.damaged"


def test_one_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "asdict", lambda state: {"step": state.step, "clock": 3.0})
    write(tmp_path, 1)
    with pytest.raises(BadInput, match="in another form") as caught:
        checkpoint.newest(tmp_path)
    assert caught.value.id == "checkpoint.changed"


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep=2, best=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000003",
        "step-000005",
        "step-000006",
    ]


def test_pruning_removes_nothing_while_there_are_fewer(tmp_path: Path) -> None:
    for step in range(1, 5):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep=5, best=None)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_difference_is_named_and_refused_unless_allowed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None
    assert checkpoint.check_unchanged(found, PINNED, allow_inexact=False) == {}
    changed = PINNED | {"seed": 2}
    with pytest.raises(BadInput, match="seed was 1 and is 2") as caught:
        checkpoint.check_unchanged(found, changed, allow_inexact=False)
    assert caught.value.id == "checkpoint.changed"
    assert checkpoint.check_unchanged(found, changed, allow_inexact=True) == {"seed": (1, 2)}
