"""`lorakit plan`: what a recipe will do, before it costs anything."""

import typer

from lorakit.cli.screen import (
    AllowLocalCode,
    AllowRemoteCode,
    RecipeArgument,
    Screen,
    SetOption,
    command,
)
from lorakit.errors import CheckFailed


@command
def plan(
    screen: Screen,
    recipe: RecipeArgument = "",
    changes: SetOption = None,
    allow_local_code: AllowLocalCode = False,
    allow_remote_code: AllowRemoteCode = False,
) -> None:
    """Show sites, counts, steps, memory and warnings; exit 1 when it will not fit."""
    from lorakit.cli.reading import read_recipe
    from lorakit.runtime import start
    from lorakit.training import summary
    from lorakit.training.memory import GIB
    from lorakit.training.plan import Permissions, make

    loaded = read_recipe(recipe, changes)
    permissions = Permissions(screen.offline, allow_local_code, allow_remote_code)
    made = make(loaded, start(), permissions)
    screen.notice(*made.notices)
    lines = [f"{label:9} {text}" for label, text in summary.lines(made)]
    screen.result(
        "\n".join(lines), summary.facts(made), exit=0 if made.fits else CheckFailed.exit_code
    )
    if made.fits:
        return
    error = CheckFailed(
        "plan.will-not-fit",
        f"needs about {made.memory.total / GIB:.1f} GiB, {made.free_bytes / GIB:.1f} are free",
        help="set train.gradient_checkpointing: true, or lower train.micro_batch_size",
    )
    if screen.json:
        raise typer.Exit(error.exit_code)
    raise error
