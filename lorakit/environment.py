"""The environment variables lorakit reads, and no others.

Standard library only: `--help`, `recipes` and the fetch script must not wait for torch.
"""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from lorakit.errors import BadInput

VARIABLES = {
    "LORAKIT_CACHE": "folder for models and tokenised data; else XDG_CACHE_HOME/lorakit",
    "XDG_CACHE_HOME": "the user's cache folder; else ~/.cache",
    "HF_HUB_OFFLINE": "1: never reach the network",
    "HF_TOKEN": "token for gated models; only its presence is ever shown",
    "HUGGING_FACE_HUB_TOKEN": "the same, by its old name",
    "NO_COLOR": "no colour",
    "FORCE_COLOR": "colour off a terminal too",
    "GITHUB_STEP_SUMMARY": "file that `eval` adds its table to",
    "RANK": "number of this process, set by the launcher",
    "LOCAL_RANK": "number of this process on its machine, set by the launcher",
    "WORLD_SIZE": "number of processes, set by the launcher",
    "LOCAL_WORLD_SIZE": "number of processes on this machine; else all of them are on it",
    "GLIBC_TUNABLES": "how the C library allocates; `train` and `merge` set it where nobody has",
    "CUBLAS_WORKSPACE_CONFIG": "workspaces of cuBLAS; set where they do not give equal bits",
    "OMP_NUM_THREADS": "threads of the CPU kernels; else the cores this process may use",
}

# How often a thread of a CPU kernel looks for the others before it sleeps. Where each has a core of
# its own, long looking is fast; where cores are shared it wastes whole time slices of the others.
# Steps of the quick start on two cores, tokens/s: idle 160 at 10,000, 190 at 30,000, 170 at
# libgomp's own 300,000; beside two busy processes 64 at 1,000, 36 at 10,000, 29 at 30,000.
SPINS, SPINS_SHARED = 30_000, 1_000
# How many kernels oneDNN keeps for the shapes it has met, and how many of them torch keeps once
# more. Their own number is 1,024 each, a kernel is 0.3 to 0.7 MB, and rows of text have another
# shape in each step: the quick start grew from 1.0 to 1.8 GiB. A step has 50 to 75, with many long
# rows 200: where oneDNN keeps fewer it makes all of them again in each layer, 0.3 ms each. What
# torch lacks costs 10 us.
KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "64"}


def variable(name: str) -> str | None:
    """Return a variable of the list above, None where it is unset or empty.

    Raises:
        KeyError: when the name is not on the list.
    """
    VARIABLES[name]
    return os.environ.get(name) or None


def count(name: str, default: int, *, least: int = 0) -> int:
    """Return a variable that holds a whole number.

    Raises:
        BadInput: `usage`, when it holds something else.
    """
    value = variable(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit() and len(value) < 10 and int(value) >= least):
        message = f"the variable {name} is {value!r}; a whole number from {least} on is expected"
        raise BadInput("usage", message, help=f"take it out, or set it: {VARIABLES[name]}")
    return int(value)


def all_variables() -> Mapping[str, str]:
    """Return the whole environment: for `${VAR}` in recipes and for finding secrets to hide."""
    return os.environ


def cache_folder() -> Path:
    """Return lorakit's cache folder; it may not exist yet.

    Raises:
        BadInput: `usage`, when it is below the home of a user who is not known here.
    """
    parent = variable("XDG_CACHE_HOME") or "~/.cache"
    folder = os.path.expanduser(variable("LORAKIT_CACHE") or os.path.join(parent, "lorakit"))
    if folder.startswith("~"):
        message = f"the cache folder is {folder}, and there is no such home"
        raise BadInput("usage", message, help="set LORAKIT_CACHE to a folder")
    return Path(folder)


def offline() -> bool:
    """Tell whether the network is off for this process."""
    return (variable("HF_HUB_OFFLINE") or "0").lower() in ("1", "true", "yes", "on")


def quiet_libraries(*, offline: bool) -> None:
    """Set what libraries read at import: no hub kernels, no telemetry, no conversion uploads.

    What they say at run time is not for the terminal either.
    """
    os.environ["USE_HUB_KERNELS"] = "0"
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ["RUST_BACKTRACE"] = "0"  # a panic of theirs becomes an error of ours
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS if _cores_are_free() else SPINS_SHARED))
    for name, most in KERNELS.items():
        os.environ.setdefault(name, most)
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _cores_are_free(seconds: float = 0.05) -> bool:
    """Tell whether each thread of the CPU kernels finds a core that nobody else uses now."""
    every = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else every
    given = variable("OMP_NUM_THREADS") or ""
    threads = min(int(given), cores) if given.isdecimal() else cores
    try:
        before = _busy_seconds()
        time.sleep(seconds)
        busy = (_busy_seconds() - before) / seconds
    except (OSError, ValueError):
        return True
    return threads + busy <= every + 0.5


def _busy_seconds() -> float:
    """Return the seconds that all cores of this machine have worked, as Linux counts them."""
    with open("/proc/stat", encoding="ascii") as stat:
        user, nice, system, _idle, _waiting, *interrupts = map(int, stat.readline().split()[1:9])
    return float(user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
