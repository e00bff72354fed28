"""`lorakit data` on a tiny model: what people and programs see."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lorakit.cli.data import app
from tests.data.given import ask, rows_file
from tests.tiny import write_tiny_model

ROWS = [ask("the\x1b[31m capital?", "paris."), ask("b?", "B"), ask("c? " * 40, "C")]
ANSWER = "⟦paris.<|im_end|>⟧⏎"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    rows_file(tmp_path, ROWS)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {model}\ndata: {{train: rows.jsonl, eval: rows.jsonl}}\n")
    return path


def _run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_preview_brackets_what_is_trained(recipe: Path) -> None:
    result = _run("preview", recipe, "-n", 1, "--ids")
    assert result.exit_code == 0, result.stderr
    assert ANSWER in result.stdout
    assert "\x1b" not in result.stdout
    assert "\\x1b[31m" in result.stdout
    assert "4 trained, ends in a trained stop token" in result.stdout
    assert f"{recipe.parent / 'rows.jsonl'}:1" in result.stdout
    assert "rows.jsonl:2" not in result.stdout
    assert "ids: 1 " in result.stdout


def test_preview_colours_what_is_trained(recipe: Path) -> None:
    shown = _run("preview", recipe, "-n", 1, "--color", "always").stdout
    assert "⟦" not in shown
    assert "\x1b[32mparis." in shown
    assert "\x1b[7;32m<|im_end|>" in shown
    assert "\x1b[2;7m<|im_start|>" in shown


def test_preview_as_json(recipe: Path) -> None:
    keys = ("--index", 2, "--split", "eval", "--json", "--set", "data.max_length=40")
    document = json.loads(_run("preview", recipe, *keys).stdout)
    (sample,) = document["samples"]
    assert document["schema"] == "lorakit.data_preview/1"
    assert sample["line"] == 3
    assert len(sample["ids"]) == len(sample["labels"]) > sample["kept"] == 40
    assert sample["trained"] == 0
    assert not sample["ends_in_stop"]
    assert sample["text"].endswith("C<|im_end|>\n")


def test_preview_beyond_the_last_row(recipe: Path) -> None:
    result = _run("preview", recipe, "--index", 3)
    assert result.exit_code == 2
    assert "3 rows" in result.stderr


def test_stats(recipe: Path) -> None:
    result = _run("stats", recipe)
    assert result.exit_code == 0, result.stderr
    assert "train  3 of 3 rows" in result.stdout
    facts = json.loads(_run("stats", recipe, "--json").stdout)
    assert facts["train"]["rows"] == facts["overlap"] == 3
    assert facts["train"]["percentiles"]["p99"] == facts["train"]["longest"]


def test_check(recipe: Path) -> None:
    found = _run("check", recipe, "--json")
    assert found.exit_code == 1
    document = json.loads(found.stdout)
    assert (document["ok"], document["exit"]) == (False, 1)
    assert [one["id"] for one in document["findings"]] == ["data.overlap"]
    shown = _run("check", recipe)
    assert shown.exit_code == 1
    assert shown.stdout.startswith("no  data.overlap")
    assert "error[check.data]" in shown.stderr
    clean = _run("check", recipe, "--set", "data.eval=null")
    assert clean.exit_code == 0
    assert clean.stdout == "ok  nothing found\n"
    rows_file(recipe.parent, [{**row, "id": 1} for row in ROWS])
    warned = _run("check", recipe, "--set", "data.eval=null")
    assert "warning[data.extra-fields]" in warned.stderr
    assert (warned.exit_code, warned.stdout) == (0, "ok  with the warnings above\n")


def test_three_sets_are_what_the_recipe_calls_them(recipe: Path) -> None:
    """Train and eval as training has them; test is what `lorakit eval` measures."""
    rows_file(recipe.parent, [*ROWS[:1], ask("another?", "one.")], "test.jsonl")
    test = ("--set", "eval.data=test.jsonl")
    held_out = ("--set", "data.eval=0.4")
    shown = _run("stats", recipe, *test, *held_out).stdout
    assert "train  2 of 2 rows" in shown
    assert "eval  1 of 1 rows" in shown
    assert "test  2 of 2 rows" in shown
    facts = json.loads(_run("stats", recipe, "--json", *test, *held_out).stdout)
    assert [facts[name]["rows"] for name in ("train", "eval", "test")] == [2, 1, 2]
    (sample,) = json.loads(
        _run("preview", recipe, "--split", "test", "--index", 1, "--json", *test).stdout
    )["samples"]
    assert Path(sample["file"]).name == "test.jsonl"
    found = _run("check", recipe, *test, "--set", "data.eval=null")
    assert found.stdout == "no  data.overlap: 1 of 2 test rows are in train as well\n"
    for split, key in (("test", "eval.data"), ("eval", "data.eval")):
        refused = _run("preview", recipe, "--split", split, "--set", "data.eval=null")
        assert refused.exit_code == 2
        assert f"the recipe has no {key}" in refused.stderr
