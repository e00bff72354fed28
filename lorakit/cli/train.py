"""`lorakit train`: carry out a recipe."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit import environment
from lorakit.cli.command import AllowLocalCode, AllowRemoteCode, RecipeArgument, SetOption, command
from lorakit.cli.screen import Screen, usage
from lorakit.processes import launch

if TYPE_CHECKING:
    from lorakit.recipe.sections import Recipe
    from lorakit.training.folder import Mode

MOST_GPUS = 16  # of one machine


@command
def train(
    screen: Screen,
    recipe: RecipeArgument = "",
    changes: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; else output_dir.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.")
    ] = False,
    resume_or_start: Annotated[
        bool,
        typer.Option("--resume-or-start", help="Go on where there is a checkpoint, else start."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the run that is there.")
    ] = False,
    allow_inexact: Annotated[
        bool, typer.Option("--allow-inexact", help="Resume although something changed.")
    ] = False,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many steps.")
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="After a signal drop a step that would take longer; else it is finished.",
        ),
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    allow_local_code: AllowLocalCode = False,
    allow_remote_code: AllowRemoteCode = False,
) -> None:
    """Train the adapter of a recipe, and merge it where the recipe asks for that."""
    asked: dict[Mode, bool] = {
        "resume": resume,
        "resume-or-start": resume_or_start,
        "overwrite": overwrite,
    }
    modes = [mode for mode, chosen in asked.items() if chosen]
    if len(modes) > 1:
        raise usage(f"--{modes[0]} and --{modes[1]} do not go together")
    if nproc > (most := max(MOST_GPUS, os.cpu_count() or 1)):
        help = "one process a GPU, or a core"
        raise usage(f"--nproc {nproc}: at most {most} processes make sense on this machine", help)
    if nproc > 1 and environment.variable("WORLD_SIZE") is None:
        raise typer.Exit(launch(_without_nproc(sys.argv[1:]), nproc))
    overrides = [*(changes or ())]
    overrides += [f"train.max_steps={max_steps}"] if max_steps else []
    overrides += [f"output_dir={json.dumps(str(out))}"] if out else []

    from lorakit.cli.recipe_argument import read_recipe
    from lorakit.cli.train_run import run
    from lorakit.training.plan import Permissions

    def read(extra: list[str]) -> "Recipe":
        return read_recipe(screen, recipe, [*overrides, *extra])

    permissions = Permissions(screen.offline, allow_local_code, allow_remote_code)
    result = run(
        screen,
        read,
        permissions,
        modes[0] if modes else "start",
        allow_inexact=allow_inexact,
        grace=grace,
    )
    if result is not None:
        screen.result(result.text, result.facts)


def _without_nproc(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--nproc":
            skip = True
        elif not argument.startswith("--nproc="):
            kept.append(argument)
    return kept
