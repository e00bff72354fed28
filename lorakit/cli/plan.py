"""`lorakit plan`: what a recipe will do, before it costs anything."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.command import AllowLocalCode, AllowRemoteCode, RecipeArgument, SetOption, command
from lorakit.cli.screen import Screen, usage
from lorakit.errors import BadInput, CheckFailed
from lorakit.storage.publish import check_file

if TYPE_CHECKING:
    from lorakit.training.fitting import Change
    from lorakit.training.plan import Plan

ID = "plan.will-not-fit"


@command
def plan(
    screen: Screen,
    recipe: RecipeArgument = "",
    changes: SetOption = None,
    gpu: Annotated[
        str, typer.Option(help="Plan for a GPU instead: its memory (24GiB) or its name (L40S).")
    ] = "",
    fit: Annotated[
        Path | None, typer.Option(help="Write the recipe, changed so that it fits, to this file.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take two real steps, and compare.")
    ] = False,
    allow_local_code: AllowLocalCode = False,
    allow_remote_code: AllowRemoteCode = False,
) -> None:
    """Show sites, counts, steps, memory, time and warnings; exit 1 when it will not fit."""
    from lorakit.cli.recipe_argument import read_recipe
    from lorakit.runtime import start
    from lorakit.training import summary
    from lorakit.training.memory import gib
    from lorakit.training.plan import Permissions, make
    from lorakit.training.speed import Rate, card
    from lorakit.training.trial import trial

    if gpu and measure:
        raise usage("--gpu plans for another machine, so there is nothing to measure here")
    if fit:
        check_file(fit)  # before the plan, which may take minutes
    target = card(gpu) if gpu else None
    permissions = Permissions(screen.offline, allow_local_code, allow_remote_code)
    runtime = start()

    def plan_with(extra: list[str]) -> "Plan":
        loaded = read_recipe(screen, recipe, [*(changes or ()), *extra])
        return make(loaded, runtime, permissions, card=target, weights=measure)

    made = plan_with([])
    screen.notice(*made.notices)
    rate = Rate.of(target) if target else Rate.measured(runtime, made.dtype)
    lines, facts = summary.lines(made, rate, target), summary.facts(made, rate)
    change = find_change(made, plan_with)
    error = does_not_fit(made, change)
    if error is None and measure and rate:
        seen = trial(made, runtime, rate)
        lines += seen.lines()
        facts["measured"] = seen.facts()
    if change:
        facts["change"] = change.keys
        lines.append(("Change", f"{change.options}  = {gib(change.memory.total)}"))
    if fit and change:
        screen.say(f"wrote {write_fitting(fit, plan_with(change.overrides))}")
    elif fit and error is None:
        screen.say(f"{fit} is not written: the recipe fits as it is, nothing needs to change")
    code = error.exit_code if error else 0
    facts |= {"error": screen.described(error)} if error else {}
    screen.result("\n".join(f"{label:9} {text}" for label, text in lines), facts, exit=code)
    if error:
        raise typer.Exit(code) if screen.json else error


def does_not_fit(plan: "Plan", change: "Change | None") -> CheckFailed | None:
    """Return the error that a plan ends in where it needs more memory or disk than there is."""
    from lorakit.training import summary
    from lorakit.training.memory import gib

    if not plan.fits:
        return will_not_fit(plan, change)
    disk = summary.disk_bytes(plan)
    free = disk.pop("free")
    if sum(disk.values()) <= free:
        return None
    needs, there = f"{gib(sum(disk.values()))} of disk", gib(free)
    help = "lower train.keep_checkpoints, or move output_dir"
    return CheckFailed(ID, f"needs about {needs}, {there} are there", help=help)


def will_not_fit(plan: "Plan", change: "Change | None") -> CheckFailed:
    """Return the error of a plan that needs more memory than there is, and what would help."""
    from lorakit.training.memory import gib

    needs, there = gib(plan.memory.total), gib(plan.free_bytes)
    help = "nothing in the recipe makes it small enough; take a smaller base"
    if change:
        help = f"it fits with {change.options}"
    return CheckFailed(ID, f"needs about {needs}, {there} are there", help=help)


def find_change(plan: "Plan", plan_with: Callable[[list[str]], "Plan"]) -> "Change | None":
    """Return the cheapest change that makes a plan fit, after planning with it."""
    if plan.fits:
        return None
    change = plan.change(plan.free_bytes)
    try:
        return change if change and plan_with(change.overrides).fits else None
    except BadInput:  # the data, or the base, cannot be used so
        return None


def write_fitting(path: Path, plan: "Plan") -> Path:
    """Write the recipe of a plan, with what was changed in it; a file that is there stays.

    Raises:
        LorakitError: when there is a file already, or the disk refuses.
    """
    from lorakit.recipe.dump import dump
    from lorakit.storage.publish import publish_file

    publish_file(path, dump(plan.recipe, defaults=False).encode())
    return path
