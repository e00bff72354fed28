"""Finding a base in tests: from a folder, offline, with nothing allowed."""

import json
from pathlib import Path
from typing import Any

import torch

from lorakit.model import base
from lorakit.model.base import Base
from lorakit.recipe.sections import Model


def find(
    path: Path | str, *, cache: Path | None = None, allow: bool = False, **section: Any
) -> Base:
    path = Path(path)
    return base.find(
        Model(path=path.name, **section),
        path.parent,
        offline=True,
        allow_remote_code=allow,
        cache=cache or path.parent / "no-cache",
    )


def load(found: Base, **options: Any) -> torch.nn.Module:
    return base.load(found, device=torch.device("cpu"), **{"dtype": torch.float32, **options})


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; a value of None takes the key out."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
