"""Each file-system call of an action: listed, refused by the disk, or the last of its process."""

import errno
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITES = ("mkdir", "open", "pwrite", "write", "copy_file_range", "fchmod", "fsync", "rename")
CHANGES = (*WRITES, "unlink", "rmdir")


@contextmanager
def before_each(
    names: tuple[str, ...], act: Callable[[str, tuple[Any, ...]], None]
) -> Iterator[None]:
    """Call `act(name, arguments)` before each of these functions of `os`."""
    real = {name: getattr(os, name) for name in names}

    def watched(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            act(name, arguments)
            return real[name](*arguments, **options)

        return call

    try:
        for name in names:
            setattr(os, name, watched(name))
        yield
    finally:
        for name in names:
            setattr(os, name, real[name])


def kills(action: Callable[[], object]) -> Iterator[int]:
    """Run `action` in one forked child after the other; child K is killed before its K-th call."""
    number = 0
    killed = True
    while killed:
        number += 1
        killed = _killed_at(number, action)
        if killed:
            yield number


def refusals(action: Callable[[], object], code: int) -> Iterator[tuple[int, BaseException | None]]:
    """Run `action` again and again, its K-th call failing; yield K and the exception, if any."""
    number = 0
    while True:
        number += 1
        seen = 0

        def refuse(name: str, arguments: tuple[Any, ...], number: int = number) -> None:
            nonlocal seen
            seen += 1
            if seen == number:
                raise OSError(code, os.strerror(code))

        raised: BaseException | None = None
        with before_each(WRITES, refuse):
            try:
                action()
            except BaseException as error:
                raised = error
        if seen < number:
            return
        yield number, raised


def calls(action: Callable[[], object]) -> list[tuple[str, str]]:
    """Return each call of `action` and the path it is about."""
    found = []

    def note(name: str, arguments: tuple[Any, ...]) -> None:
        subject = arguments[0]
        if isinstance(subject, int):
            subject = os.readlink(f"/proc/self/fd/{subject}")
        found.append((name, os.fspath(subject)))

    with before_each(CHANGES, note):
        action()
    return found


def contents(folder: Path) -> dict[str, bytes] | None:
    """Return the bytes of each file below a folder; None when there is no folder."""
    if not folder.is_dir():
        return None
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def beside(folder: Path) -> set[str]:
    """Return what stands in a folder under a temporary name."""
    return {name for name in os.listdir(folder) if name.startswith((".tmp-", ".old-", ".trash-"))}


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _killed_at(number: int, action: Callable[[], object]) -> bool:
    with warnings.catch_warnings():  # torch may have threads; the child runs none of their code
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True
        assert os.WEXITSTATUS(status) == 0, "the action failed in the child"
        return False
    seen = 0
    try:

        def kill(name: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

        with before_each(CHANGES, kill):
            action()
        os._exit(0)
    finally:
        os._exit(1)
