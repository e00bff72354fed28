"""`lorakit train` and `merge` on a base in 4 bits: into which weights, and what that costs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lorakit.cli.app import app
from lorakit.export import target
from lorakit.model.quantized import Quantization
from tests.export.adapters import find_base
from tests.model.test_quantized import by_transformers
from tests.tiny import tiny_tokenizer, write_tiny_model

RECIPE: dict[str, Any] = {
    "model": {"path": "tiny", "quantization": "nf4", "dtype": "fp32"},
    "adapter": {"rank": 4},
    "data": {"train": "rows.jsonl", "eval": 0.25, "max_length": 64},
    "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 0.02},
    "merge": {"enabled": True},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with a base and rows."""
    write_tiny_model(tmp_path / "tiny")
    rows = [{"prompt": f"what is {n}?", "completion": f"it is {n}"} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, exit: int = 0) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--offline"])
    assert result.exit_code == exit, result.output
    return result


def train(folder: Path, name: str = "r", exit: int = 0, **sections: Any) -> Any:
    recipe = {key: {**value, **sections.get(key, {})} for key, value in RECIPE.items()}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return run("train", f"{name}.yaml", exit=exit)


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "merge_report.json").read_text())


def test_a_run_on_4_bits_measures_both_merges_and_says_which_it_made(folder: Path) -> None:
    result = train(folder)
    assert "Measured  loss " in result.stderr
    made = report(folder / "runs" / "r" / "merged")
    assert made["base_weights"] == "original"
    assert made["trained_on"] == {"quantization": "nf4", "double_quant": True}
    losses = made["losses"]
    assert losses["rows"] == 4
    assert {losses[key] > 0 for key in ("trained", "original", "dequantised")} == {True}
    evaluated = json.loads(run("eval", "r.yaml", "--json").stdout)["metrics"]["loss"]["adapter"]
    assert losses["trained"] == pytest.approx(evaluated, rel=1e-5)
    again = run("merge", "runs/r", "--out", "m", "--base-weights", "dequantised")
    assert "Weights   dequantised; the adapter was trained on nf4, double" in again.stderr
    assert f"{losses['trained']:.4f} as trained" in again.stderr
    other = report(folder / "m")
    assert (other["base_weights"], other["losses"]) == ("dequantised", losses)
    recipe = {
        "output_dir": "runs/r",
        "model": {"path": "m", "quantization": "none", "dtype": "fp32"},
    }
    changes = [f"{key}={json.dumps(value)}" for key, value in recipe.items()]
    alone = run("eval", "r.yaml", "--base-only", "--json", *(x for c in changes for x in ("-s", c)))
    value = json.loads(alone.stdout)["metrics"]["loss"]["base"]
    assert value == pytest.approx(losses["dequantised"], rel=1e-5)


def test_the_recipe_chooses_the_weights(folder: Path) -> None:
    train(folder, merge={"base_weights": "dequantised"})
    assert report(folder / "runs" / "r" / "merged")["base_weights"] == "dequantised"
    card = (folder / "runs" / "r" / "adapter" / "README.md").read_text()
    assert "| base weights | nf4, double |" in card


def test_losses_need_rows_and_may_be_left_out(folder: Path) -> None:
    (folder / "held.jsonl").write_text((folder / "rows.jsonl").read_text())
    train(folder, data={"eval": "held.jsonl"}, merge={"enabled": False})
    left_out = run("merge", "runs/r", "--out", "a", "--no-measure")
    assert "Measured" not in left_out.stderr
    assert report(folder / "a")["losses"] is None
    (folder / "held.jsonl").unlink()
    gone = run("merge", "runs/r", "--out", "b")
    assert "warning[merge.not-measured]" in gone.stderr
    assert "held.jsonl" in gone.stderr
    assert report(folder / "b")["losses"] is None
    (folder / "runs" / "r" / "resolved.yaml").unlink()
    unknown = run("merge", "runs/r", "--out", "c", "--base", "tiny")
    assert "Measured  no losses: there is no recipe" in unknown.stderr


def test_a_recipe_may_leave_the_losses_out(folder: Path) -> None:
    assert "Measured" not in train(folder, merge={"measure": False}).stderr
    assert report(folder / "runs" / "r" / "merged")["losses"] is None


def test_a_base_too_large_to_be_held_is_neither_measured_nor_merged_into(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(folder, merge={"enabled": False})
    monkeypatch.setattr(target, "available_bytes", lambda: 1000)
    merged = run("merge", "runs/r", "--out", "a")
    assert "warning[merge.not-measured]: losses are not measured: holding" in merged.stderr
    assert report(folder / "a")["losses"] is None
    refused = run("merge", "runs/r", "--out", "b", "--base-weights", "dequantised", exit=3)
    assert "error[run.out-of-memory]: holding" in refused.stderr
    assert not (folder / "b").exists()


def test_an_adapter_of_dense_weights_has_none_to_dequantise(folder: Path) -> None:
    plain = train(folder, model={"quantization": "none"})
    assert "Measured" not in plain.stderr
    refused = run("merge", "runs/r", "--out", "m", "--base-weights", "dequantised", exit=2)
    assert "error[usage]" in refused.stderr
    assert "trained on dense weights" in refused.stderr
    assert not (folder / "m").exists()
    both = {"model": {"quantization": "none"}, "merge": {"base_weights": "dequantised"}}
    conflict = train(folder, "other", exit=2, **both)
    assert "error[recipe.conflict]: merge.base_weights" in conflict.stderr
    assert "other.yaml:" in conflict.stderr
    assert not (folder / "runs" / "other").exists()


def test_weights_stored_in_4_bits_are_merged_dequantised_or_not_at_all(folder: Path) -> None:
    how = Quantization("nf4")
    by_transformers(folder / "tiny", how).save_pretrained(folder / "stored")
    tiny_tokenizer().save_pretrained(folder / "stored")
    assert find_base(folder / "stored").stored == how
    model = {"path": "stored", "quantization": "none"}
    refused = train(folder, exit=2, model=model)
    assert "are stored as nf4, double" in refused.stderr
    assert "merge.base_weights: dequantised" in refused.stderr
    assert not (folder / "runs").exists()
    train(folder, model=model, merge={"base_weights": "dequantised"})
    made = report(folder / "runs" / "r" / "merged")
    assert made["losses"]["original"] is None
    assert made["losses"]["dequantised"] == pytest.approx(made["losses"]["trained"], rel=1e-4)
    run("merge", "runs/r", "--out", "m", exit=2)
    from_dense = run("merge", "runs/r", "--out", "m", "--base", "tiny")
    assert "warning[adapter.base-unknown]" in from_dense.stderr
    assert report(folder / "m")["losses"]["original"] > 0
