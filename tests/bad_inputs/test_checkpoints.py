"""Checkpoints that a run cannot go on from, and those that it can: with a warning."""
# ruff: noqa: E501  # a table: one input a line

import json
import os
import shutil
from collections.abc import Callable, Sequence

import pytest

from lorakit.runtime import Runtime
from lorakit.training import passports
from tests.bad_inputs.cases import (
    ROWS,
    RUN,
    Case,
    World,
    check_refused,
    is_said,
    run,
    shown_without_json,
    tree,
)
from tests.tiny import write_tiny_model

STEPS = f"{RUN}/checkpoints"
NEWEST, BEFORE = f"{STEPS}/step-000006", f"{STEPS}/step-000004"
RESUME = ["train", "recipe.yaml", "--resume"]

Spoil = Callable[[World], object]


def resume(spoil: Spoil, *more: str) -> Callable[[World], Sequence[str]]:
    def build(world: World) -> Sequence[str]:
        spoil(world)
        return [*RESUME, *more]

    return build


def flip(name: str) -> Spoil:
    """Change one bit in the middle of a file."""

    def spoil(world: World) -> None:
        data = bytearray(world.path(name).read_bytes())
        data[len(data) // 2] ^= 1
        world.write(name, bytes(data))

    return spoil


def unlink(name: str) -> Spoil:
    return lambda world: world.path(name).unlink()


def all_damaged(world: World) -> None:
    flip(f"{NEWEST}/optimizer.safetensors")(world)
    unlink(f"{BEFORE}/manifest.json")(world)


def another_version(world: World) -> Sequence[str]:
    patch = world.held.enter_context(pytest.MonkeyPatch.context())
    patch.setattr("lorakit.training.passports.versions", lambda _: {"torch": "2.99.0"})
    return RESUME


def more_threads(world: World) -> Sequence[str]:
    patch = world.held.enter_context(pytest.MonkeyPatch.context())
    # Not torch's own count, which is set again where threads have shared out work.
    patch.setattr(Runtime, "describe", lambda _: "cpu (AVX512, 64 threads)")
    return RESUME


def more_processes(world: World) -> Sequence[str]:
    patch = world.held.enter_context(pytest.MonkeyPatch.context())
    now = passports.pinned
    patch.setattr(passports, "pinned", lambda *given: now(*given) | {"processes": 2})
    return RESUME


def another_tokenizer(world: World) -> None:
    values = json.loads(world.path("model/tokenizer_config.json").read_text())
    world.change("model/tokenizer_config.json", model_max_length=values["model_max_length"] - 1)


def another_base(world: World) -> None:
    write_tiny_model(world.path("model"), seed=9)


def another_template(world: World) -> None:
    path = world.path("model/chat_template.jinja")
    path.write_text(path.read_text() + "{# as it was #}")


def another_eval(world: World) -> Sequence[str]:
    world.write("eval.jsonl", world.path("rows.jsonl").read_bytes())
    command = ["train", "recipe.yaml", "-s", "data.eval=eval.jsonl", "--out", "runs/new"]
    assert run(command).exit == 0
    world.write("eval.jsonl", world.path("rows.jsonl").read_bytes() + b"\n")
    return [*command, "--resume"]


def noted(**changes: object) -> Callable[[World], Sequence[str]]:
    return resume(lambda world: world.change(f"{RUN}/run.json", **changes))


def instead(name: str, mode: str) -> Callable[[World], Sequence[str]]:
    """Put a directory in the place of a run's file, and a file in that of its directory."""

    def build(world: World) -> Sequence[str]:
        path = world.path(f"{RUN}/{name}")
        if path.is_dir():
            shutil.rmtree(path)
            path.write_text("")
        else:
            path.unlink(missing_ok=True)
            path.mkdir()
        return ["train", "recipe.yaml", mode]

    return build


CASES = [
    *(Case(f"run.json without {key}: {value!r:.9}", noted(**{key: value}), (key, "no run wrote"), "run.json",
           "checkpoint.damaged")
      for key, values in {"micro_batch_limit": (..., "x", None, 0, 1.5, True),
                          "recomputed_layers": (..., -1), "resumes": ("x", None)}.items()
      for value in values),
    *(Case(f"{key} with --allow-inexact", resume(lambda _: None, "--allow-inexact", "-s", f"{key}={value}"),
           (f"recipe.{key}", "a run of its own"), NEWEST, "checkpoint.changed")
      for key, value in (("adapter.rank", 8), ("adapter.method", "rslora"), ("train.optimizer", "sgd"))),
    *(Case(f"a link for {name}", resume(lambda w, name=name: (w.path(f"{RUN}/{name}").unlink(missing_ok=True),
                                        w.path(f"{RUN}/{name}").symlink_to("nowhere"))),
           ("symbolic link",), name, "security.path")
      for name in ("run.json", "plan.json", "metrics.jsonl")),
    *(Case(f"a {kind} for {name}, {mode}", instead(name, mode), (f"is a {kind}",), f"{RUN}/{name}", "output.not-empty")
      for name, kind in ((".lock", "directory"), ("log.txt", "directory"), ("checkpoints", "file"), ("adapter", "file"))
      for mode in ("--resume-or-start", "--overwrite")),
    Case("C01 no run", lambda _: [*RESUME, "--out", "runs/new"], (), "runs/new"),
    Case("C01 no checkpoint", resume(lambda w: shutil.rmtree(w.path(STEPS))), (), RUN),
    Case("C01 an empty folder",
         resume(lambda w: w.path("runs/new").mkdir(), "--out", "runs/new"), (), "runs/new"),
    Case("C03", resume(all_damaged), ("step 6: checksum optimizer.safetensors",
         "step 4: no manifest"), STEPS),
    Case("C04 rank", resume(lambda _: None, "-s", "adapter.rank=8"),
         ("recipe.adapter.rank", "was 4 and is 8"), NEWEST),
    Case("C04 rate", resume(lambda _: None, "-s", "train.learning_rate=1e-2"),
         ("recipe.train.learning_rate", "was 0.001 and is 0.01"), NEWEST),
    Case("C04 data", resume(lambda w: w.write("rows.jsonl", w.path("rows.jsonl").read_text()[:-1])),
         ("data ",), NEWEST, prepares=True),
    Case("C05 version", another_version, ("torch", "2.99.0"), NEWEST),
    Case("C05 threads", more_threads, ("threads", "64"), NEWEST),
    Case("C05 processes", more_processes, ("processes was 1 and is 2",), NEWEST),
    *(Case(f"another {name}", resume(spoil, *more), (f"{name} was", "is "), NEWEST, "checkpoint.changed", prepares=True)
      for name, spoil, more in (("tokenizer", another_tokenizer, ()),
                                ("base", another_base, ()),
                                ("template", another_template, ()),
                                ("recipe.data.eval", lambda w: w.write("eval.jsonl", w.path("rows.jsonl").read_text()),
                                 ("-s", "data.eval=eval.jsonl")))),
    Case("another eval file", another_eval, ("data eval.jsonl was",), "step-000006", "checkpoint.changed", prepares=True),
    Case("C07 pickle", resume(lambda w: w.write(f"{NEWEST}/optimizer.pt", b"\x80")),
         ("optimizer.pt", "runs code"), NEWEST),
    Case("C07 in the adapter", resume(lambda w: w.write(f"{NEWEST}/adapter/adapter_model.bin", b"")),
         ("adapter/adapter_model.bin",), NEWEST),
    Case("a link in a checkpoint",
         resume(lambda w: os.symlink("/etc/hostname", w.path(f"{NEWEST}/notes.txt"))),
         ("notes.txt", "symbolic link"), NEWEST, "security.path"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.name))
def test_refused(case: Case, world: World) -> None:
    check_refused(case, world)


SKIPPED = {
    "C02": (unlink(f"{NEWEST}/manifest.json"), "no manifest"),
    "C06 optimizer": (unlink(f"{NEWEST}/optimizer.safetensors"), "missing optimizer.safetensors"),
    "C06 state": (unlink(f"{NEWEST}/state.json"), "missing state.json"),
    "C06 adapter": (
        unlink(f"{NEWEST}/adapter/adapter_model.safetensors"),
        "missing adapter/adapter_model.safetensors",
    ),
    "a flipped bit": (flip(f"{NEWEST}/state.json"), "checksum state.json"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_an_older_one_is_taken_with_a_warning(name: str, world: World) -> None:
    spoil, reason = SKIPPED[name]
    spoil(world)
    ended = run(RESUME)
    assert ended.exit == 0, ended.stderr
    (warning,) = ended.document["warnings"]
    assert warning["id"] == "checkpoint.skipped"
    for part in (f"skipped step 6: {reason}", "resuming from step 4"):
        assert part in warning["message"]
    row = ROWS.get(name.split()[0])
    assert all(is_said(one, warning["message"]) for (one,) in (row.parts if row else ()))
    assert ended.document["steps"] == 6


ODD_ROWS = (
    '[1]\n5\n{"loss": 1}\n{"step": "x"}\n{"step": null}\n{\n\n{"step": 2}\n{"step": 7}\n{"ste'
)


def test_rows_that_no_run_wrote_are_left_out_of_the_metrics(world: World) -> None:
    world.change(f"{RUN}/run.json", status="interrupted")
    metrics = world.write(f"{RUN}/metrics.jsonl", ODD_ROWS)
    assert run(RESUME).exit == 0
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert rows[:2] == [{"step": 2}, {"step": 7, "superseded": True}]


@pytest.mark.parametrize("name", ["step-0000008", "step-٠٠٠٠٠٨", "step-000008.bak", "best"])
def test_a_folder_of_another_name_is_no_checkpoint(name: str, world: World) -> None:
    shutil.copytree(world.path(NEWEST), world.path(f"{STEPS}/{name}"))
    ended = run(RESUME)
    assert (ended.exit, ended.document["warnings"]) == (0, [])


def test_resume_or_start_says_which_of_the_two_it_did(world: World) -> None:
    command = ["train", "recipe.yaml", "--resume-or-start", "--out", "runs/new"]
    for told in ("starts: there is no checkpoint", "resuming from step 6"):
        ended = run(command)
        assert ended.exit == 0
        assert told in ended.stderr
        world.change("runs/new/run.json", status="interrupted")


@pytest.mark.parametrize("mode", ["--resume", "--resume-or-start"])
def test_a_finished_run_is_left_as_it_is_with_its_figures(mode: str, world: World) -> None:
    before = tree(world.folder)
    facts = json.loads(world.path(f"{RUN}/run.json").read_text())
    command = ["train", "recipe.yaml", mode]
    ended = run(command)
    assert ended.exit == 0, ended.stderr
    for figure in ("tokens", "tokens_per_second", "wall_seconds", "final_loss"):
        assert ended.document[figure] == facts[figure] > 0
    shown, _ = shown_without_json(command)
    assert "already finished (6 of 6 steps); nothing to do" in shown
    assert tree(world.folder) == before


def test_a_finished_run_is_merged_where_that_is_asked_for_later(world: World) -> None:
    command = [*RESUME, "--set", "merge.enabled=true"]
    for told in (("Merged", "Trained   6 steps", "s training, "), ("Merged", "nothing to do")):
        shown, _ = shown_without_json(command)
        assert all(one in shown for one in told), shown
    assert world.path(f"{RUN}/merged/model.safetensors").is_file()
