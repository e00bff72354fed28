"""C5 and C6: what a user waits for at a prompt, timed from outside the process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "recipes" / "data" / "support" / "train.jsonl"
LORAKIT = [sys.executable, "-m", "lorakit"]
LIMIT = 300.0


@dataclass(frozen=True)
class Setting:
    """Where and how commands run."""

    work: Path
    model: Path
    dtype: str
    peers: Path | None
    threads: int
    patience: float

    def run(self, command: list[str], name: str) -> machine.Done:
        """Run a command that must end well."""
        done = machine.run(
            command,
            self.work / "commands" / name,
            threads=self.threads,
            limit=LIMIT,
            patience=self.patience,
            env={"PYTHONPATH": str(ROOT)},
        )
        if done.code:
            raise RuntimeError(f"{name}: exit code {done.code}: {done.error.strip()[-800:]}")
        return done


def start_up(setting: Setting) -> dict[str, Any]:
    """Return the seconds of `--help`, of `plan`, and to the first step of either side."""
    changes = [f"model.path={setting.model}", f"model.dtype={setting.dtype}"]
    changes += ["train.max_steps=1", "train.log_every=1", "merge.enabled=false"]
    options = [part for change in changes for part in ("-s", change)]
    planned = [*LORAKIT, "plan", "quickstart", *options]
    # The first of each reads what is not in the page cache yet, and compiles Python's files.
    helps = [setting.run([*LORAKIT, "--help"], "help") for _ in range(5)]
    plans = [setting.run(planned, "plan") for _ in range(3)]
    found: dict[str, Any] = {
        "help": timings(helps[1:]),
        "plan": timings(plans[1:]),
        "lorakit_first_step": attempt(lambda: first_steps(_own_first_step, setting, options)),
    }
    if setting.peers:
        found["peft_first_step"] = attempt(lambda: first_steps(_peer_first_step, setting, []))
    return found


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what was measured, or the error that says why not."""
    try:
        return measure()
    except (RuntimeError, OSError) as error:
        return {"error": str(error)}


def timings(runs: list[machine.Done]) -> dict[str, Any]:
    """Return the shortest of some runs, and all of them."""
    seconds = [run.seconds for run in runs]
    return {"seconds": min(seconds), "all": seconds, "busy": any(run.busy for run in runs)}


def first_steps(
    once: Callable[[Setting, list[str]], float], setting: Setting, options: list[str]
) -> dict[str, Any]:
    """Return the seconds from start to the end of the first step, the shorter of two runs."""
    loads, seconds = [], []
    for _ in range(2):
        loads.append(machine.wait_until_idle(setting.patience))
        seconds.append(round(once(setting, options), 3))
    return {"seconds": min(seconds), "all": seconds, "busy": max(loads) > machine.IDLE}


def _own_first_step(setting: Setting, options: list[str]) -> float:
    out, cache = (setting.work / "commands" / name for name in ("first-step", "first-step-cache"))
    command = [*LORAKIT, "train", "quickstart", *options, "--out", str(out), "--overwrite"]
    metrics = out / "metrics.jsonl"
    # Nothing kept from an earlier run on either side: both read and tokenise all rows.
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)

    def found() -> float | None:
        if not metrics.is_file() or not (lines := metrics.read_text().splitlines()):
            return None
        return float(json.loads(lines[0])["monotonic"])

    return _until(command, setting, found, {"LORAKIT_CACHE": str(cache)})


def _peer_first_step(setting: Setting, _: list[str]) -> float:
    script = Path(__file__).with_name("first_step.py")
    out = setting.work / "commands" / "first-step-peers"
    printed = setting.work / "commands" / "first-step-log" / "stdout"
    command = [str(setting.peers), str(script), str(setting.model), str(DATA)]
    shutil.rmtree(out, ignore_errors=True)
    names = {"bf16": "bfloat16", "fp32": "float32"}
    command += [names[setting.dtype], str(out)]

    def found() -> float | None:
        lines = printed.read_text().split() if printed.is_file() else []
        numbers = [line for line in lines if line.replace(".", "", 1).isdigit()]
        return float(numbers[0]) if numbers else None

    return _until(command, setting, found, {"HF_DATASETS_CACHE": str(out / "cache")})


def _until(
    command: list[str],
    setting: Setting,
    found: Callable[[], float | None],
    env: dict[str, str],
) -> float:
    """Start a command, wait for the moment that it tells of, and end it."""
    folder = setting.work / "commands" / "first-step-log"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as error:
        began = time.monotonic()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=error,
            start_new_session=True,
            env=machine.environment(setting.threads, PYTHONPATH=str(ROOT), **env),
        )
        try:
            while (moment := found()) is None:
                if time.monotonic() > began + LIMIT or child.poll() is not None:
                    said = (folder / "stderr").read_text(errors="replace").strip()[-800:]
                    raise RuntimeError(f"no first step, exit code {child.poll()}: {said}")
                time.sleep(0.01)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return moment - began


def merge(setting: Setting, bases: dict[str, tuple[Path, Path]]) -> dict[str, Any]:
    """Return time and peak memory of merging each adapter into its base, here and with PEFT."""
    found: dict[str, Any] = {}
    for name, (base, adapter) in bases.items():
        out, job = setting.work / "merged", setting.work / "merge.json"
        job.write_text(json.dumps({"base": str(base), "adapter": str(adapter), "out": str(out)}))
        ours = [*LORAKIT, "merge", str(adapter), "--base", str(base), "--out", str(out)]
        arms = {"lorakit": ours, "lorakit, not verified": [*ours, "--no-verify"]}
        if setting.peers:
            script = Path(__file__).with_name("arm_merge.py")
            arms["PEFT"] = [str(setting.peers), str(script), str(job)]
        size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        found[name] = {"bytes": size, "copy": attempt(partial(_copied, base, out))}
        for label, command in arms.items():
            found[name][label] = attempt(partial(_merged, setting, command, out))
    return found


def _copied(base: Path, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    shutil.copytree(base, out)
    os.sync()
    seconds = round(time.perf_counter() - began, 3)
    shutil.rmtree(out)
    return {"seconds": seconds}


def _merged(setting: Setting, command: list[str], out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    done = setting.run(command, "merge")
    shutil.rmtree(out)
    os.sync()
    return {"seconds": done.seconds, "peak": done.peak, "busy": done.busy, "load": done.load}
