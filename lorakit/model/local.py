"""Models on this machine: the folder or file that a recipe's path means."""

import os
from pathlib import Path

from lorakit.errors import BadInput
from lorakit.model import hub
from lorakit.recipe import expected, files
from lorakit.storage.redact import printable


def place(path: str, recipe_folder: Path, cache: Path) -> Path | None:
    """Return the folder or GGUF file that a path means, None when there is neither.

    Raises:
        BadInput: `model.not-found` when there is something else.
    """
    wanted = Path(os.path.expanduser(path))
    places = [recipe_folder / wanted]
    if not wanted.is_absolute() and ".." not in wanted.parts:
        places.append(cache / "models" / wanted)
    for one in places:
        # Not Path's own questions: a name that is too long is an answer, not an error.
        if os.path.isdir(one) or (os.path.isfile(one) and one.suffix == ".gguf"):
            return one
    if os.path.exists(places[0]):
        raise BadInput(
            "model.not-found",
            f"{path} is neither a model folder with config.json nor a .gguf file",
            where=str(places[0]),
        )
    return None


def check(path: str, recipe_folder: Path, cache: Path) -> None:
    """Refuse what is clearly a path, and names no model here; the hub is not asked.

    Raises:
        BadInput: `model.not-found`.
    """
    if place(path, recipe_folder, cache) is None:
        check_id(path, recipe_folder, cache)


def meant(path: str, cache: Path) -> str | None:
    """Say which model a text may mean that names none: in the working folder, or in the cache."""
    if os.path.exists(path):
        return files.misplaced(path)
    try:
        known = {name.lower(): name for name in os.listdir(cache / "models")}
    except OSError:
        return None
    near = expected.nearest(path.lower(), known, 0.5)
    return f"did you mean {printable(known[near])}, which is in the cache?" if near else None


def check_id(path: str, recipe_folder: Path, cache: Path) -> None:
    """Refuse a text that names nothing here and cannot be a hub id; whoever calls knows its place.

    Raises:
        BadInput: `model.not-found`.
    """
    first, below, _ = path.partition("/")
    if not hub.is_id(path) or (below and os.path.isdir(recipe_folder / first)):
        kind = "file" if path.endswith(".gguf") else "folder"
        raise BadInput(
            "model.not-found",
            f"{kind} {printable(path, 500)} does not exist (recipe's folder {recipe_folder}, "
            f"cache {cache})",
            help=meant(path, cache)
            or "give a folder with config.json, a .gguf file, or a hub id such as org/name",
        )
