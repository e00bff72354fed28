"""`lorakit recipes`: results on stdout, everything else on stderr, torch nowhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lorakit.cli.recipes import app
from lorakit.recipe import schema
from lorakit.recipe.files import packaged_recipes
from lorakit.recipe.reader import read
from tests.recipe.stand_ins import MINIMAL, settings_for


def run(*arguments: str, exit: int = 0) -> Result:
    done = CliRunner().invoke(app, [*arguments, "--color", "never"])
    assert done.exit_code == exit, done.output
    return done


def test_list() -> None:
    text = run("list").stdout
    rows = json.loads(run("list", "--json").stdout)["recipes"]
    assert [row["name"] for row in rows] == list(packaged_recipes())
    for row in rows:
        assert all(row[key] in text for key in ("name", "model", "method", "data", "description"))
        assert row["description"]
        recipe = read(row["name"], settings_for, environ={})
        assert (row["model"], row["method"]) == (recipe.model.path, recipe.adapter.method)


def test_show_prints_the_file() -> None:
    for name, path in packaged_recipes().items():
        assert run("show", name).stdout == path.read_text()
        assert json.loads(run("show", name, "--json").stdout)["path"] == str(path)


def test_show_resolved(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(MINIMAL)
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nadapter: {rank: 4}\n")
    text = run("show", str(tmp_path / "top.yaml"), "--resolved").stdout
    assert f"  train: hub/rows  # {tmp_path}/base.yaml:3:10\n" in text
    assert f"  rank: 4  # {tmp_path}/top.yaml:2:17\n" in text
    assert "alpha" not in text
    everything = run("show", str(tmp_path / "top.yaml"), "--defaults").stdout
    assert "  alpha: 32.0\n" in everything
    assert "  rank: 4\n" in everything
    assert "  learning_rate: 0.0002\n" in everything


def test_show_what_is_not_there() -> None:
    done = run("show", "quickstrat", exit=2)
    assert done.stdout == ""
    assert "recipe.not-found" in done.stderr
    assert "quickstart" in done.stderr


def test_the_beginning_of_a_name_is_enough_for_a_suggestion() -> None:
    assert "did you mean gsm8k-smollm2?" in run("show", "gsm8k", exit=2).stderr


def test_copy_brings_the_files_that_the_recipe_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copied = json.loads(run("copy", "quickstart", "--json").stdout)["copied"]
    assert Path("quickstart.yaml").read_text() == packaged_recipes()["quickstart"].read_text()
    assert len(copied) > 1
    here = read("quickstart.yaml", settings_for, environ={})
    assert all(Path(source.path).is_file() for source in here.data.train)


def test_copy_never_replaces_what_it_was_not_asked_to(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    run("copy", "llama7b-qv", str(target))
    run("copy", "llama7b-qv", str(target))
    target.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    done = run("copy", "llama7b-qv", str(target), exit=2)
    assert "output.not-empty" in done.stderr
    assert target.read_text() == "mine"
    assert sorted(tmp_path.rglob("*")) == before
    run("copy", "llama7b-qv", str(target), "--force")
    assert target.read_text() == packaged_recipes()["llama7b-qv"].read_text()


def test_copy_into_a_folder(tmp_path: Path) -> None:
    run("copy", "llama7b-qv", str(tmp_path))
    assert (tmp_path / "llama7b-qv.yaml").is_file()
    run("copy", "llama7b-qv", f"{tmp_path}/sub/new/")
    assert (tmp_path / "sub" / "new" / "llama7b-qv.yaml").is_file()


@pytest.mark.slow  # imports the methods, and with them torch
def test_validate(tmp_path: Path) -> None:
    good, bad, worse = (tmp_path / f"{name}.yaml" for name in ("good", "bad", "worse"))
    good.write_text(MINIMAL)
    bad.write_text(MINIMAL + "adapter: {rnak: 8, dropout: 5}\n")
    worse.write_text("")
    assert run("validate", str(good)).stdout == "1 valid\n"
    done = run("validate", str(bad), str(good), str(worse), str(tmp_path / "none.yaml"), exit=2)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"{good}: valid",
        f"{bad}:4:11: adapter.rnak: unknown key; did you mean 'rank'?",
        f"{bad}:4:29: adapter.dropout: must be in [0, 1), got 5; did you mean 0.05?",
        *[line for line in done.stderr.splitlines() if f"{tmp_path}/none.yaml: " in line],
        f"{worse}: the recipe is empty; it needs the keys model and data",
    ]
    assert len(done.stderr.splitlines()) == 5
    document = json.loads(run("validate", str(bad), "--json", exit=2).stdout)
    assert [error["id"] for error in document["errors"]] == [
        "recipe.unknown-key",
        "recipe.out-of-range",
    ]
    assert document["error"] == document["errors"][0]
    assert (document["error"]["line"], document["error"]["column"]) == (4, 11)


@pytest.mark.slow  # imports the methods, and with them torch
def test_validate_looks_for_the_files_that_a_recipe_names(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: ./base\ndata:\n  train: [hub/rows, rows.jsonl, {path: more.csv}]\n"
        "  eval: held.jsonl\n  chat_template: own.jinja\neval: {data: {path: gold.jsonl}}\n"
    )
    done = run("validate", str(recipe), "--json", exit=2)
    found = [(e["id"], e["line"], e["column"]) for e in json.loads(done.stdout)["errors"]]
    assert found == [
        ("model.not-found", 1, 8),
        ("data.not-found", 3, 21),
        ("data.not-found", 3, 40),
        ("data.not-found", 4, 9),
        ("data.not-found", 5, 18),
        ("data.not-found", 6, 21),
    ]
    (tmp_path / "base").mkdir()
    for name in ("rows.jsonl", "more.csv", "held.jsonl", "own.jinja", "gold.jsonl"):
        (tmp_path / name).touch()
    assert run("validate", str(recipe)).stdout == "1 valid\n"


@pytest.mark.slow  # imports the methods, and with them torch
def test_every_packaged_recipe_is_valid() -> None:
    run("validate", *(name for name in packaged_recipes() if name != "gpt2-e2e"))
    done = run("validate", "gpt2-e2e", exit=2)  # its data are to be cloned first
    assert [line.partition("there is")[0].split()[-1] for line in done.stderr.splitlines()] == [
        "data.train.path:",
        "data.eval.path:",
    ]


def test_schema(tmp_path: Path) -> None:
    assert run("schema").stdout == schema.FILE.read_text()
    out = tmp_path / "s.json"
    assert run("schema", "--out", str(out)).stdout == f"{out}\n"
    assert out.read_bytes() == schema.FILE.read_bytes()
    assert json.loads(run("schema", "train.epochs").stdout)["default"] == 1.0
    document = json.loads(run("schema", "train.epochs", "--json").stdout)
    assert document["json_schema"]["default"] == 1.0
    assert document["schema"].startswith("lorakit.")
    assert "did you mean train.epochs?" in run("schema", "train.epoch", exit=2).stderr


@pytest.mark.slow  # a process of its own
def test_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from lorakit.cli.recipes import app\n"
        "for line in (['list'], ['show', 'quickstart', '--defaults'], ['schema'], ['--help'],\n"
        f"             ['copy', 'quickstart', {str(tmp_path)!r}]):\n"
        "    assert CliRunner().invoke(app, line).exit_code == 0\n"
        "print(*{'torch', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
