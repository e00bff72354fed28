"""What a child asks of the kernel: each change to the disk, listed, refused, or its last act.

strace attaches to a child that waits, so the kernel itself is the witness: calls of Rust and C
libraries are seen as well as Python's. The child does in one thread what lorakit shares out among
several: no call hides in another thread, and the same number is the same call.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lorakit import threads
from tests.faults.forked import Child, Ended

CHANGES = (
    "open openat mkdir mkdirat write pwrite64 writev pwritev ftruncate fsync fdatasync chmod fchmod"
    " fchmodat rename renameat renameat2 link linkat symlink unlink unlinkat rmdir"
    " copy_file_range sendfile"
).split()
WRITABLE = ("O_WRONLY", "O_RDWR", "O_CREAT")
_LINE = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
_QUOTED = re.compile(r'(?:(?:AT_FDCWD|\d+)<(?P<at>[^>]*)>, )?"(?P<path>(?:[^"\\]|\\.)*)"')
_OPENED = re.compile(r"\d+<(?P<path>[^>]*)>")
_COPIED_TO = re.compile(r"\d+<[^>]*>, (?:NULL|\[[^]]*\]), \d+<(?P<path>[^>]*)>")

Action = Callable[[], int | None]


@dataclass(frozen=True)
class Call:
    """A call that changed the disk: the `number`-th of its name."""

    name: str
    number: int
    paths: tuple[str, ...]
    flags: str

    def __str__(self) -> str:
        return f"{self.name} {' → '.join(self.paths)}"


@cache
def why_not() -> str | None:
    """Say why calls cannot be traced here, None when they can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    ended, complaint = _traced(lambda: 0, "-e", "trace=none")
    return None if ended and ended.code == 0 else f"ptrace is not allowed: {complaint.strip()}"


def listed(action: Action, below: Path, log: Path) -> list[Call]:
    """Carry out an action; return each call that changed something below a folder."""
    trace = f"trace={','.join(CHANGES)}"
    ended, complaint = _traced(action, "-y", "-s", "0", "-e", trace, "-o", str(log))
    assert ended, complaint
    assert ended.code == 0, ended
    counts: Counter[str] = Counter()
    calls = []
    for line in log.read_text(errors="replace").splitlines():
        if (match := _LINE.match(line)) is None:
            continue
        name, arguments = match["name"], match["arguments"]
        counts[name] += 1
        if int(match["result"]) < 0:
            continue
        if name.startswith("open") and not any(flag in arguments for flag in WRITABLE):
            continue
        paths = _paths(arguments)
        if paths and Path(paths[0]).is_relative_to(below):
            calls.append(Call(name, counts[name], paths, arguments))
    return calls


def killed_before(call: Call, action: Action) -> Ended:
    """Carry out an action in a child that is killed before one call takes effect."""
    ended, _ = _injected(call, action, "signal=KILL")
    return ended


def refused_at(call: Call, action: Action, error: str) -> tuple[Ended, str]:
    """Carry out an action in a child of which one call fails with an error such as `ENOSPC`.

    Returns how it ended, and the call that failed as strace shows it: calls are told by number, and
    what only reads is not called equally often each time, so it may be another than was asked for.
    """
    ended, lines = _injected(call, action, f"error={error}")
    return ended, next((line for line in lines if "(INJECTED)" in line), "none")


def _injected(call: Call, action: Action, what: str) -> tuple[Ended, list[str]]:
    inject = f"inject={call.name}:{what}:when={call.number}"
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        options = ("-y", "-s", "0", "-e", f"trace={call.name}", "-e", inject, "-o", log.name)
        ended, complaint = _traced(action, *options)
        assert ended, complaint
        return ended, log.read().splitlines()


def _traced(action: Action, *options: str) -> tuple[Ended | None, str]:
    """Carry out an action under strace; None with what strace said where it cannot attach."""
    child = Child(lambda: in_one_thread(action), held=True)
    strace = subprocess.Popen(
        ["strace", "-p", str(child.pid), *options], stderr=subprocess.PIPE, text=True
    )
    while not (attached := _is_traced(child.pid)) and strace.poll() is None:
        time.sleep(0.001)
    ended = child.release().ended()
    complaint = strace.communicate()[1]
    return (ended if attached else None), complaint


def in_one_thread(action: Action) -> int | None:
    """Carry out an action, each piece of work that lorakit shares out when it is handed over."""
    threads.ThreadPoolExecutor = _AtOnce  # type: ignore[assignment,misc]
    return action()


class _AtOnce(Executor):
    """Does what it is given before it answers, in the thread that asked: strace sees one thread."""

    def __init__(self, count: int) -> None:
        del count

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)
        return future


def _is_traced(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return "TracerPid:\t0\n" not in status


def _paths(arguments: str) -> tuple[str, ...]:
    """Return the whole paths that a call is about."""
    found = []
    for match in _QUOTED.finditer(arguments):
        path = match["path"].encode().decode("unicode_escape").encode("latin-1").decode()
        # What is written is left out, and stands there as an empty text.
        found.append(os.path.join(match["at"] or "", path).rstrip("/"))
    # A copy names where it comes from first.
    if not found and (match := _COPIED_TO.match(arguments) or _OPENED.match(arguments)):
        found.append(match["path"])
    return tuple(found)
