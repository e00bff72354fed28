"""The environment variables lorakit reads, and no others.

Standard library only: `--help`, `recipes` and the fetch script must not wait for torch.
"""

import os
from collections.abc import Mapping
from pathlib import Path

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
    "OMP_NUM_THREADS": "threads of the CPU kernels; else the cores this process may use",
}


def variable(name: str) -> str | None:
    """Return a variable of the list above, None where it is unset or empty.

    Raises:
        KeyError: when the name is not on the list.
    """
    VARIABLES[name]
    return os.environ.get(name) or None


def all_variables() -> Mapping[str, str]:
    """Return the whole environment: for `${VAR}` in recipes and for finding secrets to hide."""
    return os.environ


def cache_folder() -> Path:
    """Return lorakit's cache folder; it may not exist yet."""
    if chosen := variable("LORAKIT_CACHE"):
        return Path(chosen).expanduser()
    parent = variable("XDG_CACHE_HOME")
    return (Path(parent) if parent else Path.home() / ".cache") / "lorakit"


def offline() -> bool:
    """Tell whether the network is off for this process."""
    return (variable("HF_HUB_OFFLINE") or "0").lower() in ("1", "true", "yes", "on")


def quiet_libraries(*, offline: bool) -> None:
    """Set what libraries read at import: no hub kernels, no telemetry, no conversion uploads.

    Threads of a CPU kernel spin while they wait for each other; where cores are shared the default
    spins away whole time slices (measured: 2 to 3 times slower beside two other processes).
    """
    os.environ["USE_HUB_KERNELS"] = "0"
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
