"""The recipe that a command was given, by path, by name or as the only one, and its base."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit import adapters, environment
from lorakit.cli.screen import Screen, usage
from lorakit.recipe.reader import read
from lorakit.recipe.sections import Recipe

if TYPE_CHECKING:
    from lorakit.model.base import Base

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


def base_of(screen: Screen, recipe: Recipe, *, allow_remote_code: bool) -> "Base":
    """Find and check the base of a recipe; none of its weights is read.

    Raises:
        LorakitError: as `model.base.find` does.
    """
    from lorakit.model import base

    return base.find(
        recipe.model,
        recipe.origin.folder,
        offline=screen.offline,
        allow_remote_code=allow_remote_code,
        cache=environment.cache_folder(),
    )


def _only_recipe() -> str:
    found = sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("*.yml")])
    if len(found) == 1:
        return str(found[0])
    names = ", ".join(str(path) for path in found) or "none"
    raise usage(f"name a recipe; in {FOLDER}/ there are: {names}", help="lorakit recipes list")
