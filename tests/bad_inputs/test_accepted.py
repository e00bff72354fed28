"""What looks odd and is right: the guard against reading too strictly."""
# a table: one input a line

import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bad_inputs.cases import ADAPTER, World, run

PLAN = ["plan", "recipe.yaml"]
MERGE = ["merge", ADAPTER, "--base", "model", "--out", "merged"]
BOM = b"\xef\xbb\xbf"


def recipe(change: Callable[[bytes], bytes]) -> Callable[[World], list[str]]:
    def build(world: World) -> list[str]:
        world.write("recipe.yaml", change(world.path("recipe.yaml").read_bytes()))
        return PLAN

    return build


def rows(change: Callable[[bytes], bytes]) -> Callable[[World], list[str]]:
    def build(world: World) -> list[str]:
        world.write("rows.jsonl", change(world.path("rows.jsonl").read_bytes()))
        return PLAN

    return build


def extra_field(data: bytes) -> bytes:
    found = [json.loads(line) | {"source": "me"} for line in data.splitlines()]
    return b"".join(json.dumps(row).encode() + b"\n" for row in found)


def settings_with_bom(world: World) -> list[str]:
    path = world.path(f"{ADAPTER}/adapter_config.json")
    path.write_bytes(BOM + path.read_bytes())
    return MERGE


def narrow(dtype: torch.dtype) -> Callable[[World], list[str]]:
    def build(world: World) -> list[str]:
        world.path(f"{ADAPTER}/lorakit.json").unlink()
        path = world.path(f"{ADAPTER}/adapter_model.safetensors")
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        path.unlink()
        save_file(tensors, path)
        base = world.path("model/model.safetensors")
        weights = {name: tensor.bfloat16() for name, tensor in load_file(base).items()}
        base.unlink()
        save_file(weights, base)
        return MERGE

    return build


def snapshot(world: World) -> list[str]:
    """Lay model and adapter out as the hub's library keeps them: links into a folder of blobs."""
    for name, folder in (("models--a--base", "model"), ("models--a--lora", ADAPTER)):
        cache, snapshot = world.path(name), world.path(f"{name}/snapshots/5f3c")
        snapshot.mkdir(parents=True)
        (cache / "blobs").mkdir()
        for number, path in enumerate(sorted(world.path(folder).iterdir())):
            path.rename(cache / "blobs" / str(number))
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    base, adapter = (f"models--a--{name}/snapshots/5f3c" for name in ("base", "lora"))
    return ["merge", adapter, "--base", base, "--out", "merged"]


def many_expressions(world: World) -> list[str]:
    world.path(f"{ADAPTER}/lorakit.json").unlink()
    world.change(
        f"{ADAPTER}/adapter_config.json", rank_pattern={f".*[.]x{n}": 4 for n in range(500)}
    )
    return MERGE


def odd_names(world: World) -> list[str]:
    world.path("model").rename(world.path("ein Modell ü"))
    world.path("rows.jsonl").rename(world.path("Zeilen 行.jsonl"))
    world.write(
        "-x y.yaml", "model: ein Modell ü\ndata: {train: Zeilen 行.jsonl, max_length: 64}\n"
    )
    return ["plan", "--", "-x y.yaml"]


RATE = b"learning_rate: 1e-3"
ACCEPTED = {
    "OK01": recipe(lambda text: text.replace(RATE, b"learning_rate: 1e-4")),
    "OK02": recipe(lambda text: text.replace(RATE, b"learning_rate: 1.0E-04")),
    "OK03": recipe(lambda text: BOM + text),
    "OK04": recipe(lambda text: text.replace(b"\n", b"\r\n")),
    "OK05": rows(lambda data: BOM + data),
    "OK06": rows(lambda data: data.replace(b"\n", b"\r\n")),
    "OK07": rows(lambda data: data.removesuffix(b"\n")),
    "OK08": rows(lambda data: data + b"\n"),
    "OK09": rows(extra_field),
    "OK10": settings_with_bom,
    "OK11 F32": narrow(torch.float32),
    "OK11 F16": narrow(torch.float16),
    "OK11 BF16": narrow(torch.bfloat16),
    "snapshots of the hub": snapshot,
    "expressions OK11": many_expressions,
    "OK12": odd_names,
    "R23": recipe(lambda text: text.replace(b"model: model",
                                            b"model: {path: model, trust_remote_code: true}")),
}  # fmt: skip
# What the plan must say of it, and the warnings that belong to it.
SAYS = {"OK01": "cosine 0.0001 ", "OK02": "cosine 0.0001 "}
WARNED = {
    "OK09": ("data.extra-fields", "source", "20 rows"),
    "OK11": ("adapter.base-unknown", "model"),
    "R23": ("security.remote-code", "trust_remote_code", "--allow-remote-code", "no effect"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str, world: World) -> None:
    id = name.split()[-1] if name.startswith("expressions") else name.split()[0]
    arguments = ACCEPTED[name](world)
    ended = run(arguments)
    assert ended.exit == 0, ended.stderr
    if arguments[0] == "plan":
        assert ended.document["rows"] == 20
    expected, *parts = WARNED.get(id, ("",))
    told = [one["message"] for one in ended.document["warnings"] if one["id"] == expected]
    assert len(told) == bool(expected)
    assert all(part in told[0] for part in parts)
    assert {one["id"] for one in ended.document["warnings"]} <= {expected, "adapter.no-passport"}


@pytest.mark.parametrize("name", SAYS)
def test_numbers_are_read_as_numbers(name: str, world: World) -> None:
    from typer.testing import CliRunner

    from lorakit.cli.app import app

    shown = CliRunner().invoke(app, ACCEPTED[name](world)).stdout
    assert SAYS[name] in shown


def test_lines_stay_right_behind_carriage_returns(world: World) -> None:
    text = world.path("recipe.yaml").read_text() + "sead: 1\n"
    places = []
    for written in (text, text.replace("\n", "\r\n")):
        world.write("recipe.yaml", written)
        error = run(PLAN).document["error"]
        places.append((error["id"], error["line"], error["column"]))
    assert places[0] == places[1] == ("recipe.unknown-key", len(text.splitlines()), 1)


def test_strict_makes_the_warning_about_remote_code_an_error(world: World) -> None:
    ACCEPTED["R23"](world)
    ended = run([*PLAN, "--strict"])
    assert ended.exit == 2
    assert ended.document["error"]["id"] == "usage.strict"


def test_no_file_of_a_run_holds_a_secret(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"HF_TOKEN": "hf_" + "Q" * 34, "MY_API_KEY": "correct-horse-battery"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    text = "a sk-learn-like-questions-set, and the bearer of-a-crown-of-thorns"
    for arguments in (
        ["train", "recipe.yaml", "--out", "runs/new", "-s", f"data.system={text}"],
        ["merge", "runs/new/adapter", "--base", "model", "--out", "merged"],
    ):
        extra = (
            ["-s", "data.chat_template=plain", "-s", "data.max_length=128"]
            if arguments[0] == "train"
            else []
        )
        assert run([*arguments, *extra]).exit == 0, arguments
    files = [path for path in world.folder.rglob("*") if path.is_file()]
    assert any(text.encode() in path.read_bytes() for path in files)
    for value in secrets.values():
        assert not [path for path in files if value.encode() in path.read_bytes()]
