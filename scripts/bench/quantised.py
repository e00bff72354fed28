"""Train on a base in 4 bits through the command line, in several ways that must agree.

The first arm of a pair is what the second must equal: paged states those in memory, inputs that
wait in host memory those that stay, a run that was interrupted and resumed one that was not. Last
the adapter is merged into both kinds of weights, and the losses before and after are shown.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench import FEWEST, ROOT, say, slug
from machine import QUIET, TAIL

STEPS, INTERRUPTED = 12, 4
REQUEUE = 75  # the exit code of a run that a signal ended after a checkpoint
LETTERS = "etaoinshrdlu "


@dataclass(frozen=True)
class Arm:
    """A run: keys of `train`, and the arm that it must agree with, to the bit or to a share."""

    name: str
    train: dict[str, Any]
    like: str = ""
    within: float = 0.0
    interrupted: bool = False


ARMS = (
    Arm("AdamW in 8 bits", {"optimizer": "adamw_8bit"}),
    Arm("the same, paged", {"optimizer": "paged_adamw_8bit"}, "AdamW in 8 bits"),
    Arm(
        "the same, paged, interrupted",
        {"optimizer": "paged_adamw_8bit"},
        "the same, paged",
        interrupted=True,
    ),
    Arm("AdamW", {"optimizer": "adamw"}),
    Arm("AdamW, paged", {"optimizer": "paged_adamw_32bit"}, "AdamW", 1e-3),
    Arm("recomputed", {"gradient_checkpointing": True}),
    Arm("recomputed, inputs in host memory", {"gradient_checkpointing": "offload"}, "recomputed"),
)


def measured(
    model: Path, work: Path, left: Callable[[], float], *, tiny: bool = False
) -> dict[str, Any]:
    """Carry out every arm while there are seconds left, then merge the first one's adapter."""
    work.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("rows", 8 * STEPS, 0), ("held-out", 8, 1)):
        write_rows(work / f"{name}.jsonl", count, 60 if tiny else 1500, seed)
    rows: list[dict[str, Any]] = []
    for arm in ARMS:
        say(f"nf4: {arm.name}")
        rows.append(one_arm(arm, model, work, left()))
    by_name = {row["name"]: row for row in rows}
    for arm, row in zip(ARMS, rows, strict=True):
        if arm.like and not {"error"} & (row.keys() | by_name[arm.like].keys()):
            row |= agreement(row, by_name[arm.like], arm.within)
    say("nf4: merge")
    return {"arms": rows, "merge": merged(work, left())}


def write_rows(path: Path, count: int, letters: int, seed: int) -> None:
    """Write rows of random letters, of which the tokenizer makes a token each."""
    draw = np.random.default_rng(seed)
    texts = ["".join(draw.choice(list(LETTERS), letters)) for _ in range(count)]
    path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts), encoding="utf-8")


def write_recipe(arm: Arm, model: Path, work: Path) -> Path:
    """Write the recipe of an arm; JSON is YAML."""
    recipe = {
        "model": {"path": str(model), "quantization": "nf4"},
        "data": {"train": "rows.jsonl", "eval": "held-out.jsonl", "format": "text"},
        "train": {
            "batch_size": 8,
            "micro_batch_size": 4,
            "log_every": 1,
            "save_every": 2,
            "deterministic": True,
            "gradient_checkpointing": False,
            **arm.train,
        },
        "output_dir": str(work / slug(arm.name)),
    }
    file = work / f"{slug(arm.name)}.yaml"
    file.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    return file


def one_arm(arm: Arm, model: Path, work: Path, seconds: float) -> dict[str, Any]:
    """Train as an arm says; return its losses, its speed and the digest of its adapter."""
    row: dict[str, Any] = {"name": arm.name}
    if seconds < FEWEST:
        return {**row, "error": "left out: the time was over"}
    recipe, run = write_recipe(arm, model, work), work / slug(arm.name)
    until = time.monotonic() + seconds
    if arm.interrupted:
        code, said = interrupted(recipe, run / "metrics.jsonl", until)
        if code != REQUEUE:
            return {**row, "error": f"expected exit code {REQUEUE}, got {code}: {said}"}
    mode = "--resume" if arm.interrupted else "--overwrite"
    code, said = command(["train", str(recipe), mode, "--json"], until)
    if code:
        return {**row, "error": f"exit code {code}: {said}"}
    told = json.loads(said)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    file = run / "adapter" / "adapter_model.safetensors"
    return {
        **row,
        "optimizer": json.loads((run / "run.json").read_text())["optimizer"],
        "losses": [one["loss"] for one in metrics if "loss" in one],
        "peak": told["peak_memory_bytes"],
        "tokens_per_second": round(told["tokens_per_second"]),
        "adapter_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


def interrupted(recipe: Path, metrics: Path, until: float) -> tuple[int, str]:
    """Send SIGTERM to a run after some of its steps; return how it ended."""
    with started(["train", str(recipe), "--overwrite"]) as run:
        while run.poll() is None and time.monotonic() < until:
            if metrics.is_file() and metrics.read_text().count('"loss"') >= INTERRUPTED:
                run.send_signal(signal.SIGTERM)
                break
            time.sleep(0.02)
        return ended(run, until)


def merged(work: Path, seconds: float) -> dict[str, Any]:
    """Merge the first arm's adapter into both kinds of weights; return the reports' losses."""
    found = {}
    for which in ("original", "dequantised"):
        arguments = ["merge", str(work / slug(ARMS[0].name)), "--overwrite", "--json"]
        arguments += ["--base-weights", which, "--out", str(work / f"merged-{which}")]
        code, said = command(arguments, time.monotonic() + seconds / 2)
        if code:
            return {"error": f"exit code {code}: {said}"}
        report = json.loads(said)
        found[which] = {"losses": report["losses"], "verify": report["verify"]}
    return found


def agreement(row: dict[str, Any], other: dict[str, Any], within: float) -> dict[str, Any]:
    """Return whether a run ended as another one: to the bit, or step by step within a share."""
    pairs = list(zip(row["losses"], other["losses"], strict=True))
    apart = max(abs(a - b) / abs(b) for a, b in pairs)
    same = row["adapter_sha256"] == other["adapter_sha256"]
    return {"like": other["name"], "apart": apart, "equal": apart <= within if within else same}


def command(arguments: list[str], until: float) -> tuple[int, str]:
    """Run the command to its end; return its exit code and what it printed, or its complaint."""
    with started(arguments) as run:
        return ended(run, until)


def started(arguments: list[str]) -> subprocess.Popen[str]:
    """Start the command without a network."""
    return subprocess.Popen(
        [sys.executable, "-m", "lorakit", *arguments, "--offline"],
        env={**os.environ, **QUIET, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(run: subprocess.Popen[str], until: float) -> tuple[int, str]:
    """Wait for the command's end, which comes at the latest when the time is over."""
    try:
        out, error = run.communicate(timeout=max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        run.kill()
        out, error = run.communicate()
    return run.returncode, out if run.returncode == 0 else error.strip()[-TAIL:]


def table(found: dict[str, Any]) -> str:
    """Return the arms and the merge as tables for people."""
    head = "nf4 | tokens/s | peak GiB | last loss | like | apart | equal"
    lines = [f"| {head} |", "|" + " --- |" * 7]
    for row in found["arms"]:
        if "error" in row:
            cells = [row["name"], *[""] * 5, row["error"].splitlines()[-1][:80]]
        else:
            numbers = [f"{row['tokens_per_second']:,}", f"{row['peak'] / 2**30:.2f}"]
            cells = [row["name"], *numbers, f"{row['losses'][-1]:.4f}"]
            cells += [str(row.get(key, "")) for key in ("like", "apart", "equal")]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join([*lines, "", f"merge: {json.dumps(found['merge'])}"])
