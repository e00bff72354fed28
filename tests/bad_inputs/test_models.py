"""Model folders that cannot be used: `plan` refuses each before it reads a weight."""
# ruff: noqa: E501  # a table: one input a line

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.bad_inputs.cases import ADAPTER, Case, World, check_refused, run
from tests.tiny import VOCABULARY, tiny_tokenizer, write_tiny_model

INDEX = "model/model.safetensors.index.json"
WEIGHTS = "model/model.safetensors"
NORM = "model.norm.weight"
PLAN = ["plan", "recipe.yaml"]

Spoil = Callable[[World], object]


def plan(spoil: Spoil) -> Callable[[World], Sequence[str]]:
    def build(world: World) -> Sequence[str]:
        spoil(world)
        return PLAN

    return build


def recipe(model: str) -> Callable[[World], Sequence[str]]:
    return plan(lambda world: world.write("recipe.yaml", f"{model}\ndata: {{train: rows.jsonl}}\n"))


def config(**changes: Any) -> Callable[[World], Sequence[str]]:
    return plan(lambda world: world.change("model/config.json", **changes))


def sharded(world: World) -> dict[str, str]:
    """Write the model in two files; return the index's map."""
    world.path(WEIGHTS).unlink()
    write_tiny_model(world.path("model"), shards=2)
    found: dict[str, str] = json.loads(world.path(INDEX).read_text())["weight_map"]
    assert len(set(found.values())) > 1
    return found


def mapped(entry: str, make: Spoil = lambda _: None) -> Callable[[World], Sequence[str]]:
    """Let the index say that the norm is in this file."""

    def spoil(world: World) -> None:
        placed = sharded(world)
        world.write(INDEX, json.dumps({"metadata": {}, "weight_map": {**placed, NORM: entry}}))
        make(world)

    return plan(spoil)


def secret(world: World) -> None:
    world.path("secret").mkdir()
    save_file({NORM: torch.ones(32)}, world.path("secret/other.safetensors"))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(world: World) -> None:
        found = load_file(world.path(WEIGHTS))
        change(found)
        world.path(WEIGHTS).unlink()
        save_file(found, world.path(WEIGHTS), {"format": "pt"})

    return spoil


def train(spoil: Spoil) -> Callable[[World], Sequence[str]]:
    """Values are read by a run alone; it comes to no step and leaves no folder."""

    def build(world: World) -> Sequence[str]:
        spoil(world)
        return ["train", "recipe.yaml", "--out", "runs/new"]

    return build


def cut(world: World) -> None:
    data = world.path(WEIGHTS).read_bytes()
    world.path(WEIGHTS).write_bytes(data[:-10])


def eight_bits(name: str) -> Spoil:
    """Write the norm in a dtype of the format's that is none of lorakit's."""

    def spoil(world: World) -> None:
        found = load_file(world.path(name))
        found[NORM] = found[NORM].to(torch.float8_e4m3fn)
        world.path(name).unlink()
        save_file(found, world.path(name), {"format": "pt"})

    return spoil


def more_tokens(world: World) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{n}>" for n in range(VOCABULARY + 1 - len(tokenizer))])
    tokenizer.save_pretrained(world.path("model"))


def family(**values: Any) -> Callable[[World], Sequence[str]]:
    """Say that the files are a model of another family."""
    return plan(
        lambda world: world.write("model/config.json", json.dumps({"vocab_size": 320, **values}))
    )


def tokenizer(**changes: Any) -> Spoil:
    return lambda world: world.change("model/tokenizer.json", **changes)


def only_words(world: World) -> None:
    """A vocabulary that lacks the rows' words, and what stands for unknown ones."""
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    nothing = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    tokenizer(model=model, added_tokens=[], **nothing)(world)


def fifo(name: str) -> Spoil:
    def spoil(world: World) -> None:
        world.path(f"model/{name}").unlink(missing_ok=True)
        os.mkfifo(world.path(f"model/{name}"))

    return spoil


def only_index(text: str) -> Spoil:
    def spoil(world: World) -> None:
        world.path(WEIGHTS).unlink()
        world.write(INDEX, text)

    return spoil


def template(text: str) -> Callable[[World], Sequence[str]]:
    return plan(lambda world: world.write("model/chat_template.jinja", text))


def flipped_merge(world: World) -> Sequence[str]:
    """Change one bit of a merge's weights, whose digest its report has."""
    assert run(["merge", ADAPTER, "--base", "model", "--out", "merged"]).exit == 0
    path = world.path("merged/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    return ["train", "recipe.yaml", "-s", "model=merged", "--out", "runs/new"]


def setting_template(value: Any) -> Spoil:
    """Let the tokenizer's settings hold the template, instead of a file of its own."""

    def spoil(world: World) -> None:
        world.path("model/chat_template.jinja").unlink()
        world.change("model/tokenizer_config.json", chat_template=value)

    return spoil


CASES = [
    Case("M01 folder", recipe("model: ./absent"), ("folder ./absent",), "recipe.yaml:1:8"),
    Case("M01 below a folder", recipe("model: model/absent"), ("folder model/absent",),
         "recipe.yaml:1:8"),
    Case("M01 absolute", recipe("model: /nowhere/absent"), ("folder /nowhere/absent",),
         "recipe.yaml:1:8"),
    Case("M01 .gguf", recipe("model: absent.gguf"), ("file absent.gguf",), "recipe.yaml:1:8"),
    Case("M01 config.json", plan(lambda w: w.path("model/config.json").unlink()), ("model",),
         "model"),
    Case("M02", config(model_type="lllama"), ("model_type 'lllama'", transformers.__version__),
         "model/config.json"),
    Case("M03", config(model_type="own", auto_map={"AutoModelForCausalLM": "code.Own"}),
         ("code.py",), "model/config.json"),
    Case("M04", config(attn_implementation="evil/kernel"),
         ('attn_implementation: "evil/kernel"', "eager", "sdpa"), "model/config.json"),
    Case("M05", mapped("../secret/other.safetensors", secret), ("../secret/other.safetensors",),
         INDEX),
    Case("M06 .bin", mapped("pytorch_model.bin"), ("pytorch_model.bin",), INDEX),
    Case("M06 name", mapped("hostname"), ("'hostname'",), INDEX),
    Case("a system file", mapped("/etc/hostname"), ("'/etc/hostname'", ".safetensors"), INDEX,
         "security.path"),
    Case("a FIFO for a shard",
         mapped("fifo.safetensors", lambda w: os.mkfifo(w.path("model/fifo.safetensors"))),
         ("fifo.safetensors", "FIFO"), "model", "security.path"),
    Case("M07", plan(cut), ("expected", "bytes, found"), WEIGHTS),
    Case("M07 bit", flipped_merge, ("sha256", "checksum"), "merged/model.safetensors"),
    Case("M08", plan(tensors(lambda t: t.pop(NORM))), (NORM,), "model"),
    Case("M09", train(tensors(lambda t: t[NORM].view(-1)[2:5].fill_(float("nan")))),
         (NORM, " 3 "), "model"),
    Case("M10", plan(more_tokens), ("321 tokens", "320 rows"), "model"),
    Case("no tokenizer", plan(lambda w: w.path("model/tokenizer.json").unlink()),
         ("tokenizer.json",), "model", "tokenizer.missing"),
    Case("a cut tokenizer", plan(lambda w: w.write("model/tokenizer.json", '{"version": "1.0"')),
         ("tokenizer",), "model", "tokenizer.missing"),
    *(Case(f"a number in {name}", plan(lambda w, name=name: w.write(f"model/{name}", '{"x": NaN}')),
           ("x: NaN",), f"model/{name}:1:7", "model.bad-config")
      for name in ("config.json", "generation_config.json")),
    *(Case(f"{layers!r} layers", config(num_hidden_layers=layers), ("num_hidden_layers", "1024"),
           "model" if layers < 1 else "model/config.json", "model.bad-config") for layers in (0, -1, 1025, 4096, 10**9)),
    *(Case(f"the end of text is {ids!r} in {name}",
           plan(lambda w, name=name, ids=ids: w.change(f"model/{name}", eos_token_id=ids)),
           ("eos_token_id", "vocabulary has 320"), f"model/{name}", "model.bad-config")
      for name in ("config.json", "generation_config.json") for ids in (10**9, [2, 320], -1)),
    *(Case(f"{size} positions", config(max_position_embeddings=size), ("max_position_embeddings", str(size), "at least 1"),
           "model", "model.bad-config") for size in (0, -256)),
    Case("true layers", config(num_hidden_layers=True), ("num_hidden_layers",), "model/config.json", "model.bad-config"),
    Case("1000 layers", config(num_hidden_layers=1000), ("missing",), "model/config.json", "model.missing-tensor"),
    *(Case(f"10^6 layers of {values['model_type']}", family(**values), ("1000000", "at most 1024"),
           "model/config.json", "model.bad-config")
      for values in ({"model_type": "bart", "is_decoder": True, "decoder_layers": 10**6},
                     {"model_type": "gpt2", "n_layer": 10**6},
                     {"model_type": "llama4", "text_config": {"num_hidden_layers": 10**6}})),
    Case("two text models", family(model_type="musicgen"), ("text configs",), "model/config.json", "model.bad-config"),
    Case("an unknown rotation", config(rope_parameters={"rope_type": "evil"}), ("KeyError: 'evil'",),
         "model/config.json", "model.bad-config"),
    *(Case(f"nothing but an index: {text}", plan(only_index(text)), (), INDEX, "model.bad-index")
      for text in ("", "[]", '{"weight_map": 5}')),
    *(Case(f"a bare name, {command}", lambda _, command=command: [*command, "--offline"],
           ("no folder absent", "org/name"), place, "model.not-found")
      for place, command in (("--set model", ["plan", "recipe.yaml", "-s", "model=absent"]),
                             ("absent", ["merge", "runs/recipe/adapter", "--base", "absent", "--out", "m"]))),
    *(Case(f"a tokenizer that panics: {name}", plan(tokenizer(**{part: content})), ("tokenizer cannot be read",),
           "model", "tokenizer.missing")
      for name, part, content in (
          ("charsmap", "normalizer", {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}),
          ("replace", "normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
          ("length", "pre_tokenizer", {"type": "FixedLength", "length": 0}),
          ("strip", "decoder", {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}))),
    Case("a tokenizer that bloats",
         plan(tokenizer(normalizer={"type": "Sequence", "normalizers":
                        [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 3})),
         ("1e+09 times longer",), "model", "tokenizer.missing"),
    Case("a tokenizer with a long beginning",
         plan(tokenizer(normalizer={"type": "Prepend", "prepend": "x" * 10**6})),
         ("1e+06 times longer",), "model", "tokenizer.missing"),
    *(Case(f"weights of {dtype}", plan(tensors(lambda t, dtype=dtype: t.update({NORM: t[NORM].to(dtype)}))),
           (NORM, str(dtype)), "model", "model.shape-mismatch")
      for dtype in (torch.int64, torch.bool, torch.uint8)),
    *(Case(f"nothing but {name}", plan(lambda w, name=name: w.path(WEIGHTS).rename(w.path(f"model/{name}"))),
           (name,), "model", "model.not-found") for name in ("model.gguf", "tf_model.h5")),
    Case("a shard of a name too long", mapped("x" * 300 + ".safetensors"), ("longer than",), "model", "security.path"),
    Case("a tokenizer without words", plan(only_words), ("cannot take a text",), "model", "tokenizer.missing"),
    *(Case(f"a FIFO for {name}", plan(fifo(name)), (name, "FIFO"), "model", "security.path")
      for name in ("tokenizer_config.json", "special_tokens_map.json", "merges.txt", "chat_template.jinja")),
    Case("a tokenizer's file outside",
         plan(lambda w: w.change("model/tokenizer_config.json", fast_tokenizer_files=["../tokenizer.1.0.json"])),
         ("../tokenizer.1.0.json", "outside"), "model", "security.path"),
    *(Case(f"a template that is {found!r}",
           plan(setting_template(found)),
           ("no text", "found 5"), "model", "template.syntax")
      for found in (5, {"default": 5})),
    Case("templates for tools alone",
         plan(setting_template([{"name": "tool_use", "template": "{{ messages }}"}])),
         ("tool_use", "data.chat_template"), "rows.jsonl:1", "template.missing"),
    Case("weights in 8 bits", plan(eight_bits(WEIGHTS)), (NORM, "F8_E4M3", "F32, F16 or BF16"), WEIGHTS,
         "model.shape-mismatch"),
    Case("M11", template("{{ cycler.__init__.__globals__.os.system('id') }}"), (), "rows.jsonl:1"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.name))
def test_refused(case: Case, world: World) -> None:
    check_refused(case, world)


def test_what_the_tokenizers_library_writes_itself_is_not_seen(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0})(world)
    assert run(PLAN).document["error"]["id"] == "tokenizer.missing"
    assert "panicked" not in capfd.readouterr().err
