"""What a word of the command line may become: the shell asks, and must not wait for torch."""

import glob
import os


def names(typed: str) -> list[str]:
    """Return the packaged recipes whose names begin so."""
    from lorakit.recipe.files import packaged_recipes

    return [name for name in packaged_recipes() if name.startswith(typed)]


def recipes(typed: str) -> list[str]:
    """Return what a command takes for a recipe: packaged ones, files, and folders of runs."""
    found = runs(typed)
    files = [path for ending in ("yaml", "yml") for path in _below(typed, f".{ending}", 2)]
    # A run keeps recipes of its own, which its folder stands for.
    return [*names(typed), *(path for path in files if os.path.dirname(path) not in found), *found]


def runs(typed: str) -> list[str]:
    """Return the folders of runs."""
    from lorakit.recipe.files import RESOLVED

    return [os.path.dirname(path) for path in _below(typed, f"/{RESOLVED}", 2)]


def adapters(typed: str) -> list[str]:
    """Return what a command takes for an adapter: folders of runs, and of adapters."""
    return [*runs(typed), *(os.path.dirname(p) for p in _below(typed, "/adapter_config.json", 3))]


def keys(typed: str) -> list[str]:
    """Return the keys of a recipe, each with the sign that its value follows."""
    from lorakit.recipe import reference, schema

    found = (f"{key}=" for key in reference.keys(schema.shipped()))
    return [key for key in found if key.startswith(typed)]


def _below(typed: str, ending: str, depth: int) -> list[str]:
    """Return the paths that begin with what was typed, some folders further down at most."""
    start = glob.escape(typed)
    patterns = (start + "/".join(["*"] * deep) + ending for deep in range(1, depth + 1))
    return sorted({path for pattern in patterns for path in glob.glob(pattern)})
