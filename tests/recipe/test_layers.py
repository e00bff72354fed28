"""`extends` and `${VAR}`."""

from pathlib import Path

import pytest

from lorakit.errors import RecipeError
from lorakit.recipe import files
from lorakit.recipe.reader import read
from tests.recipe.stand_ins import MINIMAL, problems, read_text, settings_for


def write(folder: Path, **texts: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def test_mappings_merge_and_lists_replace(tmp_path: Path) -> None:
    write(tmp_path, base=MINIMAL + "adapter: {rank: 4, target_modules: [q, k]}\nseed: 1\n")
    recipe = read_text(tmp_path, "extends: base.yaml\nadapter: {target_modules: [v]}\nseed: 2\n")
    assert recipe.adapter.model_dump(exclude_unset=True) == {
        "method": "lora",
        "rank": 4,
        "target_modules": ("v",),
    }
    assert recipe.seed == 2
    assert recipe.model.path == "hub/base"


def test_the_later_of_several_wins_and_the_file_over_all(tmp_path: Path) -> None:
    write(
        tmp_path, one=MINIMAL + "seed: 1\ntrain: {epochs: 1}\n", two="seed: 2\ntrain: {epochs: 2}\n"
    )
    recipe = read_text(tmp_path, "extends: [one.yaml, two.yaml]\ntrain: {epochs: 3}\n")
    assert (recipe.seed, recipe.train.epochs) == (2, 3)


def test_a_short_model_changes_the_path_alone(tmp_path: Path) -> None:
    write(tmp_path, base="model: {path: a/b, dtype: bf16}\ndata: {train: hub/rows}\n")
    recipe = read_text(tmp_path, "extends: base.yaml\nmodel: c/d\n")
    assert (recipe.model.path, recipe.model.dtype) == ("c/d", "bf16")


def test_problems_point_at_the_file_that_has_the_key(tmp_path: Path) -> None:
    write(tmp_path / "sub", base=MINIMAL + "seed: x\n")
    found = problems(tmp_path, "extends: sub/base.yaml\ntask: y\n")
    assert [line.split(": ")[0] for line in found] == ["recipe.yaml:2:7", "sub/base.yaml:4:7"]


def test_local_paths_of_an_extended_file_still_lead_to_their_files(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", base="model: weights\ndata: {train: [rows, x.jsonl, hub/rows]}\n")
    (tmp_path / "a" / "b" / "weights").mkdir()
    (tmp_path / "a" / "b" / "rows").touch()
    write(
        tmp_path / "a",
        middle="extends: b/base.yaml\ndata: {eval: held.csv, chat_template: t.jinja}\n",
    )
    recipe = read_text(tmp_path / "a", "extends: middle.yaml\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = read_text(elsewhere, "extends: ../a/middle.yaml\n")
    for one, folder in ((recipe, tmp_path / "a"), (moved, elsewhere)):
        assert (folder / one.model.path).resolve() == tmp_path / "a/b/weights"
        paths = [source.path for source in one.data.train]
        assert (folder / paths[0]).resolve() == tmp_path / "a/b/rows"
        assert (folder / paths[1]).resolve() == tmp_path / "a/b/x.jsonl"
        assert paths[2] == "hub/rows"
        assert isinstance(one.data.eval, tuple)
        assert (folder / one.data.eval[0].path).resolve() == tmp_path / "a/held.csv"
        assert (folder / one.data.chat_template).resolve() == tmp_path / "a/t.jinja"


def test_a_cycle(tmp_path: Path) -> None:
    write(tmp_path, other="extends: recipe.yaml\n")
    (found,) = problems(tmp_path, MINIMAL + "extends: other.yaml\n")
    assert found.startswith("other.yaml:1:10: [recipe.extends-cycle]")
    assert "recipe.yaml → other.yaml → recipe.yaml" in found
    assert "[recipe.extends-cycle]" in problems(tmp_path, MINIMAL + "extends: ./recipe.yaml")[0]


def test_a_diamond_is_no_cycle(tmp_path: Path) -> None:
    write(tmp_path, top=MINIMAL, left="extends: top.yaml\nseed: 1\n", right="extends: top.yaml\n")
    assert read_text(tmp_path, "extends: [left.yaml, right.yaml]\n").seed == 1


def test_files_are_bounded(tmp_path: Path) -> None:
    for level in range(20):
        write(tmp_path, **{f"l{level}": f"extends: [l{level + 1}.yaml, l{level + 1}.yaml]\n"})
    write(tmp_path, l20=MINIMAL)
    assert any("[recipe.too-large]" in line for line in problems(tmp_path, "extends: l0.yaml"))


@pytest.mark.parametrize(
    ("extends", "id"),
    [
        ("nowhere.yaml", "recipe.not-found"),
        ("5", "recipe.wrong-type"),
        ("[[x]]", "recipe.wrong-type"),
        (".", "recipe.not-a-file"),
        ("''", "recipe.wrong-type"),
        ("{a: b}", "recipe.wrong-type"),
    ],
)
def test_a_wrong_entry_is_a_problem_among_others(extends: str, id: str, tmp_path: Path) -> None:
    found = problems(tmp_path, MINIMAL + f"extends: {extends}\nseed: x\n")
    assert len(found) == 2
    assert f"[{id}] extends: " in found[0]
    assert "recipe.yaml:4:" in found[0]


def test_a_packaged_recipe_can_be_extended(tmp_path: Path) -> None:
    for name, path in files.packaged_recipes().items():
        recipe = read_text(tmp_path, f"extends: {name}\nseed: 7\n")
        packaged = read(path, settings_for, environ={})
        assert recipe.seed == 7
        assert recipe.model == packaged.model
        for ours, theirs in zip(recipe.data.train, packaged.data.train, strict=True):
            same = (tmp_path / ours.path).resolve() == (path.parent / theirs.path).resolve()
            assert same or ours.path == theirs.path


def test_variables(tmp_path: Path) -> None:
    text = "model: ${A}/${B}\ndata: {train: '$${A} $A ${B}'}\n"
    recipe = read_text(tmp_path, text, environ={"A": "x", "B": "${A}"})
    assert recipe.model.path == "x/${A}"
    assert recipe.data.train[0].path == "${A} $A ${A}"


def test_a_variable_is_always_text(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, MINIMAL + "seed: ${N}", environ={"N": "3"})
    assert "[recipe.wrong-type] seed: expected an integer" in found


@pytest.mark.parametrize(
    ("text", "id", "words"),
    [
        ("${NOWHERE}", "recipe.unset-variable", "NOWHERE is not set $${NOWHERE}"),
        ("${}", "recipe.unset-variable", "NAME $${"),
        ("${a-b}", "recipe.unset-variable", "NAME"),
        ("${HF_TOKEN}", "recipe.secret", "HF_TOKEN expanded"),
        ("${MY_API_KEY}", "recipe.secret", "MY_API_KEY"),
        ("${DB_PASSWORD}", "recipe.secret", "DB_PASSWORD"),
        ("${BYTES}", "recipe.encoding", "BYTES UTF-8"),
    ],
)
def test_variables_that_do_not_expand(text: str, id: str, words: str, tmp_path: Path) -> None:
    environ = dict.fromkeys(("HF_TOKEN", "MY_API_KEY", "DB_PASSWORD"), "value-of-it")
    environ["BYTES"] = "a\udcff"
    (found,) = problems(tmp_path, f"model: '{text}'\ndata: {{train: x}}\n", environ=environ)
    assert found.startswith(f"recipe.yaml:1:8: [{id}] model")
    for word in words.split():
        assert word in found
    assert "value-of-it" not in found


def test_an_unreadable_base_ends_the_reading(tmp_path: Path) -> None:
    write(tmp_path, base="a: [")
    with pytest.raises(RecipeError) as caught:
        read_text(tmp_path, "extends: base.yaml\n")
    assert caught.value.where
    assert caught.value.where.file.endswith("base.yaml")
