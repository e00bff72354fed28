"""`lorakit eval`: an adapter and its base by the recipe's metrics and gates, made for CI."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit import environment
from lorakit.cli.command import AllowLocalCode, AllowRemoteCode, RecipeArgument, SetOption, command
from lorakit.cli.screen import Screen, usage
from lorakit.errors import BadInput
from lorakit.storage.publish import check_file

if TYPE_CHECKING:
    from rich.console import Group

    from lorakit.evaluation.report import Report

SUMMARY_BYTES = 900 << 10  # of GitHub's step summary, which refuses more than 1 MiB


@command
def eval(
    screen: Screen,
    recipe: RecipeArgument = "",
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="An adapter's folder; else the run's.")
    ] = None,
    base_only: Annotated[
        bool, typer.Option("--base-only", help="Measure the base alone; gates are not judged.")
    ] = False,
    changes: SetOption = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="A file of earlier figures.")
    ] = None,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Write these figures to --baseline.")
    ] = False,
    no_gates: Annotated[bool, typer.Option("--no-gates", help="Judge nothing.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only so many rows.")] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write a JUnit file.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the table.")] = None,
    samples: Annotated[Path | None, typer.Option("--samples", help="Write every answer.")] = None,
    allow_local_code: AllowLocalCode = False,
    allow_remote_code: AllowRemoteCode = False,
) -> None:
    """Measure an adapter and its base, and say no (exit 1) when a gate is missed."""
    if update_baseline and baseline is None:
        raise usage("--update-baseline needs --baseline FILE")
    outputs = [path for path in (junit, markdown, samples) if path]
    for path in [*outputs, *([baseline] if update_baseline and baseline else [])]:
        check_file(path, replace=True)  # before anything is measured

    from lorakit.cli.eval_subject import facts_of, opened, task_of
    from lorakit.cli.recipe_argument import read_recipe
    from lorakit.evaluation import baseline as baselines
    from lorakit.evaluation.gates import judge, limits, verdict
    from lorakit.evaluation.report import Report
    from lorakit.evaluation.run import evaluate
    from lorakit.recipe.rules import without_effect

    started = time.monotonic()
    loaded = read_recipe(screen, recipe, changes)
    screen.notice(*without_effect(loaded))
    run = Path(recipe) if os.path.isdir(recipe) else None  # wherever it was moved to
    place = None if base_only else adapter or run or loaded.run_folder / "adapter"
    subject = opened(screen, loaded, place, allow_remote_code=allow_remote_code)
    task = task_of(screen, loaded, subject, limit, allow_local_code=allow_local_code)
    facts = facts_of(loaded, subject, task, limit)
    known = _known(screen, baseline, facts, update=update_baseline)
    model = subject.load(loaded)
    with screen.progress("Evaluating", task.size * (1 if base_only else 2)) as advance:
        results = evaluate(model, subject.tokenizer, task, base_only=base_only, advance=advance)
    if update_baseline and baseline:
        figures = {name: one.value for name, one in results.main.metrics.items()}
        baselines.write(baseline, results, facts)
        _say_changes(screen, known, figures)
        known = known or figures
    gates = () if no_gates or base_only else limits(loaded.eval, loaded.origin)
    judged = judge(gates, results.main.metrics, results.base.metrics, known)
    facts |= {"wall_seconds": round(time.monotonic() - started, 1)}
    compares = baseline is not None
    report = Report(loaded.origin.name, results, judged, known, facts, compares=compares)
    asked = [(junit, "junit.xml"), (markdown, "summary.md"), (samples, "samples.jsonl")]
    _write(screen, report, subject.run, asked)
    error = verdict(judged)
    told = {"error": {"id": error.id, "message": error.message}} if error else {}
    screen.result(_shown(report), report.document() | told, exit=report.exit)
    if error and screen.json:
        raise typer.Exit(error.exit_code)
    if error:
        raise error


def _known(
    screen: Screen, file: Path | None, facts: dict[str, Any], *, update: bool
) -> dict[str, float]:
    """Return the figures of the baseline; one that is to be replaced may be of other rows."""
    from lorakit.evaluation import baseline

    if file is None or (update and not file.exists()):
        return {}
    try:
        return baseline.read(file, facts)
    except BadInput as error:
        if not update:
            raise
        screen.say(f"{file} is replaced: {error.message}")
        return {}


def _write(
    screen: Screen,
    report: "Report",
    run: Path | None,
    asked: Sequence[tuple[Path | None, str]],
) -> None:
    """Write the files that were asked for, and all of them into the run's folder."""
    from lorakit.storage.disk import append_line
    from lorakit.storage.publish import publish_file, publish_folder
    from lorakit.storage.strict_json import dumps

    contents = {
        "results.json": dumps(report.document()).encode(),
        "samples.jsonl": report.samples().encode(),
        "summary.md": report.markdown().encode(),
        "junit.xml": report.junit(),
    }
    if run:
        with publish_folder(run / "eval", replace=True) as folder:
            for name, content in contents.items():
                (folder / name).write_bytes(content)
        screen.say(f"Written to {run / 'eval'}")
    for path, name in asked:
        if path:
            publish_file(path, contents[name], replace=True)
    if summary := environment.variable("GITHUB_STEP_SUMMARY"):
        append_line(Path(summary), contents["summary.md"][:SUMMARY_BYTES].decode(errors="ignore"))


def _say_changes(screen: Screen, before: dict[str, float], after: dict[str, float]) -> None:
    """Show how the baseline changes."""
    for name, value in after.items():
        old = f"{before[name]:.6g}" if name in before else "new"
        screen.say(f"baseline  {name}  {old} -> {value:.6g}")


def _shown(report: "Report") -> "Group":
    """Lay the table out, with what it comes to below."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in report.header:
        numeric = name not in ("metric", "gate", "result")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for row in report.table():
        failed = row[-1] == "FAIL"
        table.add_row(*(Text(cell) for cell in row[:-1]), Text(row[-1], "red" if failed else ""))
    rows = {one.n for one in report.results.base.metrics.values()}
    counted = f"{max(rows):,} rows" if rows else "no rows"
    return Group(table, Text(f"{report.summary()} {counted}."))
