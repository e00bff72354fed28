"""One run at a time in one folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from lorakit.errors import RunFailed
from lorakit.storage.disk import make_folder, storage_errors, write_all
from lorakit.storage.redact import printable

NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder; the kernel frees it however the process ends.

    The file stays: removing it would let two processes lock two files of the same name.

    Raises:
        RunFailed: `run.locked` at once, naming the holder, when another process has it.
    """
    path = folder / NAME
    with storage_errors(path):
        make_folder(folder)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        with storage_errors(path):
            _take(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def refuse_locked(folder: Path) -> None:
    """Check that no other process holds the lock of a folder, without taking or making it.

    Raises:
        RunFailed: `run.locked`, naming the holder.
    """
    path = folder / NAME
    with storage_errors(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(descriptor, path) from None
        finally:
            os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(descriptor, path) from None
    started = datetime.now(UTC).isoformat(timespec="seconds")
    holder = f"pid {os.getpid()} on {socket.gethostname()}, started {started}"
    os.ftruncate(descriptor, 0)
    write_all(descriptor, f"{holder}\n".encode())


def _held(descriptor: int, path: Path) -> RunFailed:
    holder = printable(os.pread(descriptor, 400, 0).decode(errors="replace").strip(), 400)
    return RunFailed(
        "run.locked",
        f"another run holds this folder: {holder or 'it has not said which'}",
        where=str(path),
        help="wait until it ends, stop it, or give this run another output_dir",
    )
