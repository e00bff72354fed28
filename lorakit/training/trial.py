"""Two real steps of a plan, to compare what they take with what was estimated."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.host import GIB
from lorakit.processes import Stop
from lorakit.runtime import Runtime
from lorakit.training import loop
from lorakit.training.folder import RunFolder
from lorakit.training.memory import estimate
from lorakit.training.plan import Plan
from lorakit.training.progress import Reporter
from lorakit.training.run import choose_kernels, prepare
from lorakit.training.shortage import explained
from lorakit.training.speed import Rate, step_flops

STEPS = 2


@dataclass(frozen=True)
class Trial:
    """What two steps took: bytes and seconds, beside the estimates for the same micro-batches.

    `seconds` are those of the last step, the first one warms up.
    """

    tokens: int
    bytes: int
    estimated_bytes: int
    seconds: float
    estimated_seconds: float

    def facts(self) -> dict[str, Any]:
        """Return the trial as `--json` holds it."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Return the trial for people."""
        found, planned = self.bytes / GIB, self.estimated_bytes / GIB
        memory = (
            f"{found:.2f} GiB in micro-batches of up to {self.tokens:,} tokens, "
            f"estimated {planned:.2f} ({_off(planned, found)})"
        )
        speed = (
            f"{self.seconds:.2f} s for the second step, "
            f"estimated {self.estimated_seconds:.2f} ({_off(self.estimated_seconds, self.seconds)})"
        )
        return [("Measured", memory), ("", speed)]


def trial(plan: Plan, runtime: Runtime, rate: Rate) -> Trial:
    """Load the base, take two steps and keep nothing.

    On a GPU the bytes are the allocator's; on a CPU how far resident memory grew.

    Raises:
        RunFailed: as `loop.train` does.
    """
    nowhere = RunFolder(Path(), False, {})
    with explained(plan, nowhere):
        return _two_steps(plan, runtime, rate, nowhere)


def _two_steps(plan: Plan, runtime: Runtime, rate: Rate, folder: RunFolder) -> Trial:
    silent = Reporter(STEPS, STEPS, say=lambda _: None, console=None, metrics=None)
    choose_kernels(plan, runtime, silent)  # a compiler's memory is no tensor's
    before = runtime.used_bytes()
    run = prepare(plan, runtime, folder, silent, Stop())
    run.reset_peak()  # loading may take more than a step, of which the estimate is
    for index in range(STEPS):
        began = time.monotonic()
        loop.step(run, index)
        loop.read_numbers(run, keep=0)
        seconds = time.monotonic() - began
    batches = [batch for index in range(STEPS) for batch in plan.steps.step(index)]
    tokens = max(batch.input_ids.numel() for batch in batches)
    last = plan.steps.step(STEPS - 1)
    squares = sum(n * n for b in last for n in (b.lengths or (b.input_ids.shape[1],) * len(b.rows)))
    setup = replace(plan.setup, tokens=tokens)
    memory = estimate(plan.shape, setup)
    flops = step_flops(plan.shape, setup, sum(b.tokens for b in last), squares)
    return Trial(
        tokens,
        runtime.peak_bytes() - before,
        memory.total - memory.parts["overhead"],
        seconds,
        flops / rate.flops,
    )


def _off(estimated: float, found: float) -> str:
    return f"{100 * (estimated / found - 1):+.0f} %"
