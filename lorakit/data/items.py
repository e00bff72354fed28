"""Rows → conversations: the format of each source, and its faults with place and count."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from lorakit.data import formats, user_code
from lorakit.data.formats import Conversation, Format
from lorakit.data.source import Loaded, digest, load
from lorakit.errors import BadInput, Notice, Place
from lorakit.recipe.sections import Data, Recipe, Source
from lorakit.storage.redact import printable

FIRST_ROWS = 100  # whose columns decide the format


@dataclass(frozen=True)
class Request:
    """Which rows are wanted, and what may be done to get them.

    Args:
        section: the recipe's `data`.
        folder: what paths are relative to.
        seed: of the train/eval split.
        offline: whether hub ids are refused.
        allow_local_code: whether `module:function` may run.
        eval_sources: taken in place of `data.eval`.
        only: the set that is wanted; the other is left empty, and its own files are not opened.
    """

    section: Data
    folder: Path
    seed: int
    offline: bool = True
    allow_local_code: bool = False
    eval_sources: tuple[Source, ...] | None = None
    only: Literal["train", "eval"] | None = None

    @classmethod
    def of(cls, recipe: Recipe, **more: Any) -> Self:
        """Return the request for a recipe's rows; `more` are the fields that no recipe holds."""
        return cls(recipe.data, recipe.origin.folder, recipe.seed, **more)

    @property
    def share(self) -> float | None:
        """The share of train that is held out for eval, None where eval has files of its own."""
        share = self.section.eval
        return share if isinstance(share, float) and not self.eval_sources else None

    @property
    def sources(self) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
        """The sources that must be read for train and, where it has its own, for eval."""
        held_out = self.eval_sources or self.section.eval
        own = tuple(held_out) if held_out and not isinstance(held_out, float) else ()
        train = () if self.only == "eval" and own else self.section.train
        return train, () if self.only == "train" else own


@dataclass(frozen=True, slots=True)
class Item:
    """A conversation, where its row stands, its repeats per epoch and the format it was read by."""

    conversation: Conversation
    place: Place
    weight: float
    format: str


@dataclass(frozen=True)
class Items:
    """What the sources hold: both sets, the digest of each source, and notices."""

    train: tuple[Item, ...]
    eval: tuple[Item, ...]
    sha256: dict[str, str]
    notices: tuple[Notice, ...]


def read(request: Request) -> Items:
    """Read all sources and turn their rows into conversations.

    Raises:
        BadInput: for the first fault, saying how many more rows have the same.
        EnvironmentLacks: `env.offline`.
    """
    section = request.section
    train_sources, own = request.sources
    digests: dict[str, str] = {}
    notices: list[Notice] = []

    def items(sources: Sequence[Source], first: int) -> list[Item]:
        found = []
        for number, source in enumerate(sources, first):
            format = _named(source, section.format, request.allow_local_code, notices)
            loaded = load(source, number, folder=request.folder, offline=request.offline)
            digests.update([digest(source, folder=request.folder, offline=request.offline)])
            found += _conversations(loaded, _fitting(format, loaded), notices)
        return found

    train, kept = items(train_sources, 0), items(own, len(section.train))
    if share := request.share:
        train, kept = split(train, share, request.seed)
    return Items(tuple(train), tuple(kept), digests, tuple(dict.fromkeys(notices)))


def split(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Return train and eval: a seeded choice of rows, each set in its own order.

    Raises:
        BadInput: `data.empty` when there are too few rows for two sets.
    """
    if len(items) < 2:
        raise BadInput("data.empty", "data.eval: 1 row cannot be split into train and eval")
    held = min(len(items) - 1, max(1, round(share * len(items))))
    words = np.random.PCG64(np.random.SeedSequence((seed,))).random_raw(len(items))
    chosen = set(np.argsort(words, kind="stable")[:held].tolist())
    parts: tuple[list[Item], list[Item]] = ([], [])
    for index, item in enumerate(items):
        parts[index in chosen].append(item)
    return parts


def _named(
    source: Source, default: str, allow_local_code: bool, notices: list[Notice]
) -> Format | None:
    """Return the format that the recipe names for a source; None for `auto`."""
    name = source.format or default
    if ":" in name:
        format, notice = user_code.load(name, allowed=allow_local_code)
        notices.append(notice)
        return format
    return None if name == "auto" else formats.find(name)


def _fitting(format: Format | None, loaded: Loaded) -> Format:
    """Check the columns of a source; choose its format by them where the recipe names none."""
    mapping = loaded.source.columns
    first = loaded.rows[:FIRST_ROWS]
    try:
        formats.check_mapping(mapping, {name for row in first for name in row.value}, format)
        columns = {name for row in first for name in formats.renamed(row.value, mapping)}
        if format is None:
            return formats.detect(columns)
        formats.require(format, columns)
    except BadInput as error:
        error.where = Place(first[0].place.file)
        raise
    return format


def _conversations(loaded: Loaded, format: Format, notices: list[Notice]) -> list[Item]:
    items, extra, rows_with_extra = [], set(), 0
    faults = Faults()
    for row in loaded.rows:
        value = formats.renamed(row.value, loaded.source.columns)
        try:
            items.append(Item(format.read(value), row.place, loaded.source.weight, format.name))
        except BadInput as error:
            faults.add(error, row.place)
            continue
        if format.required and (more := formats.extra_fields(value, format)):
            extra |= more
            rows_with_extra += 1
    faults.raise_first()
    if extra:
        names = ", ".join(printable(name, 40) for name in sorted(extra)[:10])
        more_names = f" and {len(extra) - 10} more" if len(extra) > 10 else ""
        message = f"{format.name} does not read {names}{more_names} (in {rows_with_extra:,} rows)"
        notices.append(Notice("data.extra-fields", message, Place(loaded.rows[0].place.file)))
    return items


class Faults:
    """The first fault of many rows, and how many more have the same."""

    def __init__(self) -> None:
        self._first: BadInput | None = None
        self._more = 0

    def add(self, error: BadInput, place: Place) -> None:
        """Note the fault of the row at a place."""
        if self._first is None:
            error.where = place
            self._first = error
        elif error.id == self._first.id:
            self._more += 1

    def raise_first(self) -> None:
        """Raise the first fault, if there is one."""
        if self._first is None:
            return
        more = f" ({self._more:,} more rows have the same fault)" if self._more else ""
        first = self._first
        raise BadInput(first.id, first.message + more, where=first.where, help=first.help)
