"""Carry out a recipe with its folder, screen and signals: what stands behind `lorakit train`."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lorakit import adapters, environment
from lorakit.cli.merge_losses import losses_of
from lorakit.cli.plan import find_change, will_not_fit
from lorakit.cli.screen import Screen
from lorakit.cli.stopping import AnsweredStop, command_again
from lorakit.errors import BadInput, Interrupted, Notice
from lorakit.export import merge as merging
from lorakit.export.card import write_card
from lorakit.host import GIB
from lorakit.processes import Signalled, Stop
from lorakit.recipe.dump import dump
from lorakit.recipe.files import RESOLVED
from lorakit.recipe.sections import Recipe
from lorakit.runtime import Runtime, start
from lorakit.storage.redact import printable, redact
from lorakit.training import folder as folders
from lorakit.training import passports, summary
from lorakit.training.checkpoint import State, check_space
from lorakit.training.folder import Mode, RunFolder
from lorakit.training.loop import train as train_plan
from lorakit.training.plan import Permissions, Plan, make
from lorakit.training.progress import Reporter, duration
from lorakit.training.run import Outcome

LARGE = 4 * GIB  # bytes of files of weights, which take seconds to read


@dataclass(frozen=True)
class Finished:
    """What `train` prints: the same facts for people and for programs."""

    text: str
    facts: dict[str, Any]


def run(
    screen: Screen,
    read: Callable[[list[str]], Recipe],
    permissions: Permissions,
    mode: Mode,
    *,
    allow_inexact: bool,
    grace: float | None,
) -> Finished | None:
    """Plan, train and merge; return the result in the main process, None in the others.

    `read` returns the recipe with further values of `--set`.

    Raises:
        Interrupted: when a signal came and there is a checkpoint to go on from.
    """
    recipe = read([])
    runtime = start()
    path = recipe.run_folder
    goes_on = mode in ("resume", "resume-or-start")
    try:
        with folders.interruptible(path) if goes_on else nullcontext():
            plan = plan_run(screen, recipe, permissions, mode, runtime)
            warn_of_memory(
                screen,
                plan,
                lambda extra: make(read(extra), runtime, permissions),
                is_main=runtime.is_main,
            )
            if plan.base.file_bytes > LARGE:
                screen.say("Reading   every byte of the base once, so that a resume knows it again")
            pinned = passports.pinned(plan, runtime)
            done = folders.ended(path, runtime, pinned) if goes_on else None
            if done and nothing_to_do(plan, done):
                screen.notice(*(done.notices if runtime.is_main else ()))
                return already_finished(plan, done) if runtime.is_main else None
            with folders.opened(path, mode, runtime, pinned, allow_inexact=allow_inexact) as folder:
                answered = AnsweredStop(screen, folder, runtime.processes, grace)
                stop = answered if runtime.is_main else Stop(grace)
                return carried_out(
                    screen, plan, runtime, folder, permissions, stop, goes_on=goes_on
                )
    except Interrupted as error:
        error.help = f"go on with: {command_again('--resume', runtime.processes)}"
        raise


def plan_run(
    screen: Screen, recipe: Recipe, permissions: Permissions, mode: Mode, runtime: Runtime
) -> Plan:
    """Make and show the plan, once it is known that its folder is free and its disk large enough.

    Raises:
        BadInput: when the run's folder, or the merge's, holds something else.
        RunFailed: `storage.full`, or `run.locked`.
    """
    path = recipe.run_folder
    if runtime.is_main:
        # Alone: another process might look when this one has already opened the folder.
        folders.check_free(path, mode)
        if mode in ("resume", "resume-or-start"):
            folders.check_facts(path)
        if recipe.merge.enabled:
            with _of_recipe(recipe):
                merging.check_output(Path(recipe.merge.out), [], overwrite=mode != "start")
    else:
        screen.quiet = True
    plan = make(recipe, runtime, permissions)
    if runtime.is_main:
        screen.notice(*plan.notices)
    for label, text in summary.lines(plan):
        screen.say(f"{label:9} {text}")
    if runtime.is_main:
        size = summary.checkpoint_bytes(plan)
        check_space(path / "checkpoints", size, recipe.train.keep_checkpoints)
    return plan


def warn_of_memory(
    screen: Screen, plan: Plan, plan_with: Callable[[list[str]], Plan], *, is_main: bool
) -> None:
    """Say where a run needs more memory than there is, and what would make it fit.

    The estimate may be wrong and memory may become free: the run goes on, unless with `--strict`.
    """
    if plan.fits:
        return
    change = find_change(plan, plan_with)  # in every process: planning waits for the others
    screen.recipe = plan.recipe
    if is_main:
        error = will_not_fit(plan, change)
        message = f"{error.message}: memory may run out"
        screen.notice(Notice("plan.does-not-fit", message, help=error.help))


def carried_out(
    screen: Screen,
    plan: Plan,
    runtime: Runtime,
    folder: RunFolder,
    permissions: Permissions,
    stop: Stop,
    *,
    goes_on: bool,
) -> Finished | None:
    """Train and merge in a folder that is open."""
    recipe, plan = plan.recipe, as_begun(plan, folder)
    record(plan, runtime, folder)
    if runtime.is_main:
        screen.notice(*folder.notices)
        screen.log_to(folder.path / "log.txt")
    if goes_on:
        step = folder.resume.state.step if folder.resume else 0
        begun = f"resuming from step {step}" if step else "starts: there is no checkpoint"
        screen.say(f"Run       {begun}")
    reporter = Reporter(
        plan.steps.total,
        recipe.train.log_every,
        say=screen.say,
        console=screen.err if screen.live else None,
        metrics=folder.metrics if runtime.is_main else None,
    )
    outcome = train_plan(plan, runtime, folder, reporter, stop)
    if not runtime.is_main:
        return None
    folder.note(**asdict(outcome), merged=None)
    write_card(folder.adapter)
    if recipe.merge.enabled and stop.signal:  # it came in the last step, after which nothing stops
        raise Signalled(stop.signal)
    asked = recipe.merge.enabled
    merged = merge_run(screen, plan, folder, runtime, permissions) if asked else None
    return finished(plan, folder, outcome, merged)


def merge_run(
    screen: Screen, plan: Plan, folder: RunFolder, runtime: Runtime, permissions: Permissions
) -> Path:
    """Merge the adapter of a finished run, as its recipe asks."""
    section, saved = plan.recipe.merge, adapters.read(folder.adapter)
    # A merge that stood there before the run was refused then, or may be overwritten.
    options = merging.Options(
        dtype=section.dtype, overwrite=True, base_weights=section.base_weights
    )
    with ExitStack() as stack:
        with _of_recipe(plan.recipe):
            merge_plan = stack.enter_context(
                merging.planned(saved, plan.base, Path(section.out), options)
            )
        losses = None
        if section.measure:
            losses = losses_of(
                screen, merge_plan, plan.recipe, runtime, allow_local_code=permissions.local_code
            )
        with screen.progress("Merging", merge_plan.work) as advance:
            report = merging.merge(merge_plan, runtime, advance, losses)
    screen.say(f"Verified  {merging.verdict(report)}")
    folder.note(merged=str(merge_plan.out))
    return merge_plan.out


@contextmanager
def _of_recipe(recipe: Recipe) -> Iterator[None]:
    """Say of a folder that cannot be merged into what named it: here it is no option."""
    try:
        yield
    except BadInput as error:
        if not error.id.startswith("output."):
            raise
        message, help = f"merge.out: {error.where}: {error.message}", error.help or ""
        place = recipe.origin.place("merge", "out")
        help = help.replace("--out", "merge.out")
        raise BadInput(error.id, message, where=place, help=help) from None


def as_begun(plan: Plan, folder: RunFolder) -> Plan:
    """Return the plan with the choices of the run that goes on, but for keys that were changed."""
    if not folder.resume:
        return plan

    def begun(key: str, fact: str, now: int) -> int:
        return now if f"recipe.train.{key}" in folder.changed else int(folder.facts[fact])

    return plan.with_choices(
        begun("micro_batch_size", "micro_batch_limit", plan.steps.limit),
        begun("gradient_checkpointing", "recomputed_layers", plan.setup.recomputed),
    )


def record(plan: Plan, runtime: Runtime, folder: RunFolder) -> None:
    """Write down what the run is, before it starts."""
    folder.write("recipe.yaml", plan.recipe.origin.text)
    folder.write(RESOLVED, dump(plan.recipe))
    folder.write("plan.json", json.dumps(summary.facts(plan), indent=2))
    folder.note(
        command=redact(shlex.join(sys.argv), environment.all_variables()),
        device=runtime.describe(),
        processes=runtime.processes,
        versions=passports.versions(),
        seed=plan.recipe.seed,
        dtype=str(plan.dtype).removeprefix("torch."),
        packing=plan.packing,
        optimizer=plan.setup.optimizer,
        recomputed_layers=plan.setup.recomputed,
        micro_batch_limit=plan.steps.limit,
        micro_batch_tokens=plan.steps.micro_batch_tokens,
    )


def nothing_to_do(plan: Plan, folder: RunFolder) -> bool:
    """Tell whether a finished run has taken all steps of a plan and left all that is asked for."""
    state, merge = folder.resume.state if folder.resume else State(), plan.recipe.merge
    out = [Path(merge.out)] if merge.enabled else []
    merged = not out or folder.facts.get("merged") == str(out[0])
    ended = state.step == plan.steps.total and not state.owes_evaluation
    return ended and merged and all(path.is_dir() for path in (folder.adapter, *out))


def already_finished(plan: Plan, folder: RunFolder) -> Finished:
    """Say that a run has nothing left to do, with the figures that it had."""
    merged, total = folder.facts.get("merged"), plan.steps.total
    facts = {
        "run_dir": str(folder.path),
        "adapter_dir": str(folder.adapter),
        "merged_dir": merged,
        **{figure.name: folder.facts.get(figure.name) for figure in fields(Outcome)},
    }
    lines = [
        f"Run       already finished ({total} of {total} steps); nothing to do",
        f"Adapter   {folder.adapter}",
        *([f"Merged    {printable(str(merged))}"] if merged else []),
        f"Next      {_next(plan, folder)}",
    ]
    return Finished("\n".join(lines), facts)


def finished(plan: Plan, folder: RunFolder, outcome: Outcome, merged: Path | None) -> Finished:
    """Put the result into words and into the keys of `--json`."""
    facts = {
        "run_dir": str(folder.path),
        "adapter_dir": str(folder.adapter),
        "merged_dir": str(merged) if merged else None,
        **asdict(outcome),
    }
    lines = [
        f"Trained   {outcome.steps} steps, {outcome.tokens:,} tokens in "
        f"{duration(outcome.wall_seconds)} ({duration(outcome.training_seconds)} training, "
        f"{outcome.tokens_per_second:,.0f} tokens/s), "
        f"peak {outcome.peak_memory_bytes / GIB:.1f} GiB",
        f"Loss      {_loss(outcome)}",
        f"Adapter   {folder.adapter}",
    ]
    if outcome.best_step not in (None, outcome.steps):
        best = folder.checkpoints / f"step-{outcome.best_step:06d}" / "adapter"
        lines.append(f"Best      step {outcome.best_step}, kept in {best}")
    if merged:
        lines.append(f"Merged    {merged}")
    lines.append(f"Next      {_next(plan, folder)}")
    return Finished("\n".join(lines), facts)


def _next(plan: Plan, folder: RunFolder) -> str:
    """Return the command to go on with; a recipe that was changed is taken as it was resolved."""
    if not plan.dataset.eval:
        return f"lorakit generate {shlex.quote(str(folder.adapter))} 'a prompt'"
    origin = plan.recipe.origin
    changed = any(place.line is None for place in origin.places.values())
    recipe = folder.path / RESOLVED if changed else origin.path
    return f"lorakit eval {shlex.quote(str(recipe))}"


def _loss(outcome: Outcome) -> str:
    last = "none" if outcome.final_loss is None else f"{outcome.final_loss:.4f} in the last step"
    if outcome.best_eval_loss is None:
        return last
    return f"{last}; best eval loss {outcome.best_eval_loss:.4f} at step {outcome.best_step}"
