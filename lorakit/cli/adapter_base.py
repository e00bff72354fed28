"""Find the base of a saved adapter: its run, its passport and its settings say which it is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit import adapters, environment
from lorakit.adapters import Saved
from lorakit.cli.screen import Screen
from lorakit.errors import BadInput, LorakitError, Place
from lorakit.model.base import Base, find
from lorakit.model.local import place
from lorakit.recipe.files import RESOLVED
from lorakit.recipe.reader import read
from lorakit.recipe.sections import Model, Recipe
from lorakit.storage.redact import printable


def find_base(screen: Screen, saved: Saved, named: str | None, *, allow_remote_code: bool) -> Base:
    """Return the base that was named, else the first that the adapter's papers lead to.

    Raises:
        BadInput: `model.not-found` when it was a local one that is not here, or what
            `model.base.find` raises.
    """
    passport: Any = saved.passport or {}
    on_hub = passport.get("base", {}).get("revision") or saved.config.text("revision")
    meant = [named] if named is not None else [path for path in _meant(saved, passport) if path]
    here = [path for path in meant if _is_here(path)]
    if not meant or not (here or named is not None or on_hub or not passport):
        raise BadInput(
            "model.not-found",
            f"the base {meant[-1] if meant else 'that the adapter was trained on'} is not here",
            where=str(saved.folder),
            help="name it with --base FOLDER_OR_HUB_ID",
        )
    path = (here or meant[-1:])[0]
    if not path.strip() or not path.isprintable():
        raise BadInput(
            "model.not-found",
            f"'{printable(path)}' names no model",
            where=str(saved.folder),
            help="name the base with --base FOLDER_OR_HUB_ID",
        )
    section = Model(
        path=path,
        revision=None if here or named else on_hub,
        trust_remote_code=allow_remote_code,
    )
    try:
        return find(
            section,
            Path(),
            offline=screen.offline,
            allow_remote_code=allow_remote_code,
            cache=environment.cache_folder(),
        )
    except BadInput as error:
        if error.id == "model.not-found" and not error.where:
            error.where = Place(printable(path, 500))
        raise


def recipe_of(saved: Saved) -> Recipe | None:
    """Return the recipe of the run that an adapter lies in, None where there is no such run.

    Nor where somebody has edited it: the adapter's passport speaks for the adapter as well.
    """
    resolved = saved.folder.parent / RESOLVED
    if not resolved.is_file():
        return None
    try:
        return read(resolved, adapters.settings_for, environ={})
    except LorakitError:
        return None


def _meant(saved: Saved, passport: Any) -> Iterator[str | None]:
    """Yield the paths and ids that name the base, the surest first."""
    recipe = recipe_of(saved)
    yield recipe.model.path if recipe else None
    yield passport.get("recipe", {}).get("model", {}).get("path")
    yield passport.get("base", {}).get("name")
    yield saved.config.text("base_model_name_or_path")


def _is_here(path: str) -> bool:
    try:
        return place(path, Path(), environment.cache_folder()) is not None
    except BadInput:  # something else has that name
        return False
