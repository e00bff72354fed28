"""Measure and check lorakit on one CUDA machine without a network: a section is one call.

    bash scripts/gpu_check.sh tests g1 g3 g5 quantised memory peers

Bases are built from their shapes with random weights, on the device, and kept on the local disk.
Each section writes one JSON file and prints a table. BENCH_TINY=1 takes models and rows of a few
kilobytes, and a CPU where there is no GPU: it tests the harness, not the machine.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import configs
import machine
import memory_grid
import quantised
import report
from bench import ROOT, Bench, commit, say

sys.path.insert(0, str(ROOT))

from lorakit.environment import cache_folder  # the package need not be installed

TINY = os.environ.get("BENCH_TINY") == "1"
MINUTES = 8.5
SHAPES = {"8b": configs.LLAMA_8B, "1b": configs.LLAMA_1B}
TINY_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
}


def bench_of(options: argparse.Namespace, shape: str, **settings: Any) -> Bench:
    """Return a bench over a base of a shape that stands on the local disk when it is prepared."""
    model = options.work / ("tiny" if TINY else shape)
    bench = Bench(options.work, model, options.minutes, len(os.sched_getaffinity(0)), **settings)
    bench.device, bench.busy, bench.peers = options.device, True, Path(sys.executable)
    bench.shrink = 16 if TINY else 1
    bench.began = options.began
    return bench


def prepare(bench: Bench, shape: str, chosen: list[configs.Config]) -> None:
    """Write the base, unless it is there, and what the arms share."""
    say(f"preparing {bench.model.name}")
    sizes = TINY_SHAPE if TINY else SHAPES.get(shape, TINY_SHAPE)
    bench.prepare(chosen, models=[{"folder": str(bench.model), "shape": sizes}])


def heading(bench: Bench) -> dict[str, Any]:
    """Return what a section's results begin with."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": commit(),
        "machine": machine.describe() | {"gpu": bench.facts["gpu"]},
        "device": bench.device,
        "tiny": TINY,
        "settings": {k: getattr(bench, k) for k in ("warm", "timed", "seconds", "threads")},
        "dtype": bench.facts["dtype"],
        "sizes": bench.facts["sizes"],
    }


def speed(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Run G1, G3 or G5 as they are settled."""
    config = next(config for config in configs.GPU if config.id == name)
    if name == "G5" and (reason := no_nf4()):
        return {"error": reason, "arms": []}
    bench = bench_of(options, "8b", warm=3, timed=20, seconds=35.0)
    prepare(bench, "8b", [config])
    found = {**heading(bench), **bench.roof(0.05)}
    return {**found, "configs": [bench.measured(config)]}


def no_nf4() -> str | None:
    """Return why lorakit cannot train on an NF4 base here, None when it can."""
    from lorakit.recipe.sections import Model

    field = Model.model_fields.get("quantization")
    if field is None or "nf4" not in get_args(field.annotation):
        return "not available yet: model.quantization knows no nf4 in this version of lorakit"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "did not run: bitsandbytes is not installed on this machine"
    return None


def tests(options: argparse.Namespace) -> dict[str, Any]:
    """Compare lorakit with PEFT in losses and gradients on the device, and run pytest -m gpu."""
    bench = bench_of(options, "tests", warm=1, timed=4)
    bench.shrink = 1
    prepare(bench, "tests", [configs.GPU_LAWS])
    laws = bench.measured(configs.GPU_LAWS)
    found = {**heading(bench), **bench.roof(0.01), "configs": [laws]}
    wrong = [arm["name"] for arm in laws["arms"] if "error" in arm or arm.get("equal") is False]
    return {**found, "not_equal": wrong, "pytest": pytest_gpu(options.work)}


def pytest_gpu(work: Path) -> dict[str, Any]:
    """Run the tests that carry the marker gpu; where pytest is missing, say so."""
    if importlib.util.find_spec("pytest") is None:
        return {"error": "pytest is not installed on this machine"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = machine.run(
        ["env", "-C", str(ROOT), "OFFLINE=1", *command],
        work / "pytest",
        threads=len(os.sched_getaffinity(0)),
        limit=300.0,
    )
    tail = (done.out + done.error).strip().splitlines()[-15:]
    return {"code": done.code, "no_tests": done.code == 5, "tail": tail, "seconds": done.seconds}


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the peak of two steps with the plan's estimate, over the fixed grid."""
    options.work.mkdir(parents=True, exist_ok=True)
    rows = memory_grid.measured(
        options.device,
        options.work,
        minutes=options.minutes,
        only=[1, 4, 6] if TINY else None,
        tiny=TINY,
    )
    return memory_grid.results(options.device, rows)


def quantise(options: argparse.Namespace) -> dict[str, Any]:
    """Train on NF4 through the command line, with pairs of runs that must end alike, and merge."""
    if reason := no_nf4():
        return {"error": reason, "arms": []}
    bench = bench_of(options, "1b")
    prepare(bench, "1b", [])
    found = {**heading(bench), "quantised": True}
    found |= quantised.measured(
        bench.model, options.work / "quantised", lambda: bench.left, tiny=TINY
    )
    wrong = [arm["name"] for arm in found["arms"] if "error" in arm or arm.get("equal") is False]
    return {**found, "not_equal": wrong + (["merge"] if "error" in found["merge"] else [])}


def peers(options: argparse.Namespace) -> dict[str, Any]:
    """Run the peers that came as wheels: an environment of their own over this machine's."""
    python, note = peers_environment(options)
    found: dict[str, Any] = {"environment": note, "configs": []}
    for name, arms in configs.GPU_PEERS.items():
        settled = next(config for config in configs.GPU if config.id == name)
        config = replace(settled, arms=settled.arms[:1])
        bench = bench_of(options, "8b", warm=2, timed=8, seconds=25.0)
        prepare(bench, "8b", [config])
        bench.peers = python
        bench.no_peers = note
        if "roof" not in found:
            found = {**heading(bench), **bench.roof(0.02), **found}
        found["configs"].append(bench.measured(config, arms))
    return found


def peers_environment(options: argparse.Namespace) -> tuple[Path | None, str]:
    """Return a Python with the peers and what it is, or None and why there is none."""
    if importlib.util.find_spec("trl"):
        return Path(sys.executable), "trl is installed on this machine"
    if not options.wheels:
        return None, "no trl on this machine, and WHEELS names no folder of wheels"
    folder = options.work / "peers"
    python = folder / "bin" / "python"
    commands = (
        [sys.executable, "-m", "venv", "--system-site-packages", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        + [str(wheel) for wheel in sorted(options.wheels.glob("*.whl"))],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return None, f"{' '.join(command[1:5])}: {done.stderr.strip()[-600:]}"
    return python, f"wheels from {options.wheels.name}"


SECTIONS = {
    "tests": tests,
    "g1": lambda options: speed(options, "G1"),
    "g3": lambda options: speed(options, "G3"),
    "g5": lambda options: speed(options, "G5"),
    "quantised": quantise,
    "memory": memory,
    "peers": peers,
}


def main() -> int:
    """Carry out one section; return 1 when something that must hold does not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--work", type=Path, default=cache_folder() / "bench-gpu")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of peers")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.began = time.monotonic()
    has_gpu = Path("/dev/nvidiactl").exists()
    if not has_gpu and not TINY:
        print("no CUDA device here; BENCH_TINY=1 tries the harness on a CPU", file=sys.stderr)
        return 1
    options.device = "cuda" if has_gpu else "cpu"
    found = SECTIONS[options.section](options)
    found["minutes"] = round((time.monotonic() - options.began) / 60, 2)
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out / f"{options.section}.json"
    text = json.dumps(found, indent=1).replace(f"{options.work}/", "")
    out.write_text(text + "\n", encoding="utf-8")
    print(report.gpu(found))
    say(f"wrote {out}")
    return (
        1 if found.get("not_equal") or found.get("pytest", {}).get("code", 0) not in (0, 5) else 0
    )


if __name__ == "__main__":
    sys.exit(main())
