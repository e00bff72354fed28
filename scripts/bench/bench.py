"""Carry out configurations: shared files first, then one process for each arm, then compare.

The harness itself stays small and imports neither torch nor transformers: a child's peak memory
counts from its parent's size.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import compare
import machine
from configs import NAMES, Arm, Config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
AGAIN = " (again)"
FEWEST = 30.0  # seconds without which no arm is started


@dataclass
class Bench:
    """One run of the harness: where things are, how they are measured, how long it may take."""

    work: Path
    model: Path
    minutes: float
    threads: int
    device: str = "cpu"
    warm: int = 1
    timed: int = 10
    seconds: float | None = None
    busy: bool = False
    patience: float = 60.0
    shrink: int = 1
    peers: Path | None = None
    no_peers: str = "no environment for the peers"
    facts: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.minutes * 60 - (time.monotonic() - self.began)

    def run(self, python: Path | str, script: str, job: dict[str, Any], name: str) -> machine.Done:
        """Run one of the scripts beside this one with a job, watched."""
        folder = self.work / "runs" / slug(name)
        folder.mkdir(parents=True, exist_ok=True)
        job_file = folder / "job.json"
        job_file.write_text(json.dumps({**job, "folder": str(folder)}), encoding="utf-8")
        return machine.run(
            [str(python), str(HERE / script), str(job_file)],
            folder,
            threads=self.threads,
            limit=max(FEWEST, self.left),
            patience=0.0 if self.busy else self.patience,
            env={"PYTHONPATH": str(ROOT), **job.get("env", {})},
        )

    def prepare(self, chosen: list[Config], **more: Any) -> None:
        """Have rows, initial values and synthetic models written by a process of its own."""
        task: dict[str, Any] = {"model": str(self.model), "configs": [], **more}
        for config in chosen:
            folder = self.folder(config)
            folder.mkdir(parents=True, exist_ok=True)
            task["configs"].append(
                {
                    "id": config.id,
                    "lengths": [max(4, n // self.shrink) for n in config.lengths],
                    "masked": config.masked,
                    "steps": config.steps,
                    "started": config.started,
                    "text": config.text,
                    "rows_file": str(folder / "rows.json"),
                    "init_file": str(folder / "init.safetensors"),
                }
            )
        self.facts = self.run(sys.executable, "prepare.py", task, "prepare").last_json()

    def folder(self, config: Config) -> Path:
        """Return where the files of a configuration are."""
        return self.work / config.id

    def roof(self, seconds: float, config: Config | None = None) -> dict[str, Any]:
        """Return the rates of matrix products of the model's shapes, as tall as a configuration's.

        Without one they are as tall as is usual on a CPU.
        """
        say("the roof: matrix products")
        job = {"sizes": self.facts["sizes"], "device": self.device, "seconds": seconds}
        if config:
            job["tokens"] = max(4, config.micro_batch_tokens // self.shrink)
        done = self.run(sys.executable, "roof.py", job, "roof")
        return {**done.last_json(), "roof_busy": done.busy}

    def measured(self, config: Config, more: tuple[Arm, ...] = ()) -> dict[str, Any]:
        """Run every arm of a configuration, the first again at the end, and compare them."""
        arms = [(arm, arm.name) for arm in (*config.arms, *more)]
        if config.steps == 1:
            arms.append((config.arms[0], config.arms[0].name + AGAIN))
        truth = config.truth
        if truth and truth not in config.arms and self.facts["dtype"] != "fp32":
            arms.append((truth, truth.name))
        found = [self.one_arm(config, arm, name) for arm, name in arms]
        compare.losses(found, config.reference, truth.name if truth else None)
        compare.gradients(found, config.reference)
        counts = self.facts["configs"][config.id]
        for row in found:
            compare.rates(row, counts)
        about = {"id": config.id, "about": config.about, "steps": config.steps}
        return {**about, **counts, "arms": found}

    def one_arm(self, config: Config, arm: Arm, name: str) -> dict[str, Any]:
        """Run one arm; return what it reported, or why it did not."""
        dtype = self.facts["dtype"] if arm.dtype == "best" else arm.dtype
        row: dict[str, Any] = {"name": name, "ours": arm.ours, "dtype": dtype}
        python = Path(sys.executable) if arm.ours else self.peers
        if python is None:
            return {**row, "error": self.no_peers}
        if self.left < FEWEST:
            return {**row, "error": f"left out: the {self.minutes:g} minutes were over"}
        job = self.job(config, arm, name, dtype)
        say(f"{config.id} {name}")
        for attempt in (1, 2):
            done = self.run(python, arm.script, job, f"{config.id} {name}")
            row |= {"wall": done.seconds, "load": done.load, "busy": done.busy}
            if self.busy or not done.busy or attempt == 2 or self.left < 3 * done.seconds:
                break
            say(f"{config.id} {name}: others used {done.load['others']} cores, once more")
        try:
            reported = done.last_json()
        except RuntimeError as error:
            return {**row, "error": str(error)}
        used = NAMES[reported.pop("dtype")]
        files = {"gradients_file": job["gradients"]} if "gradients" in job else {}
        return {**row, "warm": job["warm"], **reported, "dtype": used, **files}

    def job(self, config: Config, arm: Arm, name: str, dtype: str) -> dict[str, Any]:
        """Return what an arm is told."""
        folder, equality = self.folder(config), config.steps > 1
        job = {
            "model": str(self.model),
            "rows_file": str(folder / "rows.json"),
            "init_file": str(folder / "init.safetensors"),
            "device": self.device,
            **arm.options,
            "dtype": dtype,
            "warm": 1 if equality else self.warm,
            "timed": config.steps - 1 if equality else self.timed,
            "seconds": None if equality else self.seconds,
        }
        if job.pop("gradients", None):
            job["gradients"] = str(folder / f"{slug(name)}.safetensors")
        return job


def slug(name: str) -> str:
    """Return a name as a file can have it."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in name.replace(",", ""))


def say(text: str) -> None:
    """Tell a person what goes on."""
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


def commit() -> str:
    """Return the commit that is measured, with a + when the package differs from it."""
    head = _git("rev-parse", "--short", "HEAD") or "unknown"
    return head + ("+" if _git("status", "--porcelain", "lorakit") else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
