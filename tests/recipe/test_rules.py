"""Placeholders, folders and what is allowed but seldom meant."""

from datetime import date
from pathlib import Path

import pytest

from lorakit.recipe import rules
from lorakit.recipe.reader import read
from tests.recipe.stand_ins import MINIMAL, problems, read_text, settings_for


def test_placeholders(tmp_path: Path) -> None:
    (tmp_path / "my.recipe.yaml").write_text(
        MINIMAL
        + "output_dir: 'o/{name}-{date}-{seed}{{x}}'\nseed: 5\n"
        + "merge: {out: '{output_dir}/{seed}'}\n"
    )
    recipe = read(tmp_path / "my.recipe.yaml", settings_for, environ={}, today=date(2030, 1, 2))
    assert recipe.output_dir == "o/my.recipe-2030-01-02-5{x}"
    assert recipe.merge.out == "o/my.recipe-2030-01-02-5{x}/5"
    assert recipe.run_folder == Path(recipe.output_dir)


def test_defaults_are_filled_too(tmp_path: Path) -> None:
    recipe = read_text(tmp_path, MINIMAL, name="some.yaml")
    assert (recipe.output_dir, recipe.merge.out) == ("runs/some", "runs/some/merged")


def test_output_dir_does_not_hold_itself(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, MINIMAL + "output_dir: 'x/{output_dir}'\n")
    assert "[recipe.bad-choice] output_dir: '{output_dir}'" in found


@pytest.mark.parametrize("folder", ["runs", "a/../b", "/somewhere/else", "./x", "..x"])
def test_folders_that_are_fine(folder: str, tmp_path: Path) -> None:
    assert read_text(tmp_path, MINIMAL + f"output_dir: {folder}\n").output_dir == folder


@pytest.mark.parametrize("folder", ["..", "../x", "a/../../x", "./.."])
def test_folders_outside(folder: str, tmp_path: Path) -> None:
    assert (
        "[security.path] output_dir" in problems(tmp_path, MINIMAL + f"output_dir: {folder}\n")[0]
    )
    text = MINIMAL + f"merge: {{enabled: true, out: {folder}}}\n"
    assert "[security.path] merge.out" in problems(tmp_path, text)[0]
    assert not problems(tmp_path, text.replace("true", "false"))


def test_evaluation_by_default_asks_for_nothing(tmp_path: Path) -> None:
    text = MINIMAL + "eval: {metrics: [loss, perplexity]}\ntrain: {eval_every: epoch}\n"
    assert not problems(tmp_path, text)
    assert len(problems(tmp_path, text.replace(": epoch", ": 5"))) == 1


def test_training_evaluates_the_rows_of_data_alone(tmp_path: Path) -> None:
    text = MINIMAL + "eval: {data: held.jsonl}\ntrain: {eval_every: 5}\n"
    (found,) = problems(tmp_path, text)
    assert found.startswith("recipe.yaml:5:21: [recipe.conflict] train.eval_every: ")
    assert not problems(tmp_path, text.replace("  train: hub/rows", "  train: x\n  eval: 0.1"))


@pytest.mark.parametrize(
    ("idle", "needs", "key"),
    [
        ("double_quant: false", "quantization: nf4", "model.double_quant"),
        ("normalize: [number]", "metrics: [exact_match]", "eval.normalize"),
        ("generate: {max_new_tokens: 5}", "metrics: [stop_rate]", "eval.generate"),
    ],
)
def test_keys_without_effect(idle: str, needs: str, key: str, tmp_path: Path) -> None:
    def noticed(*written: str) -> list[str]:
        said = ", ".join(written)
        model, asked = (said, "") if key.startswith("model") else ("", said)
        text = f"model: {{path: hub/base, {model}}}\ndata: {{train: hub/rows, eval: 0.1}}\n"
        recipe = read_text(tmp_path, text + f"eval: {{{asked}}}\n")
        return [notice.message.split()[0] for notice in rules.without_effect(recipe)]

    assert noticed() == noticed(needs) == noticed(idle, needs) == []
    assert noticed(idle) == [key]


def test_unusual_learning_rates(tmp_path: Path) -> None:
    for rate, count in {"1e-6": 0, "5e-3": 0, "9e-7": 1, "0.1": 1}.items():
        recipe = read_text(tmp_path, MINIMAL + f"train: {{learning_rate: {rate}}}\n")
        notices = rules.unusual(recipe)
        assert len(notices) == count
        for notice in notices:
            assert notice.where == recipe.origin.place("train", "learning_rate")
