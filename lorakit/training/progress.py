"""What a run shows and records while it works: a live line on a terminal, plain lines elsewhere."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lorakit.host import GIB
from lorakit.storage.disk import append_line


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as `metrics.jsonl` holds it. Times in seconds, memory in bytes."""

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    mem_used: int
    mem_peak: int


class Reporter:
    """Takes the records of a run: every `log_every`-th is a line, and every one moves the bar."""

    def __init__(
        self,
        steps: int,
        log_every: int,
        *,
        say: Callable[[str], None],
        console: Console | None,
        metrics: Path | None,
    ) -> None:
        self.steps, self.log_every, self.say, self.metrics = steps, log_every, say, metrics
        self._bar = _bar(console) if console else None
        self._task = self._bar.add_task("", total=steps) if self._bar else None
        self._began: tuple[float, int] | None = None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, record: StepRecord) -> None:
        """Record one step; show it when it is due."""
        left = self._left(record.step)
        if self._bar and self._task is not None:
            self._bar.update(
                self._task, completed=record.step, description=_line(record, self.steps, left)
            )
        due = record.step % self.log_every == 0 or record.step in (1, self.steps)
        if due:
            self._write(asdict(record))
            self.say(_line(record, self.steps, left))

    def skipped(self, step: int, loss: float, norm: float) -> None:
        """Record a step that changed nothing."""
        self._write({"step": step, "skipped": True})
        self.say(f"step {step}/{self.steps}  skipped: loss {loss:g}, gradient norm {norm:g}")

    def evaluated(self, step: int, loss: float, best: bool) -> None:
        """Record an evaluation during training."""
        self._write({"step": step, "eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))})
        self.say(f"step {step}/{self.steps}  eval loss {loss:.4f}{'  best so far' if best else ''}")

    def _left(self, step: int) -> float | None:
        """Estimate the seconds left from the steps of this session; the first one warms up."""
        now = time.monotonic()
        if self._began is None:
            self._began = (now, step)
            return None
        began, first = self._began
        return (now - began) / (step - first) * (self.steps - step)

    def _write(self, record: dict[str, Any]) -> None:
        if self.metrics:
            stamp = {"time": datetime.now(UTC).isoformat(), "monotonic": time.monotonic()}
            append_line(self.metrics, json.dumps(record | stamp, allow_nan=False))


def duration(seconds: float) -> str:
    """Write a time span as people read it: `42s`, `3m 20s`, `2h 05m`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


def _line(record: StepRecord, steps: int, left: float | None) -> str:
    parts = [
        f"step {record.step}/{steps}",
        f"loss {record.loss:.4f}",
        f"lr {record.lr:.2e}",
        f"grad {record.grad_norm:.2f}",
        f"{record.tokens_per_second:,.0f} tokens/s",
        f"{record.mem_peak / GIB:.1f} GiB",
    ]
    if left is not None and record.step < steps:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def _bar(console: Console) -> Progress:
    return Progress(BarColumn(bar_width=24), TextColumn("{task.description}"), console=console)
