"""What every arm needs and no arm may do its own way: the job, the clock, memory, the report.

An arm is a process that gets a job file and prints one JSON object as the last line of stdout.
It runs in lorakit's environment or in the peers', so only the standard library is imported here.
"""

import gc
import json
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = "torch transformers peft trl accelerate datasets bitsandbytes lorakit".split()
STATUS = Path("/proc/self/status")


def read_job() -> dict[str, Any]:
    """Return the job that the harness wrote; the first argument is its file."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def read_rows(job: dict[str, Any]) -> tuple[list[dict[str, list[int]]], list[list[int]]]:
    """Return the rows, each with `input_ids` and `labels`, and which of them each step takes."""
    stored = json.loads(Path(job["rows_file"]).read_text(encoding="utf-8"))
    return stored["rows"], stored["order"]


class Clock:
    """Times steps from end to end, and says when there are enough of them.

    Everything between two steps counts: fetching data, reading the loss. Warm-up ends after
    `warm` steps. Timing ends after `timed` more, or when `seconds` are over and at least one
    step is timed; so a slow arm gives few steps, which are said, and not none.
    """

    def __init__(self, job: dict[str, Any], torch: Any) -> None:
        self.warm, self.most = job["warm"], job["warm"] + job["timed"]
        self.limit = job.get("seconds") or float("inf")
        self.torch, self.cuda = torch, job["device"] == "cuda"
        self.seconds: list[float] = []
        self.began = self.last = 0.0

    def start(self) -> None:
        """Begin the first step."""
        self._wait()
        self.began = self.last = time.perf_counter()

    def tick(self) -> bool:
        """End a step; tell whether it was the last."""
        self._wait()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        steps = len(self.seconds)
        if self.cuda and steps == self.warm:
            self.torch.cuda.reset_peak_memory_stats()
        return steps >= self.most or (steps > self.warm and now - self.began > self.limit)

    def _wait(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()


def status_bytes(field: str) -> int:
    """Return a size from the kernel's account of this process, such as VmHWM or RssAnon."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def peak_memory(torch: Any, device: str) -> dict[str, int]:
    """Return the most memory in use: resident on a CPU, of the allocator on a GPU."""
    if device != "cuda":
        return {"peak": status_bytes("VmHWM"), "anonymous": status_bytes("RssAnon")}
    free, total = torch.cuda.mem_get_info()
    return {
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "device": total - free,
    }


def settled(torch: Any, device: str) -> dict[str, int]:
    """Return the memory in use once the model is loaded."""
    gc.collect()
    if device != "cuda":
        return {"resident": status_bytes("VmRSS"), "peak": status_bytes("VmHWM")}
    return {"allocated": torch.cuda.memory_allocated()}


def versions() -> dict[str, str]:
    """Return the versions of what takes part, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def report(**facts: Any) -> None:
    """Print the arm's one JSON object."""
    print(json.dumps({**facts, "versions": versions()}), flush=True)


def save_tensors(tensors: dict[str, Any], path: str, save_file: Any) -> None:
    """Write tensors by name, in fp32 on the CPU, for a comparison between arms."""
    save_file({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}, path)
