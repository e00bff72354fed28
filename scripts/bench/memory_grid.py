"""The estimate of `lorakit plan` against the memory that two real steps take, over a fixed grid.

    python scripts/bench/memory_grid.py --out scripts/bench/results/memory-cpu.json

With `--only` it may be measured in pieces: rows of the same commit that the file has stay in it.
Each configuration is a process of its own: it plans, then loads the base and takes two steps with
lorakit's own loop. On a CPU what counts is how far its resident memory grows over what it was
before the base was loaded; on a GPU the allocator's peak. The estimate is without the overhead of
interpreter and driver. The grid was settled before the first measurement; misses stay in it.
"""

# ruff: noqa: E402  # what torch reads when it is imported is set first

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lorakit.environment import cache_folder, quiet_libraries
from lorakit.processes import tunables

quiet_libraries(offline=True)

import measure
from bench import commit

GOALS = {"cpu": 0.15, "cuda": 0.10}
RANK, SEED = 16, 42
QV = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Shape:
    """A base: a family and its widths, and the dtype that it is run in."""

    name: str
    family: str
    dtype: str
    widths: dict[str, int | bool]


@dataclass(frozen=True)
class Way:
    """How a base is trained: rows of a length, layers computed again, weights and targets."""

    length: int
    rows: int
    recomputed: str = "none"
    quantization: str = "none"
    targets: str = "all"


WAYS = (
    Way(512, 2),
    Way(512, 2, "half"),
    Way(512, 2, "all"),
    Way(1024, 1, targets="q, v"),
    Way(128, 8),
    Way(512, 2, quantization="nf4"),
    Way(256, 4, "all", "nf4", "q, v"),
    Way(1024, 1, "half", "int8"),
)


def _llama(hidden: int, mlp: int, layers: int, heads: int, keys: int, words: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": words,
        "max_position_embeddings": 8192,
    }


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
SHAPES = {
    "cpu": (
        Shape("SmolLM2-135M", "llama", "fp32", _llama(576, 1536, 30, 9, 3, 49152) | _TIED),
        Shape("wide", "llama", "fp32", _llama(1024, 2816, 6, 16, 4, 8192)),
        Shape("large vocabulary", "qwen2", "bf16", _llama(512, 1408, 12, 8, 2, 65536) | _TIED),
        Shape(
            "GPT-2",
            "gpt2",
            "fp32",
            {"n_embd": 768, "n_layer": 6, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
        ),
    ),
    "cuda": (
        Shape("Llama-3.2-1B", "llama", "bf16", _llama(2048, 8192, 16, 32, 8, 128256) | _TIED),
        Shape("Qwen2.5-1.5B", "qwen2", "bf16", _llama(1536, 8960, 28, 12, 2, 151936) | _TIED),
        Shape("Llama-3.1-8B", "llama", "bf16", _llama(4096, 14336, 32, 32, 8, 128256)),
        Shape(
            "GPT-2 XL",
            "gpt2",
            "bf16",
            {"n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257, "n_positions": 1024},
        ),
    ),
}
# On a GPU the same ways with so many more rows: the activations must be worth measuring.
ROWS = {"cpu": 1, "cuda": 4}
TINY = Shape("tiny", "llama", "fp32", _llama(64, 128, 2, 4, 2, 512))


def grid(device: str) -> list[tuple[Shape, Way]]:
    """Return every configuration of a device."""
    return list(product(SHAPES[device], WAYS))


def recipe_text(shape: Shape, way: Way, folder: Path, rows: int) -> str:
    """Return the recipe of a configuration; JSON is YAML."""
    gpt2 = shape.family == "gpt2"
    targets: Any = (["c_attn"] if gpt2 else list(QV)) if way.targets == "q, v" else "all-linear"
    return json.dumps(
        {
            "model": {
                "path": str(folder),
                "dtype": shape.dtype,
                "quantization": way.quantization,
            },
            "adapter": {"rank": RANK, "target_modules": targets},
            "data": {"train": "rows.jsonl", "max_length": way.length},
            "train": {
                "max_steps": 2,
                "batch_size": rows,
                "micro_batch_size": rows,
                "gradient_checkpointing": False,
            },
            "seed": SEED,
        }
    )


def write_model(folder: Path, shape: Shape) -> None:
    """Write a base of random weights with a small tokenizer."""
    import torch
    from prepare import write_tokenizer
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from lorakit.devices import DTYPES

    torch.manual_seed(SEED)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CONFIG_MAPPING[shape.family](**ids, **shape.widths)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[shape.dtype])
    model.save_pretrained(folder)
    write_tokenizer(folder)


def run_one(job: dict[str, Any]) -> dict[str, Any]:
    """Plan a configuration, carry out two steps of it, and return both accounts."""
    import torch
    from arm_lorakit import dataset

    from lorakit import adapters
    from lorakit.model.quantized import check_installed
    from lorakit.processes import Stop
    from lorakit.recipe.reader import read
    from lorakit.runtime import start
    from lorakit.training import loop
    from lorakit.training.folder import RunFolder
    from lorakit.training.plan import Permissions, make
    from lorakit.training.progress import Reporter
    from lorakit.training.run import prepare

    shape, way, folder = Shape(**job["shape"]), Way(**job["way"]), Path(job["folder"])
    rows = way.rows * job["more_rows"]
    ids = [[3 + n % 200 for n in range(way.length)]] * (2 * rows)
    data = dataset([{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids])
    file = Path(job["work"]) / "recipe.yaml"
    file.write_text(recipe_text(shape, way, folder, rows), encoding="utf-8")
    runtime = start()
    recipe = read(file, adapters.settings_for, environ={})
    plan = make(recipe, runtime, Permissions(offline=True), data=data)
    layers = plan.shape.layers
    recomputed = {"none": 0, "half": layers // 2, "all": layers}[way.recomputed]
    plan = plan.with_choices(plan.steps.limit, recomputed)
    if way.quantization != "none":
        check_installed(plan.quantization)
        import bitsandbytes  # noqa: F401  # counts as a library, not as the run
    device = runtime.device.type
    gc.collect()
    before = {"resident": measure.status_bytes("VmRSS")}
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    reporter = Reporter(2, 2, say=lambda _: None, console=None, metrics=None)
    run = prepare(plan, runtime, RunFolder(Path(job["work"]), True, {}), reporter, Stop())
    for index in range(2):
        loop.step(run, index)
    loop.read_numbers(run, keep=0)
    peak = measure.peak_memory(torch, device)
    taken = peak["peak"] - (before["resident"] if device == "cpu" else 0)
    parts = plan.memory.parts
    return {
        "tokens": plan.setup.tokens,
        "recomputed_layers": f"{recomputed} of {layers}",
        "estimate": parts,
        "estimated": plan.memory.total - parts["overhead"],
        "measured": taken,
        "peak": peak,
        "device": runtime.describe(),
    }


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in a process of its own."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    started = os.environ | tunables()  # as `lorakit train` starts
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=started)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        return {"error": (done.stderr.strip() or done.stdout.strip())[-1500:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def measured(
    device: str, work: Path, *, minutes: float, only: list[int] | None = None, tiny: bool = False
) -> list[dict[str, Any]]:
    """Measure the grid of a device until the time is over; what was not reached says so."""
    until = time.monotonic() + 60 * minutes
    rows = []
    for number, (shape, way) in enumerate(grid(device), 1):
        if only is not None and number not in only:
            continue
        shape = TINY if tiny else shape
        row: dict[str, Any] = {"number": number, "shape": shape.name, "dtype": shape.dtype}
        row |= asdict(way)
        folder = work / f"memory-{shape.name.replace(' ', '-')}"
        job = {"shape": asdict(shape), "way": asdict(way), "folder": str(folder), "work": str(work)}
        job["more_rows"] = ROWS[device]
        if time.monotonic() > until:
            row["error"] = "not run: the time was over"
        else:
            made = {} if (folder / "tokenizer.json").is_file() else child({**job, "write": True})
            row |= made if "error" in made else child(job)
        if "measured" in row:
            row["ratio"] = round(row["estimated"] / row["measured"], 3)
            print(f"{number:2} {shape.name}: {way}: {row['ratio']}", file=sys.stderr, flush=True)
        else:
            print(f"{number:2} {shape.name}: {way}: {row['error'][-200:]}", file=sys.stderr)
        rows.append(row)
    return rows


def results(device: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows with what they were measured on."""
    return {
        "grid": "memory",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": commit(),
        "device": next((row["device"] for row in rows if "device" in row), device),
        "versions": measure.versions(),
        "goal": GOALS[device],
        "rows": rows,
    }


def numbers_of(file: Path) -> set[int]:
    """Return which rows an earlier call measured on the same commit, with the same versions."""
    return {row["number"] for row in _earlier(file).get("rows", []) if "measured" in row}


def with_earlier(found: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return results with the rows that an earlier call measured on the same commit and device."""
    earlier = _earlier(file)
    ran = any("device" in row for row in found["rows"])
    if not earlier or (ran and earlier["device"] != found["device"]):
        return found
    rows = {row["number"]: row for row in (*earlier["rows"], *found["rows"])}
    return found | {
        "device": earlier["device"],
        "rows": [rows[number] for number in sorted(rows)],
    }


def _earlier(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    earlier: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    now = {"grid": "memory", "commit": commit(), "versions": measure.versions()}
    return earlier if all(earlier.get(key) == value for key, value in now.items()) else {}


def table(found: dict[str, Any]) -> str:
    """Return results as a table for people, and how many rows keep within the goal."""
    rows, goal = found["rows"], found["goal"]
    head = "base | dtype | tokens | targets | weights | recomputed | estimate | measured | ratio"
    lines = [f"| {head} |", "|" + " --- |" * 9]
    for row in rows:
        cells = [row["shape"], row["dtype"], f"{row['rows']} x {row['length']}"]
        cells += [row["targets"], row["quantization"], row.get("recomputed_layers", "")]
        if "error" in row:
            cells += ["", "", row["error"].splitlines()[-1][:80].replace("|", "/")]
        else:
            sizes = [f"{row[key] / 2**20:,.0f} MiB" for key in ("estimated", "measured")]
            off = abs(row["ratio"] - 1) > goal
            cells += [*sizes, f"**{row['ratio']:.2f}**" if off else f"{row['ratio']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    good = sum(abs(row["ratio"] - 1) <= goal for row in rows if "ratio" in row)
    where = f"{found['date']}, commit {found['commit']}, {found['device']}"
    note = f"{where}: {good} of {len(rows)} within {goal:.0%}."
    return "\n".join(lines) + f"\n\n{note}\n"


def main() -> int:
    """Measure the grid, write what was found and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--work", type=Path, default=cache_folder() / "bench-memory")
    parser.add_argument("--device", choices=tuple(GOALS), default="cpu")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of configurations")
    parser.add_argument("--job", help="one configuration, in this process")
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        if job.get("write"):
            write_model(Path(job["folder"]), Shape(**job["shape"]))
            print("{}")
        else:
            print(json.dumps(run_one(job)))
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    rows = measured(options.device, options.work, minutes=options.minutes, only=options.only)
    found = results(options.device, rows)
    if options.out:
        found = with_earlier(found, options.out)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
