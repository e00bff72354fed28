"""Two methods' settings that need no torch, and a reader that uses them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from lorakit.errors import BadInput, RecipeError, UnknownMethod
from lorakit.recipe.expected import nearest
from lorakit.recipe.reader import read
from lorakit.recipe.sections import Adapter, Names, Recipe

MINIMAL = "model: hub/base\ndata:\n  train: hub/rows\n"
OF_MINIMAL = {("model",), ("data",), ("data", "train")}


class LowRank(Adapter):
    rank: int = Field(16, ge=1, description="size of the update")
    alpha: float = Field(32.0, gt=0, description="its strength")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of inputs left out")
    target_modules: (
        Literal["all-linear", "attention", "mlp"]
        | Annotated[str, Field(pattern="^re:.")]
        | Annotated[Names, Field(min_length=1)]
    ) = Field("all-linear", description="what is adapted")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="pattern: rank"
    )

    @field_validator("alpha")
    @classmethod
    def _no_thirteen(cls, alpha: float) -> float:
        if alpha == 13:
            raise ValueError("thirteen is unlucky")
        return alpha


class Virtual(Adapter):
    tokens: int = Field(20, ge=1, description="virtual tokens before the text")


METHODS: dict[str, type[Adapter]] = {"lora": LowRank, "virtual": Virtual}


def settings_for(method: str) -> type[Adapter]:
    if method not in METHODS:
        near = nearest(method, METHODS)
        message, help = f"no method {method}", "lora or virtual"
        raise UnknownMethod("adapter.unknown-method", message, help=help, meant=near)
    return METHODS[method]


def read_text(
    folder: Path,
    text: str | bytes,
    sets: Sequence[str] = (),
    *,
    name: str = "recipe.yaml",
    environ: Mapping[str, str] | None = None,
    foreign: Mapping[str, str] | None = None,
) -> Recipe:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read(path, settings_for, sets, environ=environ or {}, foreign=lambda: foreign or {})


def problems(
    folder: Path, text: str | bytes, sets: Sequence[str] = (), **more: object
) -> list[str]:
    """Return the problems as the screen shows them: `line:column: [id] message; help`."""
    try:
        read_text(folder, text, sets, **more)  # type: ignore[arg-type]
    except RecipeError as error:
        return [shown(problem, folder) for problem in error.problems]
    except BadInput as error:
        return [shown(error, folder)]
    return []


def shown(problem: BadInput, folder: Path) -> str:
    place = str(problem.where).removeprefix(f"{folder}/")
    return f"{place}: [{problem.id}] {problem.message}" + (
        f"; {problem.help}" if problem.help else ""
    )
