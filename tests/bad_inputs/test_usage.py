"""Command lines that are wrong, a folder in use, and what this machine lacks."""
# ruff: noqa: E501  # a table: one input a line
# a table: one input a line

import os
from collections.abc import Sequence

import pytest

from lorakit.storage.lock import locked
from tests.bad_inputs.cases import ADAPTER, RUN, Build, Case, World, check_refused


def given(*arguments: str) -> Build:
    return lambda _: arguments


def in_use(*more: str) -> Build:
    """A run holds the folder."""

    def build(world: World) -> Sequence[str]:
        world.held.enter_context(locked(world.path(RUN)))()
        return ["train", "recipe.yaml", *more]

    return build


def without_bitsandbytes(command: str) -> Build:
    def build(world: World) -> Sequence[str]:
        patch = world.held.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("lorakit.model.quantized.find_spec", lambda _: None)
        return [command, "recipe.yaml", "-s", "model.quantization=nf4", "-s", "output_dir=runs/new"]

    return build


def variables(command: Sequence[str], **values: str) -> Build:
    def build(world: World) -> Sequence[str]:
        patch = world.held.enter_context(pytest.MonkeyPatch.context())
        for name, value in values.items():
            patch.setenv(name, value)
        return command

    return build


def beside_fifo(*arguments: str) -> Build:
    """As root a device could be replaced like that: the test shall not risk one."""

    def build(world: World) -> Sequence[str]:
        os.mkfifo(world.path("fifo"))
        return arguments

    return build


START = ["train", "recipe.yaml", "--out", "runs/new"]
CASES = [
    *(Case(f"{name}={value}", variables(START, **{name: value}), (name, repr(value)), "", "usage")
      for name, value in (("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("RANK", "-1"), ("LOCAL_RANK", "1e3"))),
    Case("RANK beyond", variables(START, RANK="5"), ("process 5 of 1", "--nproc"), "", "usage"),
    Case("WORLD_SIZE alone", variables(START, WORLD_SIZE="2"), ("MASTER_ADDR", "--nproc"), "", "usage"),
    *(Case(f"{option} {to!r}", given("eval", "recipe.yaml", "-s", "data.eval=0.2", option, to), (said,), to or ".", "output.not-empty")
      for option in ("--junit", "--samples")
      for to, said in (("model", "is a folder"), ("", "is a folder"), ("rows.jsonl/x", "rows.jsonl is a file"))),
    *(Case(f"a FIFO for {command[0]}", beside_fifo(*command), ("is a FIFO",), "fifo", "output.not-empty")
      for command in (["eval", "recipe.yaml", "-s", "data.eval=0.2", "--junit", "fifo"],
                      ["merge", ADAPTER, "--base", "model", "--out", "fifo", "--overwrite"],
                      ["recipes", "copy", "quickstart", "fifo", "--force"])),
    Case("half of a surrogate pair in --out", given("train", "recipe.yaml", "--out", "m\udcff"),
         ("udcff",), "--set output_dir", "recipe.encoding"),
    *(Case(f"{command[0]} into {name!r}", given(*command, to), (said,), to.encode("unicode_escape").decode(), "security.path")
      for command in (["merge", ADAPTER, "--base", "model", "--out"], ["recipes", "copy", "quickstart"],
                      ["eval", "recipe.yaml", "-s", "data.eval=0.2", "--samples"])
      for name, to, said in (("escape", "a\x1b[31mb", "U+001B"), ("line", "a\nb", "U+000A"), ("long", "x" * 300, "255 bytes"))),
    Case("a merge into other files", given(*START, "-s", "merge.enabled=true", "-s", "merge.out=model"),
         ("merge.out: model: holds files that are no merge", "choose another folder with merge.out"),
         "--set merge.out", "output.not-empty"),
    Case("a thousand processes", given(*START, "--nproc", "1000"), ("--nproc 1000", "at most"), "", "usage"),
    Case("the cache of nobody", variables(["plan", "recipe.yaml"], LORAKIT_CACHE="~nobody-here/x"),
         ("~nobody-here/x", "LORAKIT_CACHE"), "", "usage"),
    Case("X01 option", given("plan", "recipe.yaml", "--offlin"), ("--offlin", "--offline")),
    Case("X01 command", given("trian", "recipe.yaml"), ("trian", "train")),
    Case("X01 subcommand", given("recipes", "lst"), ("lst", "list")),
    Case("X01 number", given("train", "recipe.yaml", "--max-steps", "two"), ("two", "--max-steps")),
    Case("X01 choice", given("merge", ADAPTER, "--out", "m", "--dtype", "bf61"), ("bf61", "bf16")),
    Case("X01 too much", given("plan", "recipe.yaml", "train.epochs=2"),
         ("train.epochs=2", "--set KEY=VALUE")),
    Case("X01 missing", given("merge", ADAPTER), ("--out",)),
    *(Case(f"X02 {' '.join(more) or 'start'}", in_use(*more),
           (RUN, "pid ", " on ", ", started 20"), f"{RUN}/.lock")
      for more in ((), ("--resume",), ("--resume-or-start",), ("--overwrite",))),
    Case("X05 plan", without_bitsandbytes("plan"), ("bitsandbytes", "model.quantization", "pip install"), "--set model.quantization"),
    Case("X05 device", given(*START, "-s", "train.optimizer=paged_adamw_8bit", "-s", "train.strict_optimizer=true"),
         ("paged_adamw_8bit", "no GPU"), "--set train.optimizer", "env.missing-device"),
    Case("X05 train", without_bitsandbytes("train"), ("bitsandbytes", "model.quantization", "pip install"), "--set model.quantization"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.name))
def test_refused(case: Case, world: World) -> None:
    check_refused(case, world)
