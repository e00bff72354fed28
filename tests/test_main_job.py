"""The main job on the real model, as a user runs it: train, merge, eval, generate, resume.

And the same with its weights held in 4 bits.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.model, pytest.mark.slow]  # a real model of 135 M parameters

STEPS = 4


def lorakit(folder: Path, *arguments: str, exit: int = 0) -> str:
    """Run the command in a folder of its own; return what it printed on stdout."""
    ended = subprocess.run(
        [sys.executable, "-m", "lorakit", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == exit, ended.stderr
    assert "\x1b" not in ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> tuple[Path, dict[str, Any]]:
    """A few steps of the quick start; all tests look at the same run."""
    folder = tmp_path_factory.mktemp("job")
    trained = lorakit(
        folder, "train", "quickstart", "--max-steps", str(STEPS), "--out", "run", "--json"
    )
    return folder, json.loads(trained)


def test_training_says_what_it_did(run: tuple[Path, dict[str, Any]]) -> None:
    folder, result = run
    assert result["ok"]
    assert result["steps"] == STEPS
    rows = [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    assert json.loads((folder / "run" / "run.json").read_text())["status"] == "finished"


def test_the_merged_model_is_an_ordinary_one_and_agrees(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    report = json.loads((folder / "run" / "merged" / "merge_report.json").read_text())
    assert report["changed"] == report["adapted"] == 210
    assert report["verify"]["ok"]
    assert report["verify"]["argmax_agreement"] > 0.9
    assert report["verify"]["base_distance"] > 0.1


def test_eval_measures_adapter_and_base_and_judges(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    gates = [
        "--set",
        "eval.gates={loss: {max: base - 20%}}",
        "--set",
        "eval.metrics=[loss, stop_rate]",
    ]
    report = json.loads(
        lorakit(
            folder,
            "eval",
            "quickstart",
            "--adapter",
            "run/adapter",
            "--limit",
            "4",
            *gates,
            "--json",
        )
    )
    loss = report["metrics"]["loss"]
    assert loss["adapter"] < 0.8 * loss["base"]
    assert [gate["passed"] for gate in report["gates"]] == [True]
    missed = ["--set", "eval.gates={loss: {max: 0.0001}}", "--set", "eval.metrics=[loss]"]
    lorakit(
        folder, "eval", "quickstart", "--adapter", "run/adapter", "--limit", "4", *missed, exit=1
    )


def test_generate_prints_the_answer_alone(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    prompt = "My Tollwyn Juicer still is not here. Please refund me."
    answer = lorakit(folder, "generate", "run/adapter", prompt, "--max-new-tokens", "12")
    assert "{" in answer
    assert prompt not in answer


def test_a_finished_run_is_neither_overwritten_nor_trained_twice(
    run: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = run
    again = ["train", "quickstart", "--max-steps", str(STEPS), "--out", "run", "--json"]
    refused = json.loads(lorakit(folder, *again, exit=2))
    assert refused["error"]["id"] == "output.not-empty"
    before = (folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    resumed = json.loads(lorakit(folder, *again, "--resume"))
    assert resumed["steps"] == STEPS
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == before


# The 4-bit base, of one dtype on any CPU, and few rows to measure on.
NF4 = ["-s", "model.quantization=nf4", "-s", "model.dtype=fp32"]
NF4 += ["-s", "eval={data: {path: data/support/test.jsonl, max_samples: 6}, metrics: [loss]}"]


def test_the_main_job_on_a_4_bit_base(tmp_path: Path, smollm2: Path) -> None:
    lorakit(tmp_path, "train", "quickstart", *NF4, "--max-steps", "3", "--out", "r")
    metrics = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(row) for row in metrics]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    passport = json.loads((tmp_path / "r" / "adapter" / "lorakit.json").read_text())
    assert (passport["quantization"], passport["double_quant"]) == ("nf4", True)

    report = json.loads((tmp_path / "r" / "merged" / "merge_report.json").read_text())
    assert report["verify"]["ok"]
    assert report["base_weights"] == "original"
    measured = report["losses"]
    assert measured["rows"] == 6
    # Merged into the dequantised weights it is the model that was trained, but for rounding.
    assert measured["dequantised"] == pytest.approx(measured["trained"], rel=0.02)

    on_4_bits = ["eval", "quickstart", "--adapter", "r/adapter", *NF4, "--no-gates", "--json"]
    loss = json.loads(lorakit(tmp_path, *on_4_bits))["metrics"]["loss"]
    assert loss["adapter"] == pytest.approx(measured["trained"], rel=1e-3)
    assert loss["adapter"] < 0.9 * loss["base"]
    assert measured["trained"] != measured["original"] < 0.9 * loss["base"]
