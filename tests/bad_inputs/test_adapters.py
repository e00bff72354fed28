"""Adapters that cannot be used: `merge` refuses each before it reads a weight of the base."""
# ruff: noqa: E501  # a table: one input a line

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bad_inputs.cases import ADAPTER, RUN, Case, World, check_refused
from tests.tiny import tiny_config, write_tiny_model

CONFIG, TENSORS, PASSPORT = "adapter_config.json", "adapter_model.safetensors", "lorakit.json"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MERGE = ["merge", ADAPTER, "--base", "model", "--out", "merged"]

Change = Callable[[dict[str, torch.Tensor]], object]


def merge(spoil: Callable[[World], object]) -> Callable[[World], Sequence[str]]:
    def build(world: World) -> Sequence[str]:
        spoil(world)
        return MERGE

    return build


def configured(**changes: Any) -> Callable[[World], Sequence[str]]:
    """Change PEFT's settings, as a stranger's folder has them: without a passport."""

    def spoil(world: World) -> None:
        world.path(f"{ADAPTER}/{PASSPORT}").unlink()
        world.change(f"{ADAPTER}/{CONFIG}", **changes)

    return merge(spoil)


def tensors(change: Change) -> Callable[[World], Sequence[str]]:
    def spoil(world: World) -> None:
        world.path(f"{ADAPTER}/{PASSPORT}").unlink()
        path = world.path(f"{ADAPTER}/{TENSORS}")
        found = load_file(path)
        change(found)
        path.unlink()
        save_file(found, path, {"format": "pt"})

    return merge(spoil)


def cut(size: int, *, passport: bool = False) -> Callable[[World], Sequence[str]]:
    """Keep so many bytes of the tensors; -1 is all but the last, +1 one more."""

    def spoil(world: World) -> None:
        path = world.path(f"{ADAPTER}/{TENSORS}")
        data = path.read_bytes()
        path.write_bytes(data + b"\0" if size == 1 else data[:size])
        if not passport:
            world.path(f"{ADAPTER}/{PASSPORT}").unlink()

    return merge(spoil)


def flipped(world: World) -> None:
    path = world.path(f"{ADAPTER}/{TENSORS}")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def pickled(world: World) -> None:
    path = world.path(f"{ADAPTER}/{TENSORS}")
    path.rename(path.with_name("adapter_model.bin"))


def other_base(**changes: Any) -> Callable[[World], object]:
    def spoil(world: World) -> None:
        shutil.rmtree(world.path("model"))
        write_tiny_model(world.path("model"), **changes)

    return spoil


def wider(world: World) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama", hidden_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(world.path("model"))


def without_passport(spoil: Callable[[World], object]) -> Callable[[World], object]:
    def both(world: World) -> None:
        world.path(f"{ADAPTER}/{PASSPORT}").unlink()
        spoil(world)

    return both


def misspell(found: dict[str, torch.Tensor]) -> None:
    for name in list(found):
        found[name.replace("q_proj", "q_prj").replace("v_proj", "v_prj")] = found.pop(name)


def named(**changes: Any) -> Callable[[World], Sequence[str]]:
    """Let nothing but PEFT's settings tell which base it is."""

    def build(world: World) -> Sequence[str]:
        world.path(f"{RUN}/resolved.yaml").unlink()
        configured(**changes)(world)
        return ["merge", ADAPTER, "--out", "merged"]

    return build


def link_away(world: World) -> None:
    path = world.path(f"{ADAPTER}/{TENSORS}")
    path.rename(world.path("away.safetensors"))
    path.symlink_to(world.path("away.safetensors"))


def link(name: str, to: str) -> Callable[[World], object]:
    return lambda world: world.path(name).symlink_to(to)


def given(
    *arguments: str, spoil: Callable[[World], object] = lambda _: None
) -> Callable[[World], Sequence[str]]:
    def build(world: World) -> Sequence[str]:
        spoil(world)
        return arguments

    return build


OUT = ["merge", ADAPTER, "--base", "model", "--out"]
ASK = ["generate", ADAPTER, "ask", "--base", "model"]
NOWHERE = "runs/absent"
CASES = [
    Case("A01", lambda _: ["merge", NOWHERE, "--out", "merged"], (), NOWHERE),
    Case("A02", merge(lambda w: w.path(f"{ADAPTER}/{CONFIG}").unlink()),
         (CONFIG, TENSORS, "tokenizer.json"), ADAPTER),
    Case("A03", merge(pickled), ("adapter_model.bin",), ADAPTER),
    Case("A04 missing", configured(peft_type=...), ("peft_type", "null", "IA3", "LORA"), CONFIG),
    Case("A04 EVIL", configured(peft_type="EVIL"), ("peft_type", '"EVIL"', "LORA"), CONFIG),
    Case("A04 no method", configured(peft_type="VERA"), ("peft_type", '"VERA"', "LORA"), CONFIG),
    Case("A04 beside a passport", merge(lambda w: w.change(f"{ADAPTER}/{CONFIG}", peft_type="VERA")),
         ("peft_type", '"VERA"', "LORA", '"lora"'), CONFIG),
    *(Case(f"A05 {r!r}", configured(r=r), ("r: ", "(4, 32)"), CONFIG)
      for r in (0, -1, "4", 10**9, True, 4.5, None, [4], ...)),
    Case("A06", configured(target_modules=r"([a-z._0-9]+)+!"), ("target_modules",), CONFIG),
    Case("A07 core", configured(megatron_core="os.path"), ("megatron_core",), CONFIG),
    Case("A07 mapping",
         configured(auto_mapping={"base_model_class": "X", "parent_library": "antigravity"}),
         ("auto_mapping",), CONFIG),
    Case("A08", tensors(lambda t: t.pop(A)), (A,), TENSORS),
    Case("A08 several", tensors(lambda t: [t.pop(n) for n in list(t) if "lora_A" in n]),
         (A, "4 are missing"), TENSORS),
    Case("A09", tensors(misspell), ("q_prj.lora_A.weight", "any of `model.layers.0.self_attn.q_proj`"), TENSORS),
    Case("A10 NaN", tensors(lambda t: t[A].view(-1)[3:5].fill_(float("nan"))), (A, " 2 "), TENSORS),
    Case("A10 Inf", tensors(lambda t: t[A].view(-1)[3:4].fill_(-float("inf"))), (A, " 1 "), TENSORS),
    Case("A11 I8", tensors(lambda t: t.update({A: t[A].to(torch.int8)})), (A, "is I8"), TENSORS),
    Case("A11 F64", tensors(lambda t: t.update({A: t[A].double()})), (A, "is F64"), TENSORS),
    Case("A11 F8", tensors(lambda t: t.update({A: t[A].to(torch.float8_e4m3fn)})), (A, "is F8_E4M3"), TENSORS),
    *(Case(f"A12 {size}{' passport' * whole}", cut(size, passport=whole),
           ("expected", "found"), TENSORS)
      for size in (0, 4, 8, 20, -1, 1) for whole in (False, True)),
    Case("A13", merge(flipped), ("expected sha256", "found"), TENSORS),
    Case("A14 fingerprint", merge(other_base(seed=9)), ("fingerprint", "the base model is"), PASSPORT),
    Case("A14 hidden size", merge(wider), ("hidden size 32, the base has 64",), PASSPORT),
    Case("A14 shapes", merge(without_passport(wider)), ("hidden size 32, the base has 64",), TENSORS),
    *(Case(f"alpha {alpha!r:.12}", configured(lora_alpha=alpha), ("lora_alpha", "of fp32"), CONFIG,
           "adapter.bad-setting") for alpha in (10**400, 1e300, "16", True, None)),
    *(Case(f"{key} {value!r}", configured(**{key: value}), (f"{key}: ", said), CONFIG, "adapter.bad-setting")
      for key, value, said in (("lora_alpha", 0, "expected a number greater than 0, found 0"),
                               ("lora_dropout", 5, "expected a number in [0, 0.99], found 5"),
                               ("alpha_pattern", {"q_proj": -1}, "q_proj: expected a number greater than 0"))),
    *(Case(f"--out inside {name}", given(*OUT, f"{to}/m"), (f"lies in {name}",), f"{to}/m", "output.is-input")
      for name, to in (("adapter", ADAPTER), ("model", "model"))),
    *(Case(f"{flag} {value!r}", configured(**{flag: value}), (flag, "true or false"), CONFIG,
           "adapter.bad-setting")
      for flag, value in {"use_rslora": 1, "fan_in_fan_out": "no"}.items()),
    Case("fifty slow expressions",
         configured(rank_pattern={f"([a-z._0-9]+)+!{n}": 4 for n in range(50)}),
         ("rank_pattern", "and 49 more", "1 second"), CONFIG, "adapter.bad-pattern"),
    Case("a number in the passport", merge(lambda w: w.write(f"{ADAPTER}/{PASSPORT}", '{"format": NaN}')),
         ("format: NaN",), f"{PASSPORT}:1:12", "adapter.bad-setting"),
    Case("tensors behind a link", merge(link_away), (TENSORS, "symbolic link"), ADAPTER, "security.path"),
    Case("a FIFO for settings", merge(lambda w: (w.path(f"{ADAPTER}/{CONFIG}").unlink(), os.mkfifo(w.path(f"{ADAPTER}/{CONFIG}")))),
         (CONFIG, "FIFO"), ADAPTER, "security.path"),
    Case("another tool's pickle", merge(lambda w: w.path(f"{ADAPTER}/{TENSORS}").rename(w.path(f"{ADAPTER}/pytorch_model.bin"))),
         ("pytorch_model.bin",), ADAPTER, "security.pickle"),
    *(Case(f"a name of {len(name):,} characters, {command}", given(*words), ("no such folder",), name if len(name) == 300 else "x…", "adapter.not-found")
      for name in ("x" * 300, "x/" * 3000)
      for command, words in {"merge": ["merge", name, "--out", "m"], "generate": ["generate", name, "ask"]}.items()),
    Case("to eval a name of 300 characters", given("eval", "recipe.yaml", "--adapter", "x" * 300, "-s", "data.eval=0.2"),
         ("no adapter",), "x" * 300, "adapter.not-found"),
    *(Case(f"a base that is {value!r:.12}", named(base_model_name_or_path=value),
           ("base_model_name_or_path", "a text or null"), CONFIG, "adapter.bad-setting")
      for value in (5, ["x"], {"a": 1})),
    *(Case(f"--base {name!r:.20}", given("merge", ADAPTER, "--out", "m", "--base", name), (), place, "model.not-found")
      for name, place in (("", ADAPTER), ("  ", ADAPTER), ("m\udcff", ADAPTER), ("x" * 300, "x" * 300), ("./absent", "./absent"),
                          ("absent", "absent"), ("/dev/zero", "/dev/zero"),
                          ("~nobody-of-that-name/x", "~nobody-of-that-name/x"))),
    Case("--out below a file", given(*OUT, "rows.jsonl/x"), ("rows.jsonl is a file",), "rows.jsonl/x", "output.not-empty"),
    Case("--out is a file", given(*OUT, "rows.jsonl", "--overwrite"), ("is a file",), "rows.jsonl", "output.not-empty"),
    Case("--out is a link", given(*OUT, "link", spoil=link("link", "nowhere")), ("symbolic link",), "link", "security.path"),
    *(Case(f"--scale {scale}", given(*OUT, "m", f"--scale={scale}"), ("--scale", "1 is all of it"), "", "usage")
      for scale in ("nan", "inf", "1e308", "-1e7")),
    *(Case(f"{option} {value}", given(*ASK, option, value), (option,), "", "usage")
      for option, value in (("--seed", str(2**70)), ("--temperature", "inf"), ("--temperature", "nan"))),
    Case("lengths missing", configured(use_dora=True), ("lora_magnitude_vector", "missing"), TENSORS,
         "adapter.missing-tensor"),
    Case("copies missing", configured(modules_to_save=["lm_head"]), ("lm_head", "missing"), TENSORS,
         "adapter.missing-tensor"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.name))
def test_refused(case: Case, world: World) -> None:
    check_refused(case, world)
