"""Every packaged recipe is valid, says how to run it, and runs: with a tiny model in its place."""

import csv
import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorakit import adapters
from lorakit.cli.app import app
from lorakit.recipe.files import packaged_recipes
from lorakit.recipe.reader import read
from lorakit.recipe.sections import Recipe, Source
from tests.source_tree import ROOT
from tests.tiny import write_tiny_model

RECIPES = packaged_recipes()
FAMILY = {"gpt2-e2e": "gpt2"}
ROWS = 24


def recipe(name: str) -> Recipe:
    return read(name, adapters.settings_for, environ=os.environ)


def tiny_source(source: Source, folder: Path) -> str:
    """Write short rows with a source's columns in its kind of file; return what `--set` takes."""
    folder.mkdir()
    rows: list[dict[str, object]] = []
    for k in range(ROWS):
        turns = {"prompt": f"{k} + 1", "completion": str(k + 1)}
        said = zip(("user", "assistant"), turns.values(), strict=True)
        messages = [{"role": role, "content": text} for role, text in said]
        rows.append(dict(turns) if source.columns else {"messages": messages})
    columns = dict(source.columns)
    rows = [{columns.get(key, key): value for key, value in row.items()} for row in rows]
    path = folder / ("rows.csv" if source.path.endswith(".csv") else "rows.jsonl")
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return json.dumps({"path": str(path), "columns": columns})


def test_the_recipes_are_those_of_the_folder() -> None:
    assert set(RECIPES.values()) == set((ROOT / "recipes").glob("*.yaml"))
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_says_how_to_run_it(name: str) -> None:
    valid = recipe(name)
    head, rest = RECIPES[name].read_text(encoding="utf-8").split("\n", 1)
    assert head.startswith("# ")
    assert len(head) <= 100
    assert f"lorakit train {name}" in rest.split("\nmodel:")[0]
    sources = (*valid.data.train, *(valid.eval.data or ()))
    packaged = [each.path for each in sources if each.path.startswith("data/")]
    assert all((RECIPES[name].parent / path).is_file() for path in packaged)


@pytest.mark.slow  # two processes' worth of model building, three commands a recipe
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_with_a_tiny_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = recipe(name)
    model = write_tiny_model(tmp_path / "model", FAMILY.get(name, "llama"))
    changes = [f"model.path={model}", "data.max_length=256", "eval.generate.max_new_tokens=4"]
    changes.append(f"data.train={tiny_source(written.data.train[0], tmp_path / 'train')}")
    if isinstance(written.data.eval, tuple):
        changes.append(f"data.eval={tiny_source(written.data.eval[0], tmp_path / 'eval')}")
    if written.eval.data:
        changes.append(f"eval.data={tiny_source(written.eval.data[0], tmp_path / 'test')}")
    sets = [argument for change in changes for argument in ("--set", change)]

    trained = CliRunner().invoke(app, ["train", name, "--max-steps", "2", *sets])
    assert trained.exit_code == 0, trained.output
    run = tmp_path / "runs" / name
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "merged" / "config.json").is_file() == written.merge.enabled

    judged = CliRunner().invoke(app, ["eval", name, "--json", *sets])
    assert judged.exit_code in (0, 1), judged.output  # a random model may miss the gates
    assert set(json.loads(judged.stdout)["metrics"]) == set(written.eval.metrics)
