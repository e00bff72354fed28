"""The count of a step's FLOPs, and two real steps beside their estimates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lorakit.cli.app import app
from lorakit.runtime import Runtime
from lorakit.training import speed
from lorakit.training.memory import Setup
from lorakit.training.speed import CARDS, Rate, card, step_flops
from tests.tiny import write_tiny_model
from tests.training.shapes import llama, shape


@pytest.mark.parametrize("recomputed", [0, 2])
def test_the_flops_are_those_of_the_formula(recomputed: int) -> None:
    """4 N a token less the first layer's gradient of q, k and v, 6 for the updates, the head."""
    d, f, kv, layers, words, r = 256, 704, 64, 2, 320, 4
    known = shape(llama(d, f, layers, 8, 2, words), torch.float32, rank=r)
    body = layers * (2 * d * d + 2 * d * kv + 3 * d * f)
    updates = known.trainable
    first = 2 * d * (d + 2 * kv) + 2 * r * 3 * d
    again = (2 * body + 2 * updates) * recomputed / layers
    tokens, squares = 600, 4 * 150**2
    expected = tokens * (4 * body + 6 * updates - first + again + 4 * 0.5 * d * words)
    expected += squares * d * (7 * layers + 2 * recomputed)
    setup = Setup(tokens, share=0.5, recomputed=recomputed)
    assert step_flops(known, setup, tokens, squares) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("text", ["RTX 3090", "RTX3090", "rtx-3090", " rtx  3090 "])
def test_a_card_is_known_however_its_name_is_spaced(text: str) -> None:
    assert card(text).name == "RTX 3090"
    assert card("A100 80GB") == card("a100-80gb") == card("A10080GB")
    assert len(CARDS) == len({one.name for one in CARDS.values()})


def test_a_rate_says_where_it_comes_from() -> None:
    found = Rate.measured(Runtime(torch.device("cpu")), torch.float32)
    assert found.flops > 1e8
    assert "measured now" in found.source
    paper = Rate.of(CARDS["h100"])
    assert paper is not None
    assert paper.flops < 989e12
    assert "on paper" in paper.source


def test_a_step_reaches_less_of_products_that_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "product_rate", lambda *_: 1e12)
    here = Runtime(torch.device("cpu"))

    def share(dtype: torch.dtype, *, amx: bool) -> float:
        monkeypatch.setattr(speed, "has_amx", lambda: amx)
        return Rate.measured(here, dtype).flops / 1e12

    assert share(torch.float32, amx=True) == share(torch.float32, amx=False)
    assert share(torch.bfloat16, amx=True) < 0.5 * share(torch.bfloat16, amx=False)
    monkeypatch.setattr(Runtime, "is_gpu", True)
    assert share(torch.bfloat16, amx=True) == speed.SHARE_GPU


def test_a_rate_below_one_gflops_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "product_rate", lambda *_: 0.34e9)
    monkeypatch.setattr(speed, "has_amx", lambda: False)
    found = Rate.measured(Runtime(torch.device("cpu")), torch.float16)
    assert found.source == "57% of 0.34 GFLOP/s, measured now"


@pytest.mark.model
@pytest.mark.slow  # two steps of 135 M parameters
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_memory_of_a_real_model_is_estimated_within_15_percent(
    tmp_path: Path, smollm2: Path, quantization: str
) -> None:
    settings = ["model.dtype=fp32", f"model.quantization={quantization}", "train.batch_size=4"]
    command = [sys.executable, "-m", "lorakit", "plan", "quickstart", "--measure", "--json"]
    ended = subprocess.run(
        command + [word for one in settings for word in ("-s", one)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    measured = json.loads(ended.stdout)["measured"]
    assert measured["estimated_bytes"] == pytest.approx(measured["bytes"], rel=0.15)


def test_two_real_steps_are_compared_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "model")
    rows = [{"prompt": "ask " * (1 + n % 3), "completion": "answer"} for n in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("recipe.yaml").write_text(
        "model: model\ndata: {train: rows.jsonl}\ntrain: {batch_size: 4}\n"
    )
    before = sorted(tmp_path.iterdir())
    # How far memory grew is known of a new process alone.
    ended = subprocess.run(
        [sys.executable, "-m", "lorakit", "plan", "recipe.yaml", "--measure", "--json"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    measured = json.loads(ended.stdout)["measured"]
    assert 0 < measured["tokens"] <= json.loads(ended.stdout)["micro_batch_tokens"]
    assert measured["bytes"] > 0
    assert measured["seconds"] > 0
    assert measured["estimated_seconds"] > 0
    shown = CliRunner().invoke(app, ["plan", "recipe.yaml", "--measure"]).stdout
    assert "Measured " in shown
    assert sorted(tmp_path.iterdir()) == before
