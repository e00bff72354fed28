"""`--set`: the same values, the same messages."""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.errors import BadInput
from tests.recipe.stand_ins import MINIMAL, problems, read_text

TREE = """\
model: {path: hub/base, dtype: bf16}
data:
  train: [hub/a, {path: hub/b, weight: 2}]
  eval: hub/c
train: {epochs: 2}
adapter: {rank: 4, target_modules: [q_proj]}
"""


def test_assigning(tmp_path: Path) -> None:
    sets = ["train.learning_rate=1e-4", "adapter.target_modules=[q_proj, v_proj]"]
    sets += [
        "adapter.rank_pattern={down: 32}",
        "data.system=",
        'output_dir="re: x"',
        "seed=1",
        "seed=2",
    ]
    recipe = read_text(tmp_path, TREE, sets)
    assert recipe.train.learning_rate == 1e-4
    assert recipe.adapter.model_dump()["target_modules"] == ("q_proj", "v_proj")
    assert recipe.adapter.model_dump()["rank_pattern"] == {"down": 32}
    assert recipe.data.system is None
    assert recipe.output_dir == "re: x"
    assert recipe.seed == 2
    assert recipe.train.epochs == 2


def test_indexes_and_short_forms(tmp_path: Path) -> None:
    sets = ["data.train[0].weight=3", "data.train[1].weight=4", "data.eval[0].split=test"]
    recipe = read_text(tmp_path, TREE, sets)
    assert [(source.path, source.weight) for source in recipe.data.train] == [
        ("hub/a", 3),
        ("hub/b", 4),
    ]
    assert isinstance(recipe.data.eval, tuple)
    assert (recipe.data.eval[0].path, recipe.data.eval[0].split) == ("hub/c", "test")


def test_a_short_model_changes_the_path_alone(tmp_path: Path) -> None:
    recipe = read_text(tmp_path, TREE, ["model=other/base"])
    assert (recipe.model.path, recipe.model.dtype) == ("other/base", "bf16")
    assert read_text(tmp_path, MINIMAL, ["model.dtype=fp16"]).model.path == "hub/base"


def test_a_whole_section(tmp_path: Path) -> None:
    assert read_text(tmp_path, TREE, ["train={max_steps: 3}"]).train.epochs == 1.0


def test_removing(tmp_path: Path) -> None:
    recipe = read_text(tmp_path, TREE, ["adapter.rank-", "data.train[0]-", "train-"])
    assert recipe.adapter.model_dump()["rank"] == 16
    assert [source.path for source in recipe.data.train] == ["hub/b"]
    assert recipe.train.epochs == 1.0


def test_appending(tmp_path: Path) -> None:
    sets = ["adapter.target_modules+=k_proj", "adapter.target_modules+=[v_proj, o_proj]"]
    recipe = read_text(tmp_path, TREE, [*sets, "data.eval+={path: hub/d}"])
    assert recipe.adapter.model_dump()["target_modules"] == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert isinstance(recipe.data.eval, tuple)
    assert [source.path for source in recipe.data.eval] == ["hub/c", "hub/d"]


def test_variables_and_equal_signs_in_values(tmp_path: Path) -> None:
    recipe = read_text(tmp_path, TREE, ["data.system=a=${B}"], environ={"B": "c=d"})
    assert recipe.data.system == "a=c=d"


NO_OVERRIDES = ["x", "", "=1", ".a=1", "a.=1", "a..b=1", "a[=1", "a[x]=1", "[0]=1", "a]b=1", "a b"]


@pytest.mark.parametrize("override", [*NO_OVERRIDES, ".".join("a" * 65) + "=1"])
def test_what_is_no_override(override: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        read_text(tmp_path, TREE, [override])
    assert caught.value.id == "usage"
    assert "PATH=VALUE" in caught.value.message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.dropout-", "does not set"),
        ("eval.metrics+=stop_rate", "does not set"),
        ("data.train[2]=hub/x", "no entry 2 among 2"),
        ("data.train[9]-", "does not set"),
        ("extends=other.yaml", "extend"),
    ],
)
def test_what_cannot_be_changed(override: str, words: str, tmp_path: Path) -> None:
    (found,) = problems(tmp_path, TREE, [override])
    path = re.split(r"[-+=]", override)[0]
    assert found.startswith(f"--set {path}: [recipe.unknown-key]")
    assert words in found


WRONG = {
    "train.learning_rate": "fast",
    "train.epochs": "0",
    "train.schedule": "cosin",
    "adapter.dropout": "5",
    "adapter.rnak": "8",
    "model.dtype": "[1]",
    "seed": "'1'",
    "output_dir": "'{x}'",
    "data.eval": "1.5",
    "train.micro_batch_size": "lots",
}


@pytest.mark.parametrize("key", WRONG)
def test_the_same_message_as_in_the_file(key: str, tmp_path: Path) -> None:
    *section, name = key.split(".")
    line = f"{section[0]}: {{{name}: {WRONG[key]}}}\n" if section else f"{name}: {WRONG[key]}\n"
    tree = {"model": "model: {path: a", "data": "data: {train: b"}
    text = "".join(f"{head}}}\n" for head in tree.values())
    if section and section[0] in tree:
        text = text.replace(
            f"{tree[section[0]]}}}\n", f"{tree[section[0]]}, {name}: {WRONG[key]}}}\n"
        )
    else:
        text += line
    (in_file,) = problems(tmp_path, text)
    (in_set,) = problems(
        tmp_path, "".join(f"{head}}}\n" for head in tree.values()), [f"{key}={WRONG[key]}"]
    )
    assert in_set.startswith(f"--set {key}: [")
    assert in_file.startswith("recipe.yaml:")
    assert in_file.partition(" ")[2].replace(f" {key}: ", " ") == in_set.removeprefix(
        f"--set {key}: "
    )


def test_yaml_faults_in_a_value(tmp_path: Path) -> None:
    for value, id in {
        "[": "syntax",
        "&a b": "alias",
        "!!int 1": "tag",
        "{a: 1, a: 2}": "duplicate-key",
    }.items():
        found = problems(tmp_path, TREE, [f"seed={value}"])
        assert found[0].startswith(f"--set seed: [recipe.{id}]")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sets=st.lists(st.text("abmodeltrain.[]019=+-{}:,'\"$& \n", max_size=20), max_size=3))
def test_any_text_is_taken_or_refused(sets: list[str], tmp_path: Path) -> None:
    with contextlib.suppress(BadInput):
        read_text(tmp_path, TREE, sets)
