"""The machine while it measures: who it is, whether it is idle, and what a child process used.

Standard library only, and small: a child's peak memory counts from its parent's size.
"""

import json
import os
import platform
import resource
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICK = os.sysconf("SC_CLK_TCK")
# Cores that others may use before and while something is timed (performance notes, 5.2).
IDLE = 0.3
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "USE_HUB_KERNELS": "0",
}
TAIL = 1500


@dataclass(frozen=True)
class Done:
    """What a child process left: its output, and what it used from start to end."""

    code: int
    out: str
    error: str
    seconds: float
    peak: int
    load: dict[str, float]

    @property
    def busy(self) -> bool:
        """Tell whether others used the cores meanwhile."""
        return max(self.load["before"], self.load["others"]) > IDLE

    def last_json(self) -> dict[str, Any]:
        """Return the JSON object on the last line of the output.

        Raises:
            RuntimeError: with the end of what the process said, when there is none.
        """
        lines = self.out.strip().splitlines()
        if self.code or not lines or not lines[-1].startswith("{"):
            said = (self.error.strip() or self.out.strip())[-TAIL:]
            raise RuntimeError(f"exit code {self.code}: {said}")
        return json.loads(lines[-1])


def busy_seconds() -> float:
    """Return the seconds of core time that this machine has spent on work, steal included."""
    fields = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _, _, irq, soft, steal = fields
    return (user + nice + system + irq + soft + steal) / TICK


def used_cores(seconds: float = 1.0) -> float:
    """Return how many cores are busy while this process only waits."""
    before = busy_seconds()
    time.sleep(seconds)
    return round((busy_seconds() - before) / seconds, 2)


def wait_until_idle(patience: float) -> float:
    """Wait until the cores are idle, at most so many seconds; return how many are busy."""
    until = time.monotonic() + patience
    while (used := used_cores()) > IDLE and time.monotonic() < until:
        time.sleep(4)
    return used


def environment(threads: int, **more: str) -> dict[str, str]:
    """Return a child's environment: fixed threads, no network, nothing of another Python."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    count = str(threads)
    return {**kept, **QUIET, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, **more}


def run(
    command: list[str],
    folder: Path,
    *,
    threads: int,
    limit: float,
    patience: float = 0.0,
    env: dict[str, str] | None = None,
) -> Done:
    """Run a command to its end on the first cores of this machine and say what it used."""
    folder.mkdir(parents=True, exist_ok=True)
    before = wait_until_idle(patience)
    cores = sorted(os.sched_getaffinity(0))[:threads]
    out, error = folder / "stdout", folder / "stderr"
    busy, began = busy_seconds(), time.perf_counter()
    with out.open("wb") as to_out, error.open("wb") as to_error:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=to_out,
            stderr=to_error,
            env=environment(threads, **(env or {})),
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        code, usage = _wait(child, limit)
    seconds = time.perf_counter() - began
    others = (busy_seconds() - busy - usage.ru_utime - usage.ru_stime) / seconds
    return Done(
        code,
        out.read_text(encoding="utf-8", errors="replace"),
        error.read_text(encoding="utf-8", errors="replace"),
        round(seconds, 3),
        usage.ru_maxrss * 1024,
        {"before": before, "others": round(max(0.0, others), 2), "average": os.getloadavg()[0]},
    )


def _wait(child: subprocess.Popen[bytes], limit: float) -> tuple[int, resource.struct_rusage]:
    until = time.monotonic() + limit
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode, usage
        if time.monotonic() > until:
            child.kill()
            until = float("inf")
        time.sleep(0.005)


def describe() -> dict[str, Any]:
    """Return what the machine is."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "flags": [flag for flag in flags if flag.startswith(("avx512_bf16", "amx", "avx512f"))],
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
