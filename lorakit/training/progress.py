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

BAR = 12  # columns: of a terminal's 80 the rest holds a step, its time left, loss, speed and memory


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
        # What the bar leaves of a row, and a space between the two; a terminal may be resized.
        room = self._bar.console.width - BAR - 1 if self._bar else None
        self._show(record.step, _line(record, self.steps, left, room))
        due = record.step % self.log_every == 0 or record.step in (1, self.steps)
        if due:
            self._write(asdict(record))
            self.say(_line(record, self.steps, left))

    def skipped(self, step: int, loss: float, norm: float) -> None:
        """Record a step that changed nothing."""
        self._write({"step": step, "skipped": True})
        self.say(f"step {step}/{self.steps}  skipped: loss {loss:g}, gradient norm {norm:g}")

    def evaluating(self, step: int) -> None:
        """Show that an evaluation has begun: it may take as long as many steps."""
        self._show(step, f"step {step}/{self.steps}  evaluating")

    def evaluated(self, step: int, loss: float, best: bool) -> None:
        """Record an evaluation during training."""
        self._write({"step": step, "eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))})
        self.say(f"step {step}/{self.steps}  eval loss {loss:.4f}{'  best so far' if best else ''}")

    def _show(self, step: int, text: str) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, description=text)

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


def _line(record: StepRecord, steps: int, left: float | None, room: int | None = None) -> str:
    """Return what is said of a step; in less room without what is missed least."""
    to_come = "" if left is None or record.step == steps else f"  {duration(left)} left"
    parts = {
        "step": f"step {record.step}/{steps}{to_come}",
        "loss": f"loss {record.loss:.4f}",
        "rate": f"lr {record.lr:.2e}",
        "norm": f"grad {record.grad_norm:.2f}",
        "speed": f"{record.tokens_per_second:,.0f} tokens/s",
        "memory": f"{record.mem_peak / GIB:.1f} GiB",
    }
    for name in ("norm", "rate", "memory", "speed", "loss"):
        if room is None or len("  ".join(parts.values())) <= room:
            break
        del parts[name]
    return "  ".join(parts.values())


def _bar(console: Console) -> Progress:
    return Progress(BarColumn(bar_width=BAR), TextColumn("{task.description}"), console=console)
