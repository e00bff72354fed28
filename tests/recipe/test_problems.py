"""What is said of a recipe that is wrong in several ways, and values that are right."""

from pathlib import Path

import pytest

from lorakit.errors import RecipeError
from tests.recipe.stand_ins import MINIMAL, problems, read_text


@pytest.mark.parametrize("written", ["1e-4", "1.0E-04", "0.0001", "+1e-4", ".0001", "1.e-4"])
def test_ok01_ok02_numbers(written: str, tmp_path: Path) -> None:
    recipe = read_text(tmp_path, MINIMAL + f"train: {{learning_rate: {written}}}")
    assert recipe.train.learning_rate == 0.0001


def test_ok03_a_byte_order_mark(tmp_path: Path) -> None:
    assert read_text(tmp_path, b"\xef\xbb\xbf" + MINIMAL.encode()) == read_text(tmp_path, MINIMAL)


def test_ok04_lines_that_end_in_crlf(tmp_path: Path) -> None:
    text = MINIMAL + "train:\n  epochs: 0\n"
    assert problems(tmp_path, text.replace("\n", "\r\n")) == problems(tmp_path, text)
    assert read_text(tmp_path, MINIMAL.replace("\n", "\r\n")) == read_text(tmp_path, MINIMAL)


def test_depth_64_is_read(tmp_path: Path) -> None:
    found = problems(tmp_path, MINIMAL + "seed: " + "[" * 63 + "]" * 63)
    assert [problem.split("]")[0] for problem in found] == ["recipe.yaml:4:7: [recipe.wrong-type"]


def test_all_problems_at_once_sorted_by_line(tmp_path: Path) -> None:
    text = (
        "train:\n  learning_rate: fast\n  learning_rate: 1\nmodel: {path: a, dtype: bf61}\n"
        "adapter: {rnak: 8, dropout: 5}\ndata: {train: '${ROWS}'}\noutput: x\n"
    )
    found = problems(tmp_path, text, ["seed=x"])
    assert [problem.split(" ")[0] for problem in found[:1]] == ["--set"]
    lines = [int(problem.split(":")[1]) for problem in found[1:]]
    assert lines == [2, 3, 4, 5, 5, 6, 7]


def test_a_suggested_key_is_not_missed_as_well(tmp_path: Path) -> None:
    found = problems(tmp_path, "base_model: a\ndata: {trian: b}\n")
    assert len(found) == 2
    assert "lorakit calls this model" in found[0]
    assert "did you mean 'train'?" in found[1]


def test_what_is_reported_once_is_not_judged_again(tmp_path: Path) -> None:
    assert len(problems(tmp_path, MINIMAL + "train: {epochs: '${NOT_SET}'}")) == 1


def test_values_are_shown_without_control_characters(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, MINIMAL + 'train: {schedule: "\\e[31m\\u202e"}')
    assert found.isprintable()
    (found,) = problems(tmp_path, MINIMAL + '"\\e[31m": 1')
    assert found.isprintable()


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, MINIMAL + f"train: {{schedule: {'x' * 1000}}}")
    assert len(found) < 300


def test_a_methods_foreign_names_come_from_outside(tmp_path: Path) -> None:
    words = {"use_virtual": "adapter.method: virtual"}
    (found,) = problems(tmp_path, MINIMAL + "use_virtual: true", foreign=words)
    assert "lorakit calls this adapter.method: virtual" in found


def test_an_error_of_a_validator_keeps_its_id(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_text(tmp_path, MINIMAL + "  eval: a\neval: {gates: {loss: {}}}")
    assert caught.value.id == "recipe.conflict"
    assert caught.value.exit_code == 2


def test_a_method_says_in_its_own_words_what_it_forbids(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, MINIMAL + "adapter: {alpha: 13}\n")
    assert found == "recipe.yaml:4:18: [recipe.invalid] adapter.alpha: thirteen is unlucky"


def test_the_other_keys_are_judged_by_the_method_that_was_meant(tmp_path: Path) -> None:
    found = problems(tmp_path, MINIMAL + "adapter: {method: virtaul, tokens: 0, tokns: 1}\n")
    assert [line.partition("adapter.")[2].split(";")[0] for line in found] == [
        "unknown-method] adapter.method: no method virtaul",
        "tokens: must be a positive integer (greater than 0), got 0",
        "tokns: unknown key",
    ]


def test_a_method_like_none_leaves_every_methods_keys(tmp_path: Path) -> None:
    text = MINIMAL + "adapter: {method: none-such, rank: 8, tokens: 20, rnak: 8}\n"
    method, key = problems(tmp_path, text)
    assert "no method none-such" in method
    assert "adapter.rnak: unknown key; did you mean 'rank'?" in key
