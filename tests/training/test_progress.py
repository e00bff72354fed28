"""What a run shows off a terminal and what it records."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lorakit.training.progress import Reporter, StepRecord, duration


def record(step: int, loss: float = 1.5) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=0.5,
        loss=loss,
        lr=2e-4,
        grad_norm=1.0,
        tokens=100 * step,
        trained_tokens=40 * step,
        tokens_per_second=321.0,
        mem_used=2**30,
        mem_peak=2**31,
    )


def test_lines_come_every_log_every_steps_with_the_first_and_the_last(tmp_path: Path) -> None:
    said: list[str] = []
    metrics = tmp_path / "metrics.jsonl"
    with Reporter(7, 3, say=said.append, console=None, metrics=metrics) as reporter:
        for step in range(1, 8):
            reporter.step(record(step))
        reporter.evaluated(7, 1.25, best=True)
    assert [line.split("  ")[0] for line in said] == [f"step {n}/7" for n in (1, 3, 6, 7, 7)]
    assert "loss 1.5000" in said[1]
    assert "321 tokens/s" in said[1]
    assert "2.0 GiB" in said[1]
    assert "left" in said[1]
    assert "left" not in said[3]
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3, 6, 7, 7]
    assert rows[-1]["eval_loss"] == 1.25
    assert all("monotonic" in row for row in rows)


@pytest.mark.parametrize(
    ("width", "gone"), [(120, set()), (80, {"grad", "lr"}), (40, {"grad", "lr", "GiB", "loss"})]
)
def test_a_narrow_terminal_keeps_the_step_and_the_time_left(
    width: int, gone: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reporter, "_left", lambda *_: 168.0)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width)
    with Reporter(24, 100, say=lambda _: None, console=console, metrics=None) as reporter:
        reporter.step(record(2))
    shown = screen.getvalue()
    assert "step 2/24  2m 48s left" in shown
    assert "…" not in shown
    assert {part for part in ("grad", "lr", "GiB", "loss") if part not in shown} == gone


def test_an_evaluation_shows_while_it_runs() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with Reporter(7, 3, say=lambda _: None, console=console, metrics=None) as reporter:
        reporter.step(record(3))
        reporter.evaluating(3)
    assert "step 3/7  evaluating" in screen.getvalue()


def test_a_skipped_step_is_said_and_recorded(tmp_path: Path) -> None:
    said: list[str] = []
    metrics = tmp_path / "metrics.jsonl"
    with Reporter(7, 3, say=said.append, console=None, metrics=metrics) as reporter:
        reporter.skipped(2, 1.5, float("inf"))
    assert said == ["step 2/7  skipped: loss 1.5, gradient norm inf"]
    assert json.loads(metrics.read_text())["skipped"] is True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59, "59s"), (60, "1m 00s"), (200, "3m 20s"), (7500, "2h 05m")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
