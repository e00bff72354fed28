"""Recipes that people get wrong: every one has its id, its place and its words."""
# ruff: noqa: E501  # a table: one row a line

import os
from pathlib import Path

import pytest

from lorakit.errors import BadInput, RecipeError
from lorakit.recipe.reader import read
from tests.recipe.stand_ins import MINIMAL, problems, read_text, settings_for

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)

# what stands below MINIMAL, where the problem is, its id, and words that the message has
ROWS = {
    "R03 nothing": ("", "", "recipe.empty", "empty model data"),
    "R03 comments": ("# a\n# b\n", "", "recipe.empty", "empty model data"),
    "R03 markers": ("---\n", "", "recipe.empty", "empty"),
    "R04 number": ("42", ":1:1", "recipe.not-a-mapping", "mapping number"),
    "R04 list": ("- a\n- b", ":1:1", "recipe.not-a-mapping", "mapping list"),
    "R04 text": ("model", ":1:1", "recipe.not-a-mapping", "mapping text"),
    "R05": ("model: a\ntrain:\n\tepochs: 1\n", ":3:1", "recipe.syntax", "tab 3"),
    "R05 behind spaces": ("train:\n  seed: 1\n \tepochs: 1\n", ":3:2", "recipe.syntax", "tab"),
    "R06": (
        MINIMAL + "train:\n  learning_rate: 1\n  epochs: 1\n  learning_rate: 2\n",
        ":7:3",
        "recipe.duplicate-key",
        "train.learning_rate twice 5",
    ),
    "R06 quoted": (MINIMAL + '"seed": 1\nseed: 1\n', ":5:1", "recipe.duplicate-key", "seed twice 4"),
    "R07": (
        MINIMAL + "train:\n  learning_ratee: 1\n",
        ":5:3",
        "recipe.unknown-key",
        "train.learning_ratee|did you mean 'learning_rate'",
    ),
    "R08": (
        MINIMAL + "train:\n  learning_rate: fast\n",
        ":5:18",
        "recipe.wrong-type",
        "train.learning_rate number fast",
    ),
    "R09 zero": (MINIMAL + "train: {learning_rate: 0}", ":4:24", "recipe.out-of-range", "train.learning_rate|greater than 0"),
    "R09 negative": (MINIMAL + "train: {learning_rate: -1e-4}", ":4:24", "recipe.out-of-range", "greater than 0|-0.0001"),
    "R09 infinite": (MINIMAL + "train: {learning_rate: .inf}", ":4:24", "recipe.out-of-range", "finite"),
    "R09 overflow": (MINIMAL + "train: {learning_rate: 1e999}", ":4:24", "recipe.out-of-range", "finite"),
    "R10 epochs": (MINIMAL + "train: {epochs: 0}", ":4:17", "recipe.out-of-range", "train.epochs|greater than 0"),
    "R10 steps": (MINIMAL + "train: {max_steps: 0}", ":4:20", "recipe.out-of-range", "train.max_steps|greater than 0"),
    "R11": (MINIMAL + "train: {batch_size: true}", ":4:21", "recipe.wrong-type", "train.batch_size integer|boolean true"),
    "R11 fraction": (MINIMAL + "train: {batch_size: 1.5}", ":4:21", "recipe.wrong-type", "integer 1.5"),
    "R11 point zero": (MINIMAL + "train: {batch_size: 16.0}", ":4:21", "recipe.wrong-type", "integer|did you mean 16?"),
    "R12 zero": (MINIMAL + "adapter: {rank: 0}", ":4:17", "recipe.out-of-range", "adapter.rank|positive integer"),
    "R12 negative": (MINIMAL + "adapter: {rank: -1}", ":4:17", "recipe.out-of-range", "positive integer|-1"),
    "R12 quoted": (MINIMAL + 'adapter: {rank: "8"}', ":4:17", "recipe.wrong-type", "positive integer|'8'|did you mean 8?"),
    "R14 one": (MINIMAL + "adapter: {dropout: 1.0}", ":4:20", "recipe.out-of-range", "adapter.dropout|[0, 1)"),
    "R14 two": (MINIMAL + "adapter: {dropout: 2}", ":4:20", "recipe.out-of-range", "must be in [0, 1), got 2; did you mean 0.02?"),
    "R15": (MINIMAL + "adapter: {target_modules: []}", ":4:27", "recipe.out-of-range", "adapter.target_modules all-linear"),
    "R17": ('a: !!python/object/apply:os.system ["id"]', ":1:4", "recipe.tag", "!!python/object/apply:os.system|plain YAML"),
    "R17 own": ("a: !x 1", ":1:4", "recipe.tag", "!x"),
    "R17 harmless": ("a: !!float 1", ":1:4", "recipe.tag", "!!float"),
    "R18": (BOMB, ":1:5", "recipe.alias", "anchor extends"),
    "R18 self": ("&a a: *a", ":1:1", "recipe.alias", "anchor"),
    "R19": ("a: " + "[" * 1000, ":1:68", "recipe.too-large", "nested 64"),
    "R19 mappings": ("a: " + "{a: " * 70, ":1:260", "recipe.too-large", "nested 64"),
    "R19 values": ("a: [" + "1, " * 10_001 + "]", ":1:29996", "recipe.too-large", "10,000"),
    "R20": (MINIMAL + "train: {epochs: 2024-13-45}", ":4:17", "recipe.wrong-type", "train.epochs number 2024-13-45"),
    "R20 no": (MINIMAL + "merge: {enabled: no}", ":4:18", "recipe.wrong-type", "true false 'no'|did you mean false?"),
    "R20 minutes": (MINIMAL + "seed: 12:30", ":4:7", "recipe.wrong-type", "integer '12:30'"),
    "R20 octal": (MINIMAL + "seed: 010", ":4:7", "recipe.wrong-type", "integer '010'"),
    "R20 hexadecimal": (MINIMAL + "seed: 0x10", ":4:7", "recipe.wrong-type", "integer '0x10'"),
    "R20 long": (MINIMAL + "seed: " + "1" * 5000, ":4:7", "recipe.too-large", "seed 5000 100"),
    "R21 latin-1": (b"model: caf\xe9\n", ":1", "recipe.encoding", "UTF-8|offset 10|0xE9"),
    "R21 utf-16": ("model: x".encode("utf-16"), ":1", "recipe.encoding", "UTF-8 UTF-16|offset 0"),
    "R21 control": (MINIMAL + "seed: \x07", ":4:7", "recipe.encoding", "U+0007"),
    "R21 surrogate": (MINIMAL + 'output_dir: "\\ud800"', ":4:13", "recipe.encoding", "output_dir"),
    "R21 NUL": (MINIMAL + 'output_dir: "a\\0"', ":4:13", "recipe.encoding", "output_dir"),
    "two documents": (MINIMAL + "---\nseed: 1", ":4:1", "recipe.syntax", "second document"),
    "key that is a number": (MINIMAL + "train: {1: 2}", ":4:9", "recipe.bad-key", "text 1"),
    "key that is a list": (MINIMAL + "? [a]\n: b\n", ":4:3", "recipe.bad-key", "text list"),
    "open quote": (MINIMAL + "seed: 'a", ":4:9", "recipe.syntax", "quote closed"),
    "open bracket": (MINIMAL + "eval: {metrics: [loss\n", ":5:1", "recipe.syntax", "']'"),
    "colon in text": (MINIMAL + "output_dir: a: b", ":4:14", "recipe.syntax", "quote"),
    "indentation": (MINIMAL + "train:\n  seed: 1\n epochs: 1\n", ":6:2", "recipe.syntax", "indentation"),
    "gate as YAML reads it": (MINIMAL + "eval: \n  x: >= 5\n", ":5:7", "recipe.syntax", "quotes"),
    "escape": (MINIMAL + 'output_dir: "\\q"', ":4:15", "recipe.syntax", "escape"),
    "escape out of range": (MINIMAL + 'output_dir: "\\U00110000"', ":4:16", "recipe.syntax", "range"),
    "missing": ("model: a\ndata: {}\n", ":2:1", "recipe.missing-key", "data.train missing"),
    "no data": ("model: a\n", ":1:1", "recipe.missing-key", "data missing"),
    "section without keys": (MINIMAL + "train:\n", ":4:7", "recipe.wrong-type", "train mapping null"),
    "choice": (MINIMAL + "merge: {enabled: true, dtype: bf61}", ":4:31", "recipe.bad-choice", "merge.dtype|one of keep, bf16, fp16 or fp32, got 'bf61'|did you mean 'bf16'?"),
    "wrong block": (MINIMAL + "learning_rate: 1\n", ":4:1", "recipe.unknown-key", "`learning_rate` belongs under `train:`"),
    "wrong block, adapter": (MINIMAL + "alpha: 1\n", ":4:1", "recipe.unknown-key", "`alpha` belongs under `adapter:`"),
    "wrong block, top": (MINIMAL + "train: {seed: 1}\n", ":4:9", "recipe.unknown-key", "`seed` belongs at the top level"),
    "two blocks": (MINIMAL + "dtype: bf16\n", ":4:1", "recipe.unknown-key", "`model:` or under `merge:`"),
    "foreign": (MINIMAL + "adapter: {lora_r: 1}\n", ":4:11", "recipe.unknown-key", "lorakit calls this adapter.rank"),
    "foreign block": (MINIMAL + "lora: {r: 1}\n", ":4:1", "recipe.unknown-key", "adapter"),
    "foreign misspelt": (MINIMAL + "lora_rnk: 1\n", ":4:1", "recipe.unknown-key", "did you mean adapter.rank?"),
    "secret": (MINIMAL + "hf_token: abc\n", ":4:1", "recipe.secret", "HF_TOKEN"),
    "method as text": (MINIMAL + "adapter: virtual\n", ":4:10", "recipe.wrong-type", "mapping|{method: 'virtual'}"),
    "unknown method": (MINIMAL + "adapter: {method: lorra}\n", ":4:19", "adapter.unknown-method", "adapter.method lorra virtual"),
    "method is no text": (MINIMAL + "adapter: {method: 5}\n", ":4:19", "recipe.wrong-type", "adapter.method 5"),
    "method's own words": (MINIMAL + "adapter: {alpha: 13}\n", ":4:18", "recipe.invalid", "adapter.alpha unlucky"),
    "union, word": (MINIMAL + "train: {micro_batch_size: lots}", ":4:27", "recipe.bad-choice", "auto or a positive integer, got 'lots'"),
    "union, zero": (MINIMAL + "train: {micro_batch_size: 0}", ":4:27", "recipe.out-of-range", "positive integer"),
    "union, type": (MINIMAL + "train: {micro_batch_size: [1]}", ":4:27", "recipe.wrong-type", "auto or a positive integer"),
    "union, packing": (MINIMAL.rstrip() + "\n  packing: tight\n", ":4:12", "recipe.bad-choice", "one of true, false or dense, got 'tight'"),
    "union, eval": (MINIMAL + "  eval: 1.5\n", ":4:9", "recipe.out-of-range", "(0, 1) 1.5|0.015"),
    "union, source": (MINIMAL + "  eval: [{path: a, weight: 0}]\n", ":4:28", "recipe.out-of-range", "data.eval[0].weight|greater than 0"),
    "union, source key": (MINIMAL + "  eval: {path: a, wieght: 1}\n", ":4:19", "recipe.unknown-key", "data.eval.wieght|'weight'"),
    "union, empty": (MINIMAL + "  eval: []\n", ":4:9", "recipe.out-of-range", "at least one"),
    "union, skip": (MINIMAL + "train: {on_non_finite: {skip: 0}}", ":4:31", "recipe.out-of-range", "train.on_non_finite.skip"),
    "union, pattern": (MINIMAL + "adapter: {target_modules: 're:'}", ":4:27", "recipe.bad-choice", "all-linear ^re:."),
    "empty text": (MINIMAL + "output_dir: ''", ":4:13", "recipe.out-of-range", "output_dir empty"),
    "list of wrong things": (MINIMAL + "adapter: {target_modules: [q, 3]}", ":4:31", "recipe.wrong-type", "adapter.target_modules[1] text 3"),
    "text for a list": (MINIMAL + "eval: {metrics: loss}", ":4:17", "recipe.wrong-type", "list loss|['loss']"),
    "pattern value": (MINIMAL + "adapter: {rank_pattern: {q: 0}}", ":4:29", "recipe.out-of-range", "adapter.rank_pattern.q"),
    "number as text": (MINIMAL + "train: {weight_decay: 1_0}", ":4:23", "recipe.wrong-type", "did you mean 10?"),
    "text as number": ("model: {path: a, revision: 123}\ndata: {train: b}", ":1:28", "recipe.wrong-type", "model.revision text|'123'"),
    "gate without bound": (MINIMAL + "  eval: a\neval: {gates: {loss: {}}}", ":5:16", "recipe.conflict", "eval.gates.loss min max"),
    "gate without metric": (MINIMAL + "  eval: a\neval: {gates: {stop_rate: {min: 1}}}", ":5:16", "recipe.conflict", "eval.gates.stop_rate|add stop_rate to eval.metrics"),
    "gate of no metric": (MINIMAL + "  eval: a\neval: {gates: {los: {min: 1}}}", ":5:16", "recipe.bad-choice", "eval.gates.los|'loss'"),
    "gate bound": (MINIMAL + "  eval: a\neval: {gates: {loss: {max: bass - 5%}}}", ":5:28", "recipe.conflict", "eval.gates.loss.max|base - 5%|bass"),
    "gate without rows": (MINIMAL + "eval: {gates: {loss: {max: 1}}}", ":4:8", "recipe.conflict", "eval.gates|data.eval: 0.05"),
    "metrics without rows": (MINIMAL + "eval: {metrics: [loss]}", ":4:17", "recipe.conflict", "eval.metrics data.eval"),
    "micro-batch": (MINIMAL + "train: {batch_size: 4, micro_batch_size: 8}", ":4:42", "recipe.conflict", "8 4 train.batch_size"),
    "placeholder": (MINIMAL + "output_dir: runs/{nam}", ":4:13", "recipe.bad-choice", "'{nam}' {name} {date} {seed}"),
    "open brace": (MINIMAL + "output_dir: runs/{name", ":4:13", "recipe.bad-choice", "'{' {{"),
    "out of the working folder": (MINIMAL + "output_dir: ../runs", ":4:13", "security.path", "output_dir ../runs"),
    "the working folder": (MINIMAL + "output_dir: runs/..", ":4:13", "recipe.conflict", "output_dir"),
    "merge over the adapter": (MINIMAL + "merge: {enabled: true, out: '{output_dir}/adapter'}", ":4:29", "recipe.conflict", "merge.out runs/recipe/adapter"),
    "merge over the run": (MINIMAL + "merge: {enabled: true, out: runs}", ":4:29", "recipe.conflict", "merge.out"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_one_sentence_at_its_place(row: str, tmp_path: Path) -> None:
    text, place, id, words = ROWS[row]
    found = problems(tmp_path, text)
    assert len(found) == 1, found
    assert found[0].startswith(f"recipe.yaml{place}: [{id}]")
    for part in words.split("|"):
        assert part in found[0] or all(word in found[0] for word in part.split()), found[0]


def test_r01_names_near_files(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    with pytest.raises(BadInput) as caught:
        read(tmp_path / "recipes.yaml", settings_for, environ={})
    assert caught.value.id == "recipe.not-found"
    assert str(tmp_path / "recipes.yaml") in caught.value.message
    assert str(tmp_path / "recipe.yaml") in (caught.value.help or "")


def test_r01_names_near_packaged_recipes() -> None:
    with pytest.raises(BadInput) as caught:
        read("quickstrat", settings_for, environ={})
    assert caught.value.id == "recipe.not-found"
    assert "quickstart" in (caught.value.help or "")


def test_r02_a_directory(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is a directory") as caught:
        read(tmp_path, settings_for, environ={})
    assert caught.value.id == "recipe.not-a-file"


def test_a_fifo_is_never_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(BadInput) as caught:
        read(tmp_path / "recipe.yaml", settings_for, environ={})
    assert caught.value.id == "recipe.not-a-file"


@pytest.mark.slow  # a mebibyte through the scanner
def test_r22_the_limit_is_exact(tmp_path: Path) -> None:
    filled = MINIMAL + "#" * (2**20 - len(MINIMAL))
    assert read_text(tmp_path, filled)
    with pytest.raises(BadInput, match=r"1,048,577 .* 1 MiB") as caught:
        read_text(tmp_path, filled + "#")
    assert caught.value.id == "recipe.too-large"


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
