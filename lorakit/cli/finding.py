"""Find the base of a saved adapter: its run, its passport and its settings say which it is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit import adapters, environment
from lorakit.adapters import Saved
from lorakit.cli.screen import Screen
from lorakit.errors import BadInput, LorakitError
from lorakit.model.base import Base, find
from lorakit.recipe.reader import read
from lorakit.recipe.sections import Model


def find_base(screen: Screen, saved: Saved, named: str | None, *, allow_remote_code: bool) -> Base:
    """Return the base that was named, else the first that the adapter's papers lead to.

    Raises:
        BadInput: `model.not-found` when it was a local one that is not here, or what
            `model.base.find` raises.
    """
    passport: Any = saved.passport or {}
    on_hub = passport.get("base", {}).get("revision") or saved.config.values.get("revision")
    meant = [named] if named else [path for path in _meant(saved, passport) if path]
    here = [path for path in meant if _is_here(path)]
    if not meant or not (here or named or on_hub or not passport):
        raise BadInput(
            "model.not-found",
            f"the base {meant[-1] if meant else 'that the adapter was trained on'} is not here",
            where=str(saved.folder),
            help="name it with --base FOLDER_OR_HUB_ID",
        )
    section = Model(
        path=(here or meant[-1:])[0],
        revision=None if here or named else on_hub,
        trust_remote_code=allow_remote_code,
    )
    return find(
        section,
        Path(),
        offline=screen.offline,
        allow_remote_code=allow_remote_code,
        cache=environment.cache_folder(),
    )


def _meant(saved: Saved, passport: Any) -> Iterator[str | None]:
    """Yield the paths and ids that name the base, the surest first."""
    resolved = saved.folder.parent / "resolved.yaml"
    if resolved.is_file():
        try:
            yield read(resolved, adapters.settings_for, environ={}).model.path
        except LorakitError:
            # Somebody has edited the run's recipe; the passport speaks for the adapter as well.
            yield None
    yield passport.get("recipe", {}).get("model", {}).get("path")
    yield passport.get("base", {}).get("name")
    yield saved.config.values.get("base_model_name_or_path")


def _is_here(path: str) -> bool:
    places = (Path(path).expanduser(), environment.cache_folder() / "models" / path)
    return any(place.exists() for place in places)
