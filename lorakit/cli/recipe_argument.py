"""Read the recipe that a command was given: a path, a packaged name, or the only one around."""

from collections.abc import Sequence
from pathlib import Path

from lorakit import adapters, environment
from lorakit.cli.screen import Screen, usage
from lorakit.recipe.reader import read
from lorakit.recipe.sections import Recipe

FOLDER = Path("recipes")


def read_recipe(screen: Screen, argument: str, overrides: Sequence[str] | None) -> Recipe:
    """Read a recipe with its overrides; without an argument take the only one in `recipes/`.

    From here on the screen knows where the keys stand that an error names.

    Raises:
        BadInput: when there is no recipe to take, or the recipe has problems.
    """
    screen.recipe = read(
        argument or _only_recipe(),
        adapters.settings_for,
        list(overrides or ()),
        environ=environment.all_variables(),
        foreign=adapters.foreign,
    )
    return screen.recipe


def _only_recipe() -> str:
    found = sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("*.yml")])
    if len(found) == 1:
        return str(found[0])
    names = ", ".join(str(path) for path in found) or "none"
    raise usage(f"name a recipe; in {FOLDER}/ there are: {names}", help="lorakit recipes list")
