"""Where a recipe came from."""

from dataclasses import dataclass, field
from pathlib import Path

from lorakit.errors import Place
from lorakit.recipe.files import RESOLVED


@dataclass(frozen=True)
class Origin:
    """Where a recipe came from, for paths that are relative to it and for messages about it.

    All origins compare equal: two recipes are the same when they say the same.
    """

    path: Path = field(compare=False)
    text: bytes = field(compare=False)
    places: dict[tuple[str | int, ...], Place] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """What a run of the recipe is called; that of a run's own recipe is the run's name."""
        if self.path.name == RESOLVED:
            return self.path.absolute().parent.name
        return self.path.name.removesuffix(self.path.suffix)

    @property
    def folder(self) -> Path:
        return self.path.parent

    def place(self, *key: str | int) -> Place:
        """Return where a key stands, or the nearest section above it that the file has."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, Place(str(self.path)))
