"""Carry out a recipe with its folder, screen and signals: what stands behind `lorakit train`."""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from lorakit.cli.screen import Screen
from lorakit.errors import Notice
from lorakit.export.card import write_card
from lorakit.export.merge import merge_run
from lorakit.recipe.reader import dump
from lorakit.recipe.sections import Recipe
from lorakit.runtime import Runtime, Stop, start
from lorakit.training import folder as folders
from lorakit.training.checkpoint import check_unchanged
from lorakit.training.folder import Mode, RunFolder
from lorakit.training.loop import Outcome
from lorakit.training.loop import train as train_plan
from lorakit.training.passports import pinned, versions
from lorakit.training.plan import Permissions, Plan, make
from lorakit.training.progress import Reporter, duration


@dataclass(frozen=True)
class Finished:
    """What `train` prints: the same facts for people and for programs."""

    text: str
    facts: dict[str, Any]


def run(
    screen: Screen, recipe: Recipe, permissions: Permissions, mode: Mode, *, allow_inexact: bool
) -> Finished | None:
    """Plan, train and merge; return the result in the main process, None in the others."""
    runtime, stop = start(), Stop()
    if not runtime.is_main:
        screen.quiet = True
    path = recipe.run_folder
    folders.check_free(path, mode)
    plan = make(recipe, runtime, permissions)
    screen.notice(*plan.notices)
    for label, text in plan.lines():
        screen.say(f"{label:9} {text}")
    with folders.opened(path, mode, runtime) as folder:
        screen.notice(*folder.notices)
        record(plan, runtime, folder, allow_inexact=allow_inexact)
        if runtime.is_main:
            screen.log_to(path / "log.txt")
        reporter = Reporter(
            plan.steps.total,
            recipe.train.log_every,
            say=screen.say,
            console=screen.err if screen.live else None,
            metrics=folder.metrics if runtime.is_main else None,
        )
        outcome = train_plan(plan, runtime, folder, reporter, stop, pinned(plan, runtime))
        stop.release()
        if not runtime.is_main:
            return None
        folder.note(**asdict(outcome))
        write_card(folder.adapter)
        merged = merge_run(screen, recipe, plan.base, folder.adapter) if recipe.merge.enabled else None
        return finished(plan, folder, outcome, merged)
