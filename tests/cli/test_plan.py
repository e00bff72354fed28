"""`lorakit plan` says what will happen and whether it fits, without reading a weight."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from lorakit.cli import train_run
from lorakit.cli.app import app
from lorakit.errors import BadInput
from lorakit.model import base, quantized
from lorakit.runtime import Runtime
from lorakit.training import fitting, memory, passports
from tests.tiny import write_tiny_model, write_wide_model

runner = CliRunner()


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    write_tiny_model(tmp_path / "model", "llama")
    rows = [{"prompt": "ask " * (1 + n % 3), "completion": "answer"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        "model: model\n"
        "adapter: {rank: 4, target_modules: [q_proj, down_proj]}\n"
        "data: {train: rows.jsonl, max_length: 64}\n"
        "train: {epochs: 2, batch_size: 8}\n"
    )
    return str(tmp_path / "recipe.yaml")


def test_the_plan_is_exact_about_sites_parameters_and_steps(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(base, "load")  # reading weights would fail
    ended = runner.invoke(app, ["plan", recipe, "--json"])
    assert ended.exit_code == 0, ended.stderr
    plan = json.loads(ended.stdout)
    assert [site["name"].rpartition(".")[2] for site in plan["sites"]] == [
        "q_proj",
        "down_proj",
    ] * 2
    # q_proj is 32 to 32 and down_proj 48 to 32, in each of 2 layers.
    assert plan["trainable"] == 2 * 4 * ((32 + 32) + (48 + 32))
    assert (plan["steps_per_epoch"], plan["steps"]) == (3, 6)
    assert plan["memory"]["total"] == sum(v for k, v in plan["memory"].items() if k != "total")
    assert plan["fits"]
    assert plan["servable"] == {"PEFT": "yes", "vLLM": "yes", "llama.cpp": "yes"}
    shown = runner.invoke(app, ["plan", recipe]).stdout
    assert "Servable  PEFT yes · vLLM yes · llama.cpp yes" in shown
    assert "q_proj  2 sites  32→32  rank 4" in shown
    assert "6 (3 an epoch x 2)" in shown


@pytest.mark.parametrize("there", ["file", "folder", "below a file"])
def test_where_the_fitting_recipe_goes_is_checked_before_anything_is_planned(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    monkeypatch.delattr(base, "find")  # planning would fail
    fitted = {
        "file": Path(recipe),
        "folder": tmp_path / "empty",
        "below a file": Path(recipe) / "fitted.yaml",
    }[there]
    (tmp_path / "empty").mkdir()
    ended = runner.invoke(app, ["plan", recipe, "--fit", str(fitted), "--json"])
    assert ended.exit_code == 2, ended.stderr
    assert json.loads(ended.stdout)["error"]["id"] == "output.not-empty"


@pytest.mark.parametrize("longer", [0, 1])
def test_train_says_that_it_reads_large_files(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longer: int
) -> None:
    """Large are the files, which hold fp32 here: loaded in bf16 the base takes half as much."""

    def pinned(*_: Any) -> None:
        raise BadInput("usage", "far enough")

    size = (tmp_path / "model/model.safetensors").stat().st_size
    monkeypatch.setattr(train_run, "LARGE", size - longer)
    monkeypatch.setattr(passports, "pinned", pinned)
    settings = ["-s", "model.dtype=bf16", "--out", str(tmp_path / "run")]
    ended = runner.invoke(app, ["train", recipe, *settings])
    assert "far enough" in ended.stderr
    assert ("every byte of the base" in ended.stderr) is bool(longer)


def test_a_recipe_that_fits_is_not_written_again(recipe: str, tmp_path: Path) -> None:
    fitted = tmp_path / "fitted.yaml"
    ended = runner.invoke(app, ["plan", recipe, "--fit", str(fitted)])
    assert ended.exit_code == 0, ended.stderr
    assert "the recipe fits as it is, nothing needs to change" in ended.stderr
    assert not fitted.exists()


def test_a_plan_that_does_not_fit_exits_1(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "free_bytes", lambda _: 1000)
    ended = runner.invoke(app, ["plan", recipe])
    assert ended.exit_code == 1
    assert "error[plan.will-not-fit]" in ended.stderr
    document = json.loads(runner.invoke(app, ["plan", recipe, "--json"]).stdout)
    assert (document["exit"], document["fits"]) == (1, False)
    assert document["error"]["id"] == "plan.will-not-fit"
    assert document["error"]["hint"].startswith("nothing in the recipe")


def test_what_is_just_too_little_shows_as_less(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One decimal said: 0.0 GiB more than 0.8 GiB; needs about 0.8 GiB, 0.8 GiB are there."""
    plan = ["plan", recipe, "-s", "train.gradient_checkpointing=true"]
    plan += ["-s", "train.micro_batch_size=1"]
    total = json.loads(runner.invoke(app, [*plan, "--json"]).stdout)["memory"]["total"]
    free = total - (20 << 20)
    monkeypatch.setattr(Runtime, "free_bytes", lambda _: free)
    ended = runner.invoke(app, plan)
    assert f"Fits      NO, 0.02 GiB more than {free / 2**30:.2f} GiB" in ended.stdout
    told = f"needs about {total / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are there"
    assert told in ended.stderr
    assert " of 0.95 GiB" in runner.invoke(app, [*plan, "--gpu", "0.95GiB"]).stdout


def test_arithmetic_of_less_than_a_second_is_not_told_as_none(recipe: str) -> None:
    shown = runner.invoke(app, ["plan", recipe, "--gpu", "L40S"]).stdout
    assert "under a second of arithmetic in all, so starting up takes most of the time" in shown
    assert " 0s " not in shown


def test_train_warns_where_the_plan_does_not_fit(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the change that `plan` proposes; with --strict nothing begins."""
    monkeypatch.setattr(memory, "OVERHEAD", 0)
    monkeypatch.setattr(memory, "LIBRARIES", 0)
    monkeypatch.setattr(memory, "KERNELS", 0)
    settings = ["-s", "train.gradient_checkpointing=false", "-s", f"output_dir={tmp_path / 'run'}"]
    settings += ["-s", "train.max_steps=1", "-s", "train.micro_batch_size=8"]
    ended = runner.invoke(app, ["plan", recipe, *settings, "--json"])
    total = json.loads(ended.stdout)["memory"]["total"]
    assert "error" not in json.loads(ended.stdout)
    monkeypatch.setattr(Runtime, "free_bytes", lambda _: total - 1)
    ended = runner.invoke(app, ["plan", recipe, *settings, "--json"])
    help = json.loads(ended.stdout)["error"]["hint"]
    assert help.startswith("it fits with -s train.")
    strict = runner.invoke(app, ["train", recipe, *settings, "--strict"])
    assert strict.exit_code == 2
    assert "error[usage.strict]" in strict.stderr
    assert not (tmp_path / "run").exists()
    ended = runner.invoke(app, ["train", recipe, *settings])
    assert ended.exit_code == 0, ended.stderr
    assert "warning[plan.does-not-fit]" in ended.stderr
    assert help in " ".join(ended.stderr.split())
    kept = yaml.safe_load((tmp_path / "run" / "resolved.yaml").read_text())
    assert kept["train"]["micro_batch_size"] == 8


@pytest.mark.parametrize("command", [["plan", "--measure"], ["train"]])
def test_memory_that_runs_out_while_loading_is_no_bug(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(base, "load", load)
    settings = ["-s", f"output_dir={tmp_path / 'run'}"]
    ended = runner.invoke(app, [*command, recipe, *settings])
    assert ended.exit_code == 3, ended.stderr
    assert "error[run.out-of-memory]" in ended.stderr
    assert "memory ran out (planned, in GiB: weights" in " ".join(ended.stderr.split())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "lion_8bit", "sgd", "adafactor"])
def test_the_disk_of_checkpoints_is_that_of_a_run(
    tmp_path: Path, recipe: str, optimizer: str
) -> None:
    """Two are kept and one is being written: each has the adapter and the optimizer's states."""
    write_wide_model(tmp_path / "wide")
    settings = [
        f"model.path={tmp_path / 'wide'}",
        "adapter.rank=64",
        f"output_dir={tmp_path / 'r'}",
    ]
    settings += [f"train.optimizer={optimizer}", "train.max_steps=1", "train.keep_checkpoints=2"]
    options = [word for one in settings for word in ("-s", one)]
    planned = json.loads(runner.invoke(app, ["plan", recipe, *options, "--json"]).stdout)
    ended = runner.invoke(app, ["train", recipe, *options])
    assert ended.exit_code == 0, ended.stderr
    files = (tmp_path / "r" / "checkpoints" / "step-000001").rglob("*.safetensors")
    written = sum(path.stat().st_size for path in files)
    assert planned["disk"]["checkpoints"] / 3 == pytest.approx(written, rel=0.05)


def test_checkpointing_auto_takes_as_many_layers_as_memory_asks_for(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned() -> dict[str, Any]:
        document: dict[str, Any] = json.loads(runner.invoke(app, ["plan", recipe, "--json"]).stdout)
        return document

    free = planned()
    assert free["recomputed_layers"] == 0
    needed = free["memory"]["total"]
    monkeypatch.setattr(Runtime, "free_bytes", lambda _: int((needed - 1) / fitting.MARGIN))
    assert planned()["recomputed_layers"] == 1
    monkeypatch.setattr(Runtime, "free_bytes", lambda _: 1000)
    small = planned()
    assert small["recomputed_layers"] == 2
    assert small["micro_batch_tokens"] < free["micro_batch_tokens"]


def test_an_attention_that_is_not_installed_is_told_before_anything_is_written(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "is_flash_attn_2_available", lambda: False)
    for name in ("plan", "train"):
        changes = ["-s", "model.attention=flash", "-s", f"output_dir={tmp_path / 'run'}"]
        ended = runner.invoke(app, [name, recipe, *changes, "--json"])
        assert ended.exit_code == 4
        assert json.loads(ended.stdout)["error"]["id"] == "env.missing-package"
    assert not (tmp_path / "run").exists()


def test_a_4_bit_base_is_planned_and_needs_bitsandbytes(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["-s", "model.quantization=nf4", "-s", "model.dtype=fp32"]
    changes += ["-s", f"output_dir={tmp_path / 'run'}"]
    ended = runner.invoke(app, ["plan", recipe, *changes])
    assert ended.exit_code == 0, ended.stderr
    assert "float32  nf4, double" in ended.stdout
    assert "on a CPU nf4 saves memory, not time" in " ".join(ended.stderr.split())
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    for name in ("plan", "train"):
        ended = runner.invoke(app, [name, recipe, *changes, "--json"])
        assert ended.exit_code == 4
        error = json.loads(ended.stdout)["error"]
        assert error["id"] == "env.missing-package"
        assert "model.quantization: bitsandbytes" in error["message"]
        assert "pip install" in error["hint"]
    assert not (tmp_path / "run").exists()


def test_a_paged_optimizer_without_a_gpu_is_told_or_refused(recipe: str) -> None:
    paged = ["-s", "train.optimizer=paged_adamw_8bit"]
    ended = runner.invoke(app, ["plan", recipe, *paged])
    assert ended.exit_code == 0, ended.stderr
    assert "adamw_8bit, cosine" in ended.stdout
    assert "adamw_8bit takes its place" in " ".join(ended.stderr.split())
    ended = runner.invoke(
        app, ["plan", recipe, *paged, "-s", "train.strict_optimizer=true", "--json"]
    )
    assert ended.exit_code == 4
    assert json.loads(ended.stdout)["error"]["id"] == "env.missing-device"


def test_a_dtype_without_fast_kernels_is_told(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = torch.ops.mkldnn
    monkeypatch.setattr(library, "_is_mkldnn_fp16_supported", lambda: False, raising=False)
    slow = ["plan", recipe, "-s", "model.dtype=fp16"]
    (warning,) = json.loads(runner.invoke(app, [*slow, "--json"]).stdout)["warnings"]
    assert warning["id"] == "run.slow-dtype"
    assert "fp16 has no fast kernels on this CPU" in warning["message"]
    ended = runner.invoke(app, slow)
    assert "set model.dtype to auto" in ended.stderr
    assert " 0 GFLOP/s" not in ended.stdout
    # A card has them.
    on_card = json.loads(runner.invoke(app, [*slow, "--gpu", "L40S", "--json"]).stdout)
    assert on_card["warnings"] == []


def test_offload_without_a_gpu_recomputes_all_layers_and_says_so(recipe: str) -> None:
    ended = runner.invoke(app, ["plan", recipe, "-s", "train.gradient_checkpointing=offload"])
    assert ended.exit_code == 0, ended.stderr
    assert "all 2 layers computed again" in ended.stdout
    assert "offload is `true` here" in " ".join(ended.stderr.split())
