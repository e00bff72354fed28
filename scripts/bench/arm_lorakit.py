"""The arm of lorakit: its own plan and its own loop, over the rows of the job.

Only the rows and the initial values come from outside; everything else is what `lorakit train`
does with a recipe of these settings.
"""

# ruff: noqa: E402  # what torch reads when it is imported is set first

import json
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorakit.environment import quiet_libraries

quiet_libraries(offline=True)  # as the command does, before torch reads its environment

import numpy as np
import torch
from configs import ALPHA, CLIP, RANK, RATE, SEED, TARGETS
from measure import Clock, peak_memory, read_job, read_rows, report, save_tensors, settled
from safetensors.torch import load_file, save_file

from lorakit import adapters
from lorakit import runtime as runtimes
from lorakit.adapters import _attach
from lorakit.data.prepare import Dataset
from lorakit.data.report import Report
from lorakit.data.tokens import Example, Examples
from lorakit.errors import Place
from lorakit.recipe.reader import read
from lorakit.runtime import start
from lorakit.training import loop
from lorakit.training.folder import RunFolder
from lorakit.training.plan import Permissions, Plan, make
from lorakit.training.progress import Reporter, StepRecord

DTYPES = {"best": "auto"}
PLANNED = 10_000  # steps, so that `auto` is what it is in long runs; `Enough` ends them early
CPU, HOTTEST = torch.profiler.ProfilerActivity.CPU, 16


class Enough(Exception):
    """The clock has seen enough steps; nothing is saved."""


class Timing(Reporter):
    """Ends a step on the clock whenever the loop reports one, and keeps its loss.

    On a GPU the loop reports a step when the next one is on its way: the first time is that of
    two steps, and warm-up.
    """

    def __init__(self, steps: int, clock: Clock, profiler: Any = None) -> None:
        """Report to nobody else; profile what comes after the warm-up where a profiler is given."""
        super().__init__(steps, steps, say=lambda _: None, console=None, metrics=None)
        self.clock, self.profiler = clock, profiler
        self.losses: list[float] = []

    def step(self, record: StepRecord) -> None:
        """Keep the loss of one step."""
        self.losses.append(record.loss)
        enough = self.clock.tick()
        if self.profiler and len(self.losses) == self.clock.warm:
            self.profiler.start()
        if enough:
            raise Enough


def recipe_text(job: dict[str, Any], rows_per_step: int, steps: int, longest: int) -> str:
    """Return the recipe of a job; JSON is YAML."""
    model: dict[str, Any] = {"path": job["model"], "dtype": DTYPES.get(job["dtype"], job["dtype"])}
    model |= job.get("model_section", {})
    if job.get("nf4"):
        model |= {"quantization": "nf4", "double_quant": True}
    return json.dumps(
        {
            "model": model,
            "adapter": {"rank": RANK, "alpha": ALPHA, "target_modules": list(TARGETS)},
            "data": {"train": job["rows_file"], "max_length": longest, **job.get("data", {})},
            "train": {
                "epochs": steps,
                "batch_size": rows_per_step,
                "micro_batch_size": job.get("rows", "auto"),
                "learning_rate": RATE,
                "schedule": "constant",
                "warmup": 0,
                "max_grad_norm": CLIP,
                "gradient_checkpointing": job.get("checkpointing", "auto"),
                "compile": job.get("compile", "auto"),
                "save_every": 1_000_000,  # the rows of a step are an epoch here; peers save nothing
            },
            "seed": SEED,
        }
    )


def dataset(rows: list[dict[str, list[int]]]) -> Dataset:
    """Return the rows of a job as lorakit's own examples."""
    examples = Examples.of(
        [
            Example(
                np.array(row["input_ids"], np.int32), np.array(row["labels"], np.int32), Place("?")
            )
            for row in rows
        ]
    )
    longest = int(examples.lengths.max())
    nothing = Report(None, None, 0, {}, longest)
    weights = (1.0,) * len(rows)
    return Dataset(examples, Examples.of([]), (), weights, nothing, (), frozenset(), None, longest)


def plan_of(job: dict[str, Any]) -> Plan:
    """Return the plan of a job, after comparing its order of rows with that of the other arms."""
    rows, order = read_rows(job)
    data = dataset(rows)
    epochs = -(-max(job["warm"] + job["timed"], PLANNED) // len(order))
    recipe_file = Path(job["folder"]) / "recipe.yaml"
    recipe_file.write_text(recipe_text(job, len(order[0]), epochs, data.max_length))
    recipe = read(recipe_file, adapters.settings_for, environ={})
    plan = make(recipe, start(), Permissions(offline=True), data=data)
    for index in range(min(len(order), plan.steps.total)):
        taken = sorted(row for batch in plan.steps.step(index) for row in batch.rows)
        if taken != sorted(order[index]):
            sys.exit(f"step {index} takes the rows {taken}, other arms {sorted(order[index])}")
    return plan


def take_initial_values(run: Any, path: str) -> None:
    """Set A and B to the values that every arm starts with."""
    given = load_file(path)
    with torch.no_grad():
        for name, parameter in run.named.items():
            module, _, part = name.removesuffix(".weight").rpartition(".lora_")
            parameter.copy_(given[f"{module}.{part}"])


def switch_off(job: dict[str, Any]) -> None:
    """Take away what the job says lorakit is to do without."""
    if not job.get("twins", True):
        _attach.fuse = lambda model: 0
    if job.get("gives_back"):
        runtimes._keep_freed_memory = lambda: None


def keep_gradients(run: Any, path: str) -> None:
    """Write the gradients of the first step, as they are before they are clipped."""
    clip = run.gradients.clip

    def written(longest: float) -> torch.Tensor:
        named = {n.removesuffix(".weight").replace(".lora_", "."): p for n, p in run.named.items()}
        save_tensors({name: p.grad for name, p in named.items()}, path, save_file)
        run.gradients.clip = clip
        return clip(longest)

    run.gradients.clip = written


def hottest(profiler: Any, vocabulary: int) -> list[dict[str, Any]]:
    """Return the operations that take the most time themselves, and their share of all.

    Products that are only as wide as the rank, and those with the head, stand apart.
    """
    profiler.stop()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        name = event.key
        sizes = {size for shape in event.input_shapes for size in shape}
        if "mm" in name and RANK in sizes:
            name += " (as wide as the rank)"
        elif "mm" in name and vocabulary in sizes:
            name += " (with the head)"
        times[name] += event.self_cpu_time_total
        calls[name] += event.count
    return [
        {
            "operation": name,
            "share": round(time / times.total(), 4),
            "milliseconds": round(time / 1e3, 1),
            "calls": calls[name],
        }
        for name, time in times.most_common(HOTTEST)
    ]


def main() -> None:
    """Train as the job says and report the times."""
    job = read_job()
    switch_off(job)
    plan, runtime, clock = plan_of(job), start(), Clock(job, torch)
    profiler = None
    if job.get("profile"):
        profiler = torch.profiler.profile(activities=[CPU], record_shapes=True)
    timing, loaded = Timing(plan.steps.total, clock, profiler), {}
    prepare = loop.prepare

    def prepared(*arguments: Any) -> Any:
        run = prepare(*arguments)
        take_initial_values(run, job["init_file"])
        if job.get("gradients"):
            keep_gradients(run, job["gradients"])
        loaded.update(settled(torch, job["device"]))
        clock.start()
        return run

    loop.prepare = prepared
    folder = RunFolder(Path(job["folder"]) / "run", True, {})
    with suppress(Enough):
        loop.train(plan, runtime, folder, timing, loop.Stop())
    report(
        losses=timing.losses,
        seconds=clock.seconds,
        padded=sum(batch.input_ids.numel() for batch in plan.steps.step(0)),
        memory=peak_memory(torch, job["device"]),
        loaded=loaded,
        planned=plan.memory.parts | {"total": plan.memory.total},
        dtype=str(plan.dtype).removeprefix("torch."),
        checkpointing=bool(plan.setup.recomputed),
        threads=torch.get_num_threads(),
        **({"profile": hottest(profiler, plan.base.config.vocab_size)} if profiler else {}),
    )


if __name__ == "__main__":
    main()
