"""strace is shown everything that changes the disk, whichever thread of lorakit does it."""

import os
from pathlib import Path

import pytest

from lorakit.storage.disk import copy_all, create, sync
from lorakit.threads import Threads
from tests.faults import syscalls


@pytest.fixture
def shared_out(tmp_path: Path) -> tuple[syscalls.Action, Path]:
    """An action that copies bytes and syncs them in threads, and the folder where it does."""
    if reason := syscalls.why_not():
        pytest.skip(reason)
    (tmp_path / "source").write_bytes(b"bytes")
    below = tmp_path / "below"
    below.mkdir()

    def action() -> int:
        source = os.open(tmp_path / "source", os.O_RDONLY)
        with Threads() as threads:
            copy = threads.beside(create, below / "copy").result()
            threads.each(lambda part: copy_all(source, copy, part, part + 1, part), range(5))
            threads.beside(sync, below / "copy").result()
        return 0

    return action, below


def test_what_threads_do_is_listed(
    shared_out: tuple[syscalls.Action, Path], tmp_path: Path
) -> None:
    action, below = shared_out
    calls = syscalls.listed(action, below, tmp_path / "log")
    assert [call.name for call in calls] == ["openat", *["copy_file_range"] * 5, "fsync"]
    assert {call.paths for call in calls} == {(str(below / "copy"),)}


def test_what_threads_do_is_refused(
    shared_out: tuple[syscalls.Action, Path], tmp_path: Path
) -> None:
    action, below = shared_out
    *_, synced = syscalls.listed(action, below, tmp_path / "log")
    (below / "copy").unlink()
    ended, failed = syscalls.refused_at(synced, action, "EIO")
    assert "[Errno 5]" in ended.said, ended
    assert failed.startswith("fsync(")
    assert str(below / "copy") in failed
