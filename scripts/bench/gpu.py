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
import re
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
import wheels
from bench import FEWEST, ROOT, Bench, commit, say

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
    bench = bench_of(options, "8b", warm=3, timed=20, seconds=min(35.0, 4 * options.minutes))
    prepare(bench, "8b", [config])
    found = {**heading(bench), **bench.roof(0.05, config)}
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
    return {**found, "not_equal": wrong, "pytest": pytest_gpu(options.work, bench.left)}


def pytest_gpu(work: Path, seconds: float) -> dict[str, Any]:
    """Run the tests that carry the marker gpu within seconds; where pytest is missing, say so."""
    if importlib.util.find_spec("pytest") is None:
        return {"error": "pytest is not installed on this machine"}
    files = sorted(str(file) for file in (ROOT / "tests").glob("test_gpu*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", *files]
    done = machine.run(
        ["env", "-C", str(ROOT), "OFFLINE=1", *command],
        work / "pytest",
        threads=len(os.sched_getaffinity(0)),
        limit=max(FEWEST, seconds),
    )
    tail = (done.out + done.error).strip().splitlines()[-15:]
    passed = re.search(r"\b(\d+) passed\b", tail[-1] if tail else "")
    return {
        "code": done.code,
        "passed": int(passed[1]) if passed else 0,
        "tail": tail,
        "seconds": done.seconds,
    }


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the peak of two steps with the plan's estimate, over the fixed grid."""
    options.work.mkdir(parents=True, exist_ok=True)
    earlier = options.earlier / "memory.json"
    done = memory_grid.numbers_of(earlier)
    numbers = [1, 4, 6] if TINY else range(1, 1 + len(memory_grid.grid(options.device)))
    rows = memory_grid.measured(
        options.device,
        options.work,
        minutes=options.minutes,
        only=[number for number in numbers if number not in done],
        tiny=TINY,
    )
    return memory_grid.with_earlier(memory_grid.results(options.device, rows), earlier)


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
            found = {**heading(bench), **bench.roof(0.02, config), **found}
        found["configs"].append(bench.measured(config, arms))
    return found


def peers_environment(options: argparse.Namespace) -> tuple[Path | None, str]:
    """Return a Python with the peers and what it is, or None and why there is none."""
    if importlib.util.find_spec("trl"):
        return Path(sys.executable), "trl is installed on this machine"
    if not options.wheels:
        return None, "no trl on this machine, and WHEELS names no folder of wheels"
    try:
        python = wheels.overlay(options.work / "peers", sorted(options.wheels.glob("*.whl")))
    except subprocess.CalledProcessError as error:
        return None, f"pip: {error.stderr.strip()[-600:]}"
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


def failures(found: Any, at: str = "") -> list[str]:
    """Return what of a section's results failed, did not agree, or did not run."""
    if isinstance(found, list):
        return [one for n, part in enumerate(found, 1) for one in failures(part, f"{at} {n}")]
    if not isinstance(found, dict):
        return []
    failed = [f"{at}: {found['error']}"] if found.get("error") else []
    failed += [f"{name} is not equal" for name in found.get("not_equal", [])]
    if "passed" in found and (found["code"] or not found["passed"]):
        failed.append(f"{at}: exit code {found['code']}, {found['passed']} passed")
    return failed + [one for key, part in found.items() for one in failures(part, f"{at} {key}")]


def main() -> int:
    """Carry out one section; return 1 when something that must hold does not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--earlier", type=Path, help="folder of results to go on from; else --out")
    parser.add_argument("--work", type=Path, default=cache_folder() / "bench-gpu")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of peers")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.earlier = options.earlier or options.out
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
    failed = failures(found, options.section)
    for one in failed:
        say(one.strip().splitlines()[-1])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
