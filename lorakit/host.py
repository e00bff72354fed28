"""The cores and the memory of this machine that this process has, as Linux counts them."""

import os
import resource

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
    """Return the most resident memory that this process has had.

    Not `ru_maxrss`, in which a process inherits what its parent had. The kernel brings its mark up
    to date only now and then.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            rows = dict(line.split(":", 1) for line in file)
        return 1024 * max(int(rows[name].split()[0]) for name in ("VmHWM", "VmRSS"))
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_bytes() -> int:
    """Return the host memory that can still be had, within the control group's limit."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            rows = dict(line.split(":", 1) for line in file)
        free = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit_file:
            limit = limit_file.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as used_file:
            return free if limit == "max" else min(free, int(limit) - int(used_file.read()))
    except (OSError, ValueError):
        return free
