"""One run at a time in one folder."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from lorakit.errors import RunFailed
from lorakit.storage.disk import make_folder, storage_errors, write_all
from lorakit.storage.redact import printable

NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold the lock of a run's folder; the kernel frees it however the process ends.

    Yields what writes the holder's name into the lock: a run that finds that it may not go on
    leaves even that as it was. The file stays: removing it would let two processes lock two files
    of the same name.

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
        yield partial(_sign, descriptor, path)
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
    # A run that comes to nothing removes its folder, perhaps since the lock was opened here.
    if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
        raise _held(descriptor, path)


def _sign(descriptor: int, path: Path) -> None:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    holder = f"pid {os.getpid()} on {socket.gethostname()}, started {started}"
    with storage_errors(path):
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
