"""The working folder that every case starts from, made once by real commands."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_inputs.cases import ADAPTER, MINIMAL, World, run
from tests.tiny import write_tiny_model

RECIPE = (
    MINIMAL.rstrip()
    + """
  max_length: 64
adapter: {rank: 4, target_modules: [q_proj, v_proj]}
train: {epochs: 2, batch_size: 8, learning_rate: 1e-3, save_every: 2}
"""
)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, a recipe and its finished run; every command has done its imports."""
    folder = tmp_path_factory.mktemp("whole")
    write_tiny_model(folder / "model", "llama")
    rows = [{"prompt": "ask " * (1 + n % 3), "completion": "answer"} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LORAKIT_CACHE", str(folder / "cache"))
        for arguments in (
            ["train", "recipe.yaml"],
            ["merge", ADAPTER, "--out", "merged"],
            ["generate", ADAPTER, "ask", "--max-new-tokens", "2"],
            ["eval", "recipe.yaml", "--set", "data.eval=0.2"],
            ["data", "preview", "recipe.yaml"],
        ):
            assert run(arguments).exit == 0, arguments
    shutil.rmtree(folder / "merged")
    return folder


@pytest.fixture
def world(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A copy of it that a case may spoil, as the working folder."""
    folder = tmp_path / "world"
    shutil.copytree(whole, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LORAKIT_CACHE", str(folder / "cache"))
    with (made := World(folder)).held:
        yield made
