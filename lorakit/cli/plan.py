"""`lorakit plan`: what a recipe will do, before it costs anything."""

from lorakit.cli.screen import (
    AllowLocalCode,
    AllowRemoteCode,
    RecipeArgument,
    Screen,
    SetOption,
    command,
)


@command
def plan(
    screen: Screen,
    recipe: RecipeArgument = "",
    changes: SetOption = None,
    allow_local_code: AllowLocalCode = False,
    allow_remote_code: AllowRemoteCode = False,
) -> None:
    """Show sites, counts, steps, memory by part and warnings; no weight is read."""
    from lorakit.cli.reading import read_recipe
    from lorakit.runtime import start
    from lorakit.training.plan import Permissions, make

    loaded = read_recipe(recipe, changes)
    permissions = Permissions(screen.offline, allow_local_code, allow_remote_code)
    made = make(loaded, start(), permissions)
    screen.notice(*made.notices)
    screen.result("\n".join(f"{label:9} {text}" for label, text in made.lines()), made.facts())
