"""The cores and the memory of this machine that this process has, as Linux counts them."""

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class _Files(NamedTuple):
    """Where a version of control groups says what memory a group has: files, and a row of one."""

    top: str
    limit: str
    used: str
    cached: str


# By the controllers that a row of /proc/self/cgroup names: version 2 names none.
GROUPS = {
    "": _Files("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": _Files(
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}

GIB = 2**30  # bytes


def usable_cores() -> int:
    """Return how many cores this process may use: affinity and control-group quota."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def resident_bytes() -> int:
    """Return this process's resident memory."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def highest_bytes() -> int:
    """Return the most resident memory that this process has had since `reset_highest`.

    Not `ru_maxrss`, in which a process inherits what its parent had. The kernel brings its mark up
    to date only now and then.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            rows = dict(line.split(":", 1) for line in file)
        return 1024 * max(int(rows[name].split()[0]) for name in ("VmHWM", "VmRSS"))
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_highest() -> None:
    """Let the highest mark be that of what comes now; where the kernel refuses, it stays."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def available_bytes(root: Path = Path("/")) -> int:
    """Return the host memory that can still be had, within the limits of the control groups.

    `root` holds `proc` and `sys`.
    """
    try:
        with open(root / "proc/meminfo", encoding="ascii") as file:
            rows = dict(line.split(":", 1) for line in file)
        free = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return max(0, min([free, *_room_of_groups(root)]))


def _room_of_groups(root: Path) -> Iterator[int]:
    """Yield what each control group that this process is in, directly or not, has left.

    File pages that nobody has read for a while go first when memory is short: they are not counted
    as used, or a base that was just downloaded would leave no room for itself.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version = GROUPS.get("memory" if "memory" in controllers.split(",") else controllers)
        if version is None:
            continue
        top = root / version.top
        group = top / path.lstrip("/")  # in a container maybe the host's name for it: not there
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError, KeyError):
                limit = int((folder / version.limit).read_text(encoding="ascii"))
                used = int((folder / version.used).read_text(encoding="ascii"))
                stat = (folder / "memory.stat").read_text(encoding="ascii")
                cached = dict(row.split() for row in stat.splitlines())[version.cached]
                yield limit - used + int(cached)
            if folder == top:
                break
