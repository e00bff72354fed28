"""What two real steps of a plan are said to take."""

from pathlib import Path
from typing import Any

import pytest

from lorakit import adapters
from lorakit.recipe.reader import read
from lorakit.runtime import Runtime
from lorakit.training import loop, trial
from lorakit.training.plan import Permissions, make
from lorakit.training.speed import Rate
from tests.training.test_loop import ALONE, folder

__all__ = ["folder"]


def test_what_loading_took_is_not_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device whose mark stands at 50 after loading, and at 7 in a step; 2 were in use before."""
    marks = [50]
    real = loop.step

    def step(*arguments: Any) -> bool:
        marks.append(7)
        return real(*arguments)

    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(
        f"model: {folder / 'model'}\n"
        f"data: {{train: {folder / 'rows.jsonl'}}}\n"
        "train: {batch_size: 8, max_steps: 2}\n"
    )
    recipe = read(str(recipe_file), adapters.settings_for, [], environ={})
    plan = make(recipe, ALONE, Permissions(offline=True))
    monkeypatch.setattr(loop, "step", step)
    monkeypatch.setattr(Runtime, "used_bytes", lambda _: 2)
    monkeypatch.setattr(Runtime, "peak_bytes", lambda _: max(marks))
    monkeypatch.setattr(Runtime, "reset_peak", lambda _: marks.clear())
    assert trial.trial(plan, ALONE, Rate(1e9, "a guess")).bytes == 7 - 2
