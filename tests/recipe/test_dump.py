"""Writing a recipe: it reads back as the same recipe, from any folder."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.errors import RecipeError
from lorakit.recipe.files import packaged_recipes
from lorakit.recipe.reader import dump, read
from tests.recipe.stand_ins import MINIMAL, read_text, settings_for
from tests.recipe.written import RECIPES

RELAXED = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def reread(text: str, folder: Path) -> Any:
    elsewhere = folder / "runs" / "x"
    elsewhere.mkdir(parents=True, exist_ok=True)
    return read_text(elsewhere, text, name="resolved.yaml")


def as_yaml(tree: dict[str, Any]) -> str:
    """Write with json, whose text is YAML as well, but for characters YAML wants escaped."""
    text = json.dumps(tree, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


@pytest.mark.slow  # four dumps and readings an example
@RELAXED
@given(tree=RECIPES)
def test_read_after_dump_is_the_same_recipe(tree: dict[str, Any], tmp_path: Path) -> None:
    try:
        recipe = read_text(tmp_path, as_yaml(tree), environ={"A": "a"})
    except RecipeError as error:
        ids = {problem.id for problem in error.problems}
        assert ids <= {"recipe.conflict", "recipe.unset-variable", "recipe.bad-choice"}
        return
    for text in (dump(recipe), dump(recipe, origins=True), dump(recipe, defaults=False)):
        again = reread(text, tmp_path)
        assert again == recipe.model_copy(
            update={} if "\nmerge:\n" in text else {"merge": again.merge}
        )
        assert dump(again).splitlines()[1:] == uncommented(dump(recipe))[1:]


def uncommented(text: str) -> list[str]:
    return [re.sub(r"  # --set .*| *# /.*", "", line) for line in text.splitlines()]


@pytest.mark.slow  # many recipes
def test_most_written_recipes_are_read(tmp_path: Path) -> None:
    """The law above must not hold for lack of recipes."""
    read_ones = []

    @settings(RELAXED, max_examples=100)
    @given(tree=RECIPES)
    def count(tree: dict[str, Any]) -> None:
        try:
            read_ones.append(read_text(tmp_path, as_yaml(tree), environ={"A": "a"}))
        except RecipeError:
            read_ones.append(None)

    count()
    assert sum(one is not None for one in read_ones) > len(read_ones) / 4


def test_local_paths_become_absolute(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    text = "model: weights\ndata: {train: [rows.jsonl, hub/rows], chat_template: ./t.jinja}\n"
    again = reread(dump(read_text(tmp_path, text)), tmp_path)
    assert again.model.path == str(tmp_path / "weights")
    assert [source.path for source in again.data.train] == [
        str(tmp_path / "rows.jsonl"),
        "hub/rows",
    ]
    assert again.data.chat_template == str(tmp_path / "t.jinja")


def test_paths_of_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They mean the same from every folder, also in what another recipe extends."""
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    text = "model: ~/base\ndata: {train: [~/rows.jsonl, ~/more], chat_template: ~/t.jinja}\n"
    (home / "recipe.yaml").write_text(text + "eval: {data: ~/e.csv}\n")
    recipe = read_text(work, "extends: ~/recipe.yaml\n")
    assert recipe.model.path == "~/base"
    again = reread(dump(recipe), work)
    assert again.model.path == str(home / "base")
    assert [one.path for one in again.data.train] == [str(home / "rows.jsonl"), str(home / "more")]
    assert again.data.chat_template == str(home / "t.jinja")
    assert again.eval.data is not None
    assert again.eval.data[0].path == str(home / "e.csv")


def test_comments_name_who_changed_a_key(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(MINIMAL + "seed: 7\n")
    recipe = read_text(tmp_path, "extends: base.yaml\ntask: causal-lm\n", ["train.epochs=2"])
    lines = dump(recipe).splitlines()
    assert "  epochs: 2.0  # --set train.epochs" in lines
    assert f"seed: 7  # {tmp_path}/base.yaml:4:7" in lines
    assert "task: causal-lm" in lines
    assert (
        f"task: causal-lm  # {tmp_path}/recipe.yaml:2:7" in dump(recipe, origins=True).splitlines()
    )


def test_without_defaults_only_what_was_said(tmp_path: Path) -> None:
    text = dump(read_text(tmp_path, MINIMAL), defaults=False)
    keys = [line.split(":")[0].strip(" -") for line in text.splitlines()[1:]]
    assert keys == "model path adapter method data train merge out output_dir".split()


def test_a_key_longer_than_yaml_looks_ahead(tmp_path: Path) -> None:
    key = "x" * 2000
    tree = {"model": "hub/a", "data": {"train": "hub/b"}, "adapter": {"rank_pattern": {"k": 1}}}
    text = as_yaml(tree).replace('"k": 1', f'? "{key}" : 1')
    recipe = read_text(tmp_path, text)
    assert recipe.adapter.model_dump()["rank_pattern"] == {key: 1}
    assert reread(dump(recipe), tmp_path) == recipe


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_survives(text: str, tmp_path: Path) -> None:
    recipe = read_text(tmp_path, MINIMAL)
    with_text = recipe.model_copy(update={"data": recipe.data.model_copy(update={"system": text})})
    assert reread(dump(with_text), tmp_path).data.system == text


def test_two_recipes_are_equal_when_they_say_the_same(tmp_path: Path) -> None:
    one = read_text(tmp_path, MINIMAL + "seed: 1\n")
    other = read_text(tmp_path, "seed: 1\n" + MINIMAL)
    assert one == other
    assert one != read_text(tmp_path, MINIMAL)
    with pytest.raises(Exception, match="frozen"):
        one.seed = 2  # type: ignore[misc]


def test_every_packaged_recipe_survives(tmp_path: Path) -> None:
    assert packaged_recipes()
    for path in packaged_recipes().values():
        recipe = read(path, settings_for, environ={})
        again = reread(dump(recipe), tmp_path)
        assert dump(again).splitlines()[1:] == dump(recipe).splitlines()[1:]
