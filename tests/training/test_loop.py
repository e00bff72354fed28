"""The laws of the loop, on a tiny model: splits, packing, resume, and steps that are not finite."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lorakit import adapters
from lorakit.devices import HostCopy
from lorakit.errors import BadInput, Interrupted, RunFailed
from lorakit.model import weights
from lorakit.processes import Stop
from lorakit.recipe.reader import read
from lorakit.runtime import Runtime
from lorakit.scoring import RowScore
from lorakit.training import checkpoint, loop, loss_scale, passports
from lorakit.training import folder as folders
from lorakit.training.folder import Mode
from lorakit.training.plan import Permissions, Plan, make
from lorakit.training.progress import Reporter, StepRecord
from lorakit.training.run import Outcome
from tests.model.finding import find
from tests.tiny import write_tiny_model

ALONE = Runtime(torch.device("cpu"))
WORDS = (
    "the capital of france is paris and the assistant answers the user with a helpful word".split()
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and 22 rows of very different lengths."""
    path = tmp_path_factory.mktemp("loop")
    write_tiny_model(path / "model", "llama")
    with (path / "rows.jsonl").open("w") as file:
        for n in range(22):
            row = {
                "prompt": " ".join(WORDS[: 1 + n % 7]),
                "completion": " ".join(WORDS[n % 5 : 5 + 2 * (n % 4)]),
            }
            file.write(json.dumps(row) + "\n")
    return path


class Watcher(Reporter):
    """Keeps the records, and asks the run to stop after a step."""

    def __init__(self, steps: int, metrics: Path, stop: Stop, stop_after: int | None) -> None:
        super().__init__(steps, 1, say=lambda _: None, console=None, metrics=metrics)
        self.stop, self.stop_after = stop, stop_after
        self.records: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        super().step(record)
        self.records.append(record)
        if record.step == self.stop_after:
            self.stop.signal = signal.SIGTERM


def carry_out(
    folder: Path,
    out: Path,
    mode: Mode = "start",
    *,
    stop_after: int | None = None,
    grace: float | None = None,
    allow_inexact: bool = False,
    **train: Any,
) -> tuple[Outcome, list[StepRecord], dict[str, torch.Tensor]]:
    """Run a recipe over the tiny model; return the outcome, the records and the saved adapter."""
    data = train.pop("data", {})
    adapter = train.pop("adapter", {"rank": 4})
    model = train.pop("model", {})
    settings = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "warmup": 0.0} | train
    recipe_file = out.with_suffix(".yaml")
    recipe_file.write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(folder / "model"), "dtype": "fp32"} | model,
                "adapter": adapter,
                "data": {"train": str(folder / "rows.jsonl"), "eval": 0.2, "max_length": 128}
                | data,
                "train": settings,
                "output_dir": str(out),
            }
        )
    )
    recipe = read(str(recipe_file), adapters.settings_for, [], environ={})
    plan = make(recipe, ALONE, Permissions(offline=True))
    pinned = passports.pinned(plan, ALONE)
    stop = Stop(grace)
    with folders.opened(out, mode, ALONE, pinned, allow_inexact=allow_inexact) as opened:
        watcher = Watcher(plan.steps.total, opened.metrics, stop, stop_after)
        outcome = loop.train(plan, ALONE, opened, watcher, stop)
    return outcome, watcher.records, load_file(out / "adapter" / "adapter_model.safetensors")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max()) for name in one)


def test_the_loss_falls_and_the_outcome_says_so(folder: Path, tmp_path: Path) -> None:
    outcome, records, _ = carry_out(folder, tmp_path / "run", epochs=6)
    assert records[-1].loss < 0.7 * records[0].loss
    assert outcome.steps == len(records) == 6 * 3
    assert outcome.final_loss == records[-1].loss
    assert outcome.best_eval_loss is not None


def test_the_first_reported_loss_is_that_of_the_untouched_base(
    folder: Path, tmp_path: Path
) -> None:
    _, slow, _ = carry_out(folder, tmp_path / "slow", max_steps=1)
    _, fast, _ = carry_out(folder, tmp_path / "fast", max_steps=1, learning_rate=0.1)
    assert slow[0].loss == fast[0].loss


@pytest.mark.parametrize(
    "split",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 3},
        {"data": {"packing": False}},
        {"data": {"packing": False}, "micro_batch_size": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": "offload"},
    ],
    ids=str,
)
def test_any_split_of_a_batch_gives_the_same_run(
    folder: Path, tmp_path: Path, split: dict[str, Any]
) -> None:
    """Bound: rounding of fp32 sums in another order, through six steps of AdamW."""
    _, whole, expected = carry_out(folder, tmp_path / "whole")
    _, parts, found = carry_out(folder, tmp_path / "parts", **split)
    assert [r.loss for r in parts] == pytest.approx([r.loss for r in whole], rel=1e-5)
    assert [r.grad_norm for r in parts] == pytest.approx([r.grad_norm for r in whole], rel=1e-4)
    assert largest_difference(expected, found) < 1e-3


@pytest.mark.parametrize(
    "adapter",
    [
        {"rank": 4, "dropout": 0.1},
        {"rank": 4, "modules_to_save": ["embed_tokens", "norm"]},
        {"method": "dora", "rank": 4},
        {"method": "ia3"},
        {"method": "prefix"},
    ],
    ids=str,
)
def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(
    folder: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    _, _, whole = carry_out(folder, tmp_path / "whole", adapter=adapter)
    with pytest.raises(Interrupted, match="step 2"):
        carry_out(folder, tmp_path / "cut", adapter=adapter, stop_after=2)
    _, records, resumed = carry_out(folder, tmp_path / "cut", "resume", adapter=adapter)
    assert records[0].step == 3
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "lion_8bit", "sgd", "adafactor"])
def test_every_optimizer_resumes_bit_equal(folder: Path, tmp_path: Path, optimizer: str) -> None:
    # The copy of the embedding is large enough for states in 8 bits.
    settings = {
        "optimizer": optimizer,
        "adapter": {"rank": 4, "modules_to_save": ["embed_tokens"]},
        "learning_rate": 1e-3,
    }
    _, _, whole = carry_out(folder, tmp_path / "whole", **settings)
    with pytest.raises(Interrupted, match="step 2"):
        carry_out(folder, tmp_path / "cut", stop_after=2, **settings)
    _, _, resumed = carry_out(folder, tmp_path / "cut", "resume", **settings)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_on_a_4_bit_base_it_resumes_and_remembers_the_original(
    folder: Path, tmp_path: Path
) -> None:
    nf4 = {"model": {"quantization": "nf4"}}
    _, records, whole = carry_out(folder, tmp_path / "whole", **nf4)
    assert records[-1].loss < records[0].loss
    with pytest.raises(Interrupted, match="step 2"):
        carry_out(folder, tmp_path / "cut", stop_after=2, **nf4)
    with pytest.raises(BadInput, match=r"model\.quantization was 'nf4' and is 'none'"):
        carry_out(folder, tmp_path / "cut", "resume")
    _, _, resumed = carry_out(folder, tmp_path / "cut", "resume", **nf4)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    passport = json.loads((tmp_path / "whole" / "adapter" / "lorakit.json").read_text())
    assert (passport["quantization"], passport["double_quant"]) == ("nf4", True)
    assert passport["base"]["fingerprint"] == find(folder / "model").fingerprint
    _, dense, _ = carry_out(folder, tmp_path / "dense", max_steps=1)
    assert dense[0].loss != records[0].loss


def test_a_changed_recipe_is_not_resumed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        carry_out(folder, tmp_path / "run", stop_after=2)
    with pytest.raises(BadInput, match=r"train\.learning_rate was 0\.01 and is 0\.02"):
        carry_out(folder, tmp_path / "run", "resume", learning_rate=0.02)


def test_one_bit_of_the_base_that_no_fingerprint_sees_is_not_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_SMALL", 1 << 10)  # so that of these tensors rows are sampled too
    folder = Path(shutil.copytree(folder, tmp_path / "own"))
    with pytest.raises(Interrupted):
        carry_out(folder, tmp_path / "run", stop_after=2)
    file, before = folder / "model" / "model.safetensors", find(folder / "model").fingerprint
    stored = file.read_bytes()
    header = int.from_bytes(stored[:8], "little") + 8
    places = json.loads(stored[8:header])["model.embed_tokens.weight"]
    row = (places["data_offsets"][1] - places["data_offsets"][0]) // places["shape"][0]
    at = header + places["data_offsets"][0] + 5 * row  # the sixth row, which is between samples
    file.write_bytes(stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :])
    assert find(folder / "model").fingerprint == before
    with pytest.raises(BadInput, match="base was '"):
        carry_out(folder, tmp_path / "run", "resume")
    file.write_bytes(stored)
    carry_out(folder, tmp_path / "run", "resume")


@pytest.mark.parametrize("during", [False, True])
def test_an_evaluation_that_a_signal_cut_short_is_taken_on_resume(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: bool
) -> None:
    whole, _, _ = carry_out(folder, tmp_path / "whole", max_steps=3, eval_every=3)
    with monkeypatch.context() as patch:
        if during:
            patch.setattr(loop, "score", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or [])
        stop_after = None if during else 3
        with pytest.raises(Interrupted, match="step 3"):
            carry_out(folder, tmp_path / "cut", stop_after=stop_after, max_steps=3, eval_every=3)
    resumed, records, _ = carry_out(folder, tmp_path / "cut", "resume", max_steps=3, eval_every=3)
    assert not records
    assert resumed.final_loss == whole.final_loss
    assert resumed.best_eval_loss == whole.best_eval_loss
    assert resumed.best_step == whole.best_step == 3


def test_the_figures_of_a_resumed_run_are_those_of_all_its_sessions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate of all tokens by the seconds of one session was several times too high."""
    whole, _, _ = carry_out(folder, tmp_path / "whole")
    real, slow = loop.step, [True]

    def step(run: Any, index: int) -> bool:
        time.sleep(0.2 if slow else 0.0)
        return real(run, index)

    monkeypatch.setattr(loop, "step", step)
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "peak_bytes", lambda _: 10**15)
        with pytest.raises(Interrupted):
            carry_out(folder, tmp_path / "cut", stop_after=2)
    slow.clear()
    outcome, records, _ = carry_out(folder, tmp_path / "cut", "resume")
    assert outcome.tokens == whole.tokens
    assert outcome.wall_seconds > outcome.training_seconds > 0.4
    assert outcome.tokens_per_second == outcome.tokens / outcome.training_seconds
    assert records[-1].tokens_per_second == pytest.approx(outcome.tokens_per_second)
    assert outcome.peak_memory_bytes == records[0].mem_peak == 10**15


def test_evaluating_and_saving_count_as_time_of_the_run_and_not_of_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, save = loop.score, checkpoint.save
    monkeypatch.setattr(loop, "score", lambda *given: (time.sleep(0.5), score(*given))[1])
    monkeypatch.setattr(checkpoint, "save", lambda *given: (time.sleep(0.7), save(*given))[1])
    outcome, records, _ = carry_out(folder, tmp_path / "run", max_steps=4, eval_every=2)
    apart = 2 * 0.5 + 2 * 0.7
    assert outcome.wall_seconds - outcome.training_seconds > apart
    assert records[-1].tokens_per_second == pytest.approx(outcome.tokens_per_second)
    assert outcome.tokens_per_second == outcome.tokens / outcome.training_seconds


def test_the_best_step_is_saved_where_no_checkpoint_was_due(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 4.0])
    monkeypatch.setattr(loop, "score", lambda *_: [RowScore(0, next(losses), 1, 0)])
    outcome, _, _ = carry_out(folder, tmp_path / "run", eval_every=2, save_every=100)
    assert outcome.best_step == 4
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-000004", "step-000006"}


def test_an_evaluation_that_is_not_finite_stops_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "score", lambda *_: [RowScore(0, float("nan"), 1, 0)])
    with pytest.raises(RunFailed, match="evaluation after step 3") as caught:
        carry_out(folder, tmp_path / "run")
    assert caught.value.id == "run.not-finite"


@contextmanager
def spoilt_loss(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> Iterator[None]:
    """Make the loss NaN in some of the calls, counted from 1."""
    real, count = loop.token_loss, 0

    def sometimes(model: Any, batch: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        loss = real(model, batch)
        return loss * float("nan") if count in calls else loss

    with monkeypatch.context() as patch:
        patch.setattr(loop, "token_loss", sometimes)
        yield


def test_a_step_that_is_not_finite_stops_the_run_and_leaves_no_trace(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with spoilt_loss(monkeypatch, {3}), pytest.raises(RunFailed, match="step 3") as caught:
        carry_out(folder, tmp_path / "run", save_every=1)
    assert caught.value.id == "run.not-finite"
    assert "rows.jsonl" in str(caught.value.where)
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["step-000001", "step-000002"]
    assert not (tmp_path / "run" / "adapter").exists()
    _, _, whole = carry_out(folder, tmp_path / "whole", save_every=1)
    _, _, resumed = carry_out(folder, tmp_path / "run", "resume", save_every=1)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_the_rows_and_the_tensor_that_are_not_finite_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    real, spoilt = loop.token_loss, 7

    def token_loss(model: Any, batch: Any) -> torch.Tensor:
        loss = real(model, batch)
        if spoilt in batch.rows and where == "gradient":
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss * float("nan") if spoilt in batch.rows and where == "loss" else loss

    monkeypatch.setattr(loop, "token_loss", token_loss)
    with pytest.raises(RunFailed) as caught:
        carry_out(folder, tmp_path / "run", micro_batch_size=1)
    assert caught.value.id == "run.not-finite"
    recipe = read(str(tmp_path / "run.yaml"), adapters.settings_for, [], environ={})
    plan = make(recipe, ALONE, Permissions(offline=True))
    assert str(caught.value.where) == f"rows {plan.dataset.train[spoilt].place}"
    what = "the loss of these rows" if where == "loss" else "the gradient of model.layers.0"
    assert what in caught.value.message


def test_an_adapter_that_is_not_finite_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.step

    def step(run: Any, index: int) -> bool:
        if index == 2:
            name = list(run.named)[3]
            with torch.no_grad():
                run.named[name].view(-1)[5] = float("inf")
        return real(run, index)

    monkeypatch.setattr(loop, "step", step)
    with pytest.raises(RunFailed, match=r"step 3: .* the adapter's \S+ is not finite"):
        carry_out(folder, tmp_path / "run")


def test_a_step_that_the_grace_is_too_short_for_is_dropped_and_taken_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, expected = carry_out(folder, tmp_path / "whole", micro_batch_size=2)
    real, calls = loop.token_loss, 0

    def token_loss(model: Any, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:  # the second micro-batch of the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "token_loss", token_loss)
        with pytest.raises(Interrupted, match="after step 1"):
            carry_out(folder, tmp_path / "cut", grace=0.0, micro_batch_size=2)
    assert calls == 6
    resumed, records, found = carry_out(folder, tmp_path / "cut", "resume", micro_batch_size=2)
    assert records[0].step == 2
    assert (resumed.tokens, resumed.trained_tokens) == (whole.tokens, whole.trained_tokens)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_first_step_that_is_dropped_can_be_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, expected = carry_out(folder, tmp_path / "whole", micro_batch_size=4)
    real = loop.token_loss

    def token_loss(model: Any, batch: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "token_loss", token_loss)
        with pytest.raises(Interrupted, match="after step 0"):
            carry_out(folder, tmp_path / "cut", grace=0.0, micro_batch_size=4)
    _, _, found = carry_out(folder, tmp_path / "cut", "resume", micro_batch_size=4)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_inexact_resume_is_told_and_written_into_the_adapter(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        carry_out(folder, tmp_path / "run", stop_after=2)
    carry_out(folder, tmp_path / "run", "resume", learning_rate=0.02, allow_inexact=True)
    saved = adapters.read(tmp_path / "run" / "adapter")
    assert saved.passport is not None
    assert saved.passport["resumed_inexactly"] == [
        "recipe.train.learning_rate was 0.01 and is 0.02"
    ]


def test_on_a_gpu_the_host_waits_for_the_numbers_of_the_step_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the device is spoilt once its copy was asked for: nothing else may be read."""
    _, expected, _ = carry_out(folder, tmp_path / "whole", max_steps=4)
    events: list[str] = []

    def to_host(_: Runtime, tensor: torch.Tensor) -> HostCopy:
        number, copy = sum(one.startswith("copied") for one in events), tensor.clone()
        tensor.fill_(float("nan"))
        events.append(f"copied {number}")
        event: Any = SimpleNamespace(synchronize=lambda: events.append(f"waited {number}"))
        return HostCopy(copy, event)

    monkeypatch.setattr(Runtime, "is_gpu", True)
    monkeypatch.setattr(Plan, "compiled", False)
    monkeypatch.setattr(Runtime, "to_host", to_host)
    _, found, _ = carry_out(folder, tmp_path / "run", max_steps=4, eval_every=4, save_every=4)
    assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], rel=1e-5)
    assert " ".join(events) == (
        "copied 0 copied 1 waited 0 copied 2 waited 1 copied 3 waited 2 waited 3"
    )


def test_a_resumed_run_doubles_its_loss_scale_at_the_same_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "DOUBLES_AFTER", 3)
    fp16 = {"model": {"dtype": "fp16"}, "save_every": 1, "keep_checkpoints": 6}
    real, calls = loop.token_loss, 0

    def token_loss(model: Any, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = real(model, batch)
        if calls == 2:  # the second step's gradients, not its loss
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(loop, "token_loss", token_loss)
    _, records, whole = carry_out(folder, tmp_path / "whole", **fp16)
    calls = 0
    with pytest.raises(Interrupted, match="step 4"):
        carry_out(folder, tmp_path / "cut", stop_after=4, **fp16)
    _, _, resumed = carry_out(folder, tmp_path / "cut", "resume", **fp16)
    assert [record.step for record in records] == [1, 3, 4, 5, 6]

    def scales(run: str) -> list[tuple[float, int]]:
        files = sorted((tmp_path / run / "checkpoints").glob("*/state.json"))
        states = [json.loads(file.read_text())["state"] for file in files]
        return [(state["loss_scale"], state["finite_steps"]) for state in states]

    most, half = loss_scale.LARGEST, loss_scale.LARGEST / 2
    found = [(most, 1), (half, 0), (half, 1), (half, 2), (most, 0), (most, 1)]
    assert scales("whole") == scales("cut") == found
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_as_many_steps_may_be_skipped_as_the_recipe_allows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = {"on_non_finite": {"skip": 1}}
    with spoilt_loss(monkeypatch, {2}):
        outcome, records, tensors = carry_out(folder, tmp_path / "one", **allowed)
    assert [record.step for record in records] == [1, 3, 4, 5, 6]
    assert '{"step": 2, "skipped": true' in (tmp_path / "one" / "metrics.jsonl").read_text()
    assert outcome.steps == 6
    assert outcome.skipped == 1
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    with spoilt_loss(monkeypatch, {2, 4}), pytest.raises(RunFailed, match="step 4"):
        carry_out(folder, tmp_path / "two", **allowed)


def test_a_checkpoint_may_come_before_any_step_that_is_not_skipped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"on_non_finite": {"skip": 1}, "save_every": 1}
    with spoilt_loss(monkeypatch, {1, 2}), pytest.raises(RunFailed, match="step 2"):
        carry_out(folder, tmp_path / "run", **settings)
    outcome, _, tensors = carry_out(folder, tmp_path / "run", "resume", **settings)
    assert (outcome.steps, outcome.skipped) == (6, 1)
    with spoilt_loss(monkeypatch, {1}):
        _, _, whole = carry_out(folder, tmp_path / "whole", **settings)
    assert all(torch.equal(whole[name], tensors[name]) for name in whole)
    with spoilt_loss(monkeypatch, {1}), pytest.raises(RunFailed, match="changes nothing"):
        carry_out(folder, tmp_path / "nothing", max_steps=1, **settings)


def test_checkpoints_hold_adapters_that_can_be_used(folder: Path, tmp_path: Path) -> None:
    carry_out(folder, tmp_path / "run", save_every=2, keep_checkpoints=2)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names[-2:] == ["step-000004", "step-000006"]
    assert len(names) <= 3
    saved = adapters.read(tmp_path / "run" / "checkpoints" / "step-000004" / "adapter")
    assert saved.passport is not None
    assert saved.passport["steps"] == 4
    assert str(folder) not in (saved.folder / "lorakit.json").read_text()
