import fcntl
import os
import shutil
import signal
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.errors import BadInput, RunFailed
from lorakit.storage.lock import locked


def in_child(action: Callable[[], None]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    try:
        action()
        os._exit(0)
    finally:
        os._exit(1)


def test_a_second_run_is_refused_at_once_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with locked(folder) as sign:
        sign()
        before = (folder / ".lock").read_bytes()
        begun = time.monotonic()
        with pytest.raises(RunFailed) as caught, locked(folder):
            pytest.fail("held twice")
        assert time.monotonic() - begun < 1
        assert (folder / ".lock").read_bytes() == before
        assert os.listdir(folder) == [".lock"]
    assert caught.value.id == "run.locked"
    for part in (f"pid {os.getpid()}", socket.gethostname(), "started 20"):
        assert part in caught.value.message
    with locked(folder):
        pass


def test_a_folder_that_is_removed_while_its_lock_is_opened_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def removed(descriptor: int, how: int) -> None:
        shutil.rmtree(folder)

    monkeypatch.setattr(fcntl, "flock", removed)
    with pytest.raises(RunFailed, match="another run"), locked(folder):
        pytest.fail("held a lock that is not there")


def test_the_lock_of_a_killed_holder_is_free(tmp_path: Path) -> None:
    ready, told = os.pipe()

    def hold() -> None:
        with locked(tmp_path) as sign:
            sign()
            os.write(told, b"x")
            time.sleep(60)

    child = in_child(hold)
    assert os.read(ready, 1) == b"x"
    with pytest.raises(RunFailed, match=f"pid {child} "), locked(tmp_path):
        pytest.fail("held twice")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path) as sign:
        sign()
        assert f"pid {os.getpid()} " in (tmp_path / ".lock").read_text()
    os.close(ready)
    os.close(told)


def test_an_error_inside_frees_the_lock(tmp_path: Path) -> None:
    def fail() -> None:
        with locked(tmp_path):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    with locked(tmp_path):
        pass


def test_a_lock_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(BadInput) as caught, locked(tmp_path):
        pytest.fail("locked a link")
    assert caught.value.id == "security.path"
    assert (tmp_path / "target").read_text() == "mine"


def test_what_a_stranger_wrote_into_the_lock_is_escaped(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / ".lock").write_bytes(b"\x1b[2J" + b"x" * 1000)
        with pytest.raises(RunFailed) as caught, locked(tmp_path):
            pytest.fail("held twice")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500
