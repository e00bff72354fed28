"""`lorakit eval`, `generate` and `merge` as a user calls them, on a run made by hand."""

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lorakit import adapters
from lorakit.cli.app import app
from tests.export.adapters import find_base, save_adapter
from tests.tiny import tiny_config, tiny_tokenizer, write_tiny_model

RECIPE = """
model: tiny
adapter: {method: lora, rank: 4}
data: {train: rows.jsonl, eval: rows.jsonl, system: Be brief.}
eval:
  metrics: [loss, json_valid]
  generate: {max_new_tokens: 4}
  gates: {loss: {max: GATE}}
output_dir: run
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a working folder with a base, rows and a run that has an adapter."""
    folder = tmp_path_factory.mktemp("commands")
    base = find_base(write_tiny_model(folder / "tiny"))
    rows = [{"prompt": f"what is {n}?", "completion": f"it is {n}"} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    passport = {"recipe": {"data": {"system": "Be brief."}, "model": {"path": "tiny"}}}
    save_adapter(base, folder / "run" / "adapter", "lora", size=0.2, passport=passport)
    (folder / "run" / "run.json").write_text("{}")
    for name, bound in (("pass", "100"), ("fail", "0.001"), ("relative", "baseline + 1%")):
        (folder / f"{name}.yaml").write_text(RECIPE.replace("GATE", bound))
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(folder)

    def call(*arguments: str, input: str | None = None) -> Any:
        return CliRunner().invoke(app, [*arguments, "--offline"], input=input)

    return call


def test_eval_prints_a_table_and_writes_into_the_run(run: Any, folder: Path):
    result = run("eval", "pass.yaml")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["metric", "adapter", "base", "change", "gate", "limit", "result"]
    assert lines[1].split()[0] == "loss"
    assert lines[1].split()[-1] == "pass"
    assert lines[-1] == "All gates passed. 6 rows."
    written = {path.name for path in (folder / "run" / "eval").iterdir()}
    assert written == {"results.json", "samples.jsonl", "summary.md", "junit.xml"}


def test_a_missed_gate_ends_with_1_and_one_document(run: Any, folder: Path):
    result = run("eval", "fail.yaml", "--json", "--junit", "out.xml", "--limit", "3")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert (document["ok"], document["exit"]) == (False, 1)
    assert document["error"]["id"] == "check.gate-missed"
    assert document["metrics"]["loss"]["n"] == 3
    assert document["gates"][0]["line"] == 8
    assert ElementTree.parse(folder / "out.xml").getroot().attrib["failures"] == "1"
    shown = run("eval", "fail.yaml")
    assert shown.exit_code == 1
    assert "FAIL" in shown.stdout
    assert "error[check.gate-missed]" in shown.stderr
    assert run("eval", "fail.yaml", "--no-gates").exit_code == 0
    assert run("eval", "fail.yaml", "--base-only").exit_code == 0


def test_a_baseline_is_written_then_compared(run: Any, folder: Path):
    without = run("eval", "relative.yaml", "--json")
    assert without.exit_code == 2
    assert json.loads(without.stdout)["error"]["id"] == "eval.not-computed"
    assert run("eval", "relative.yaml", "--update-baseline").exit_code == 2
    made = run("eval", "relative.yaml", "--baseline", "b.json", "--update-baseline")
    assert made.exit_code == 0, made.output
    assert str(folder) not in (folder / "b.json").read_text()
    compared = run("eval", "relative.yaml", "--baseline", "b.json")
    assert compared.exit_code == 0
    header, loss, *_ = (line.split() for line in compared.stdout.splitlines())
    assert header[3:6] == ["change", "baseline", "since"]
    assert (loss[4], loss[5][1:]) == (loss[1], "0.000")
    other_rows = run("eval", "relative.yaml", "--baseline", "b.json", "--limit", "2", "--json")
    assert json.loads(other_rows.stdout)["error"]["id"] == "eval.baseline-mismatch"


def test_eval_takes_the_folder_of_a_run_or_of_its_adapter(run: Any, folder: Path, tmp_path: Path):
    """Its recipe is the one that was carried out, and its name that of the run."""
    moved = tmp_path / "moved"
    shutil.copytree(folder / "run" / "adapter", moved / "adapter")
    (moved / "run.json").write_text("{}")
    written = run("recipes", "show", "pass.yaml", "--resolved").stdout
    (moved / "resolved.yaml").write_text(written.replace("output_dir: run ", "output_dir: gone "))
    for given in (moved, moved / "adapter", moved / "resolved.yaml"):
        adapter = ("--adapter", str(moved)) if given.is_file() else ()
        ended = run("eval", str(given), *adapter)
        assert ended.exit_code == 0, ended.output
        assert ElementTree.parse(moved / "eval" / "junit.xml").getroot().attrib["name"] == "moved"
        assert (moved / "eval" / "summary.md").read_text().startswith("## moved\n")


def test_a_folder_that_is_no_run_is_told_what_is_taken(run: Any, tmp_path: Path):
    ended = run("eval", str(tmp_path), "--json")
    assert ended.exit_code == 2
    error = json.loads(ended.stdout)["error"]
    assert error["id"] == "recipe.not-a-file"
    assert "the folder of a finished run" in error["hint"]


def test_eval_without_an_adapter_says_how_to_get_one(run: Any):
    result = run("eval", "pass.yaml", "--adapter", "nothing", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["id"] == "adapter.not-found"


def test_generate_prints_the_text_alone(run: Any, folder: Path):
    once = run("generate", "run", "what is 2?", "--max-new-tokens", "5")
    assert once.exit_code == 0, once.output
    told = json.loads(
        run("generate", "run", "-", "--json", "--max-new-tokens", "5", input="what is 2?\n").stdout
    )
    assert once.stdout == told["text"] + "\n"
    assert set(told) >= {"prompt", "text", "base_text", "tokens", "stopped"}
    assert told["prompt"] == "what is 2?"
    (folder / "prompts.txt").write_text("what is 2?\n\nwhat is 3?\n")
    options = ("--prompt-file", "prompts.txt", "--max-new-tokens", "5")
    both = run("generate", "run", *options, "--compare", "--json")
    first, second = json.loads(both.stdout)["generations"]
    assert first["text"] == told["text"]
    assert first["base_text"] != first["text"]
    assert second["prompt"] == "what is 3?"
    assert run("generate", "run").exit_code == 2
    assert run("generate", "run", "x", "--prompt-file", "prompts.txt").exit_code == 2


def test_an_empty_prompt_is_one_prompt(run: Any):
    told = json.loads(run("generate", "run", "", "--json", "--max-new-tokens", "2").stdout)
    assert told["prompt"] == ""
    assert "generations" not in told


@pytest.mark.parametrize("option", [("--top-p", "0.5"), ("--seed", "7")])
def test_options_for_draws_are_refused_where_nothing_is_drawn(run: Any, option: tuple[str, str]):
    words = ("generate", "run", "what is 2?", "--max-new-tokens", "2", *option)
    ended = run(*words)
    assert ended.exit_code == 2, ended.output
    assert f"{option[0]} is for draws" in ended.stderr
    assert run(*words, "--temperature", "1e-6").exit_code == 2, "as greedy as 0"
    assert run(*words, "--temperature", "0.7").exit_code == 0


def test_generate_sees_the_system_message_of_the_training(run: Any):
    def answer(*more: str) -> str:
        return run("generate", "run", "what is 2?", "--max-new-tokens", "8", *more).stdout

    assert answer() == answer("--system", "Be brief.")
    assert answer() != answer("--system", "Be very long about it, and never stop.")


def test_generate_asks_in_plain_text_what_was_trained_on_plain_text(run: Any, folder: Path):
    """Whether the recipe named the format or `auto` found it; older passports hold the recipe's."""
    rows = [{"text": f"once upon {n} times"} for n in range(6)]
    (folder / "text.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "text.yaml").write_text(
        "model: tiny\ndata: {train: text.jsonl}\ntrain: {max_steps: 1}\noutput_dir: text\n"
    )
    ended = run("train", "text.yaml")
    assert ended.exit_code == 0, ended.output
    passport = folder / "text" / "adapter" / "lorakit.json"
    told = json.loads(passport.read_text())
    assert told["data"]["train"]["formats"] == {"text": 6}
    assert adapters.read(folder / "text").trained_on_text
    assert not adapters.read(folder / "run").trained_on_text

    def answer() -> str:
        return run("generate", "text", "once upon", "--max-new-tokens", "8").stdout

    found = answer()
    del told["data"]["train"]["formats"]
    for format, is_same in (("text", True), ("auto", False)):
        told["recipe"]["data"]["format"] = format
        passport.write_text(json.dumps(told))
        assert (answer() == found) is is_same


def test_an_adapter_trained_on_4_bits_is_measured_and_answers_on_4_bits(run: Any, folder: Path):
    loss = {}
    for form in ("none", "nf4"):
        told = run("eval", "pass.yaml", "--json", "-s", f"model.quantization={form}")
        assert told.exit_code == 0, told.output
        loss[form] = json.loads(told.stdout)["metrics"]["loss"]["base"]
    assert loss["none"] != loss["nf4"]
    dense = run("generate", "run", "what is 2?", "--max-new-tokens", "5")
    assert "held as in training" not in dense.stderr
    passport = folder / "run" / "adapter" / "lorakit.json"
    before = passport.read_text()
    trained = json.loads(before) | {"quantization": "nf4", "double_quant": True}
    passport.write_text(json.dumps(trained))
    held = run("generate", "run", "what is 2?", "--max-new-tokens", "5")
    passport.write_text(before)
    assert held.exit_code == 0, held.output
    assert "The base is held as in training: nf4, double" in held.stderr


PREFIX = """
model: short
adapter: {method: prefix}
data: {train: rows.jsonl, eval: long.jsonl, too_long: truncate}
eval: {metrics: [loss, stop_rate], generate: {max_new_tokens: 99}}
output_dir: prefix
"""


def test_no_token_comes_to_where_a_prefix_has_moved_it_beyond_the_context(run: Any, folder: Path):
    short = AutoModelForCausalLM.from_config(tiny_config("gpt2", n_positions=64))
    short.save_pretrained(folder / "short")
    tiny_tokenizer().save_pretrained(folder / "short")
    base = find_base(folder / "short")
    save_adapter(base, folder / "prefix" / "adapter", "prefix", tokens=20, init="random")
    row = {"prompt": "what?", "completion": "it is " * 60}
    (folder / "long.jsonl").write_text(f"{json.dumps(row)}\n")
    (folder / "prefix.yaml").write_text(PREFIX)
    result = run("eval", "prefix.yaml")
    assert result.exit_code == 0, result.output
    assert "over max_length 44: cut" in result.stderr
    asked = ("generate", "prefix", "what?", "--max-new-tokens", "99", "--json")
    answered = run(*asked)
    assert answered.exit_code == 0, answered.output
    assert json.loads(answered.stdout)["tokens"] < 44
    previewed = run("data", "stats", "prefix.yaml", "--json")
    assert json.loads(previewed.stdout)["max_length"] == 44


def test_merge_finds_the_base_and_tells_what_it_checked(run: Any, folder: Path):
    result = run("merge", "run", "--out", "merged")
    assert result.exit_code == 0, result.output
    assert "tensors changed" in result.stdout
    assert "Verified  8 prompts" in result.stdout
    assert (folder / "merged" / "merge_report.json").is_file()
    again = run("merge", "run", "--out", "merged", "--json")
    assert (again.exit_code, json.loads(again.stdout)["error"]["id"]) == (2, "output.not-empty")
    smaller = run(
        "merge", "run", "--out", "merged", "--overwrite", "--max-shard-size", "50KB", "--json"
    )
    document = json.loads(smaller.stdout)
    assert document["verify"]["ok"]
    assert len(document["shards"]) > 1
    assert run("merge", "run", "--out", "other", "--max-shard-size", "big").exit_code == 2


def test_merge_asks_for_a_base_that_is_not_here(run: Any, folder: Path, tmp_path: Path):
    moved = tmp_path / "adapter"
    moved.mkdir()
    for path in (folder / "run" / "adapter").iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    passport = json.loads((moved / "lorakit.json").read_text())
    passport["recipe"]["model"]["path"] = passport["base"]["name"] = "gone"
    (moved / "lorakit.json").write_text(json.dumps(passport))
    found = run("merge", str(moved), "--out", str(tmp_path / "found"), "--no-verify")
    assert found.exit_code == 0, "PEFT's settings still name it"
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "gone"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    result = run("merge", str(moved), "--out", str(tmp_path / "out"), "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["id"] == "model.not-found"
    assert "--base" in error["hint"]
    out = str(tmp_path / "named")
    named = run("merge", str(moved), "--out", out, "--base", "tiny", "--no-verify")
    assert named.exit_code == 0, named.output


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_scale_that_is_no_number_is_wrong_usage(run: Any, number: str):
    result = run("merge", "run", "--out", "none", "--scale", number, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["id"] == "usage"
