"""The gate over config.json and the index: nothing in them runs, nothing leads outside."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import BadInput, LorakitError
from tests.model.finding import edit, find, load
from tests.tiny import write_tiny_model

torch.set_num_threads(1)

CANARY = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "modeling.OwnConfig", "AutoModelForCausalLM": "modeling.OwnModel"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny", shards=2)


def refused(folder: Path, **section: Any) -> LorakitError:
    with pytest.raises(LorakitError) as error:
        find(folder, **section)
    return error.value


def text_of(error: LorakitError) -> str:
    return f"{error.message} {error.help} {error.where}"


def test_a_folder_without_config_is_not_found(folder: Path) -> None:
    (folder / "config.json").unlink()
    error = refused(folder)
    assert error.id == "model.not-found"
    assert "config.json" in error.message
    assert str(folder) in error.message


@pytest.mark.parametrize("given", ["nosuch", None, "clip", 5])
def test_unknown_model_types(folder: Path, given: Any) -> None:
    edit(folder / "config.json", model_type=given)
    error = refused(folder)
    assert error.id == "model.unknown-type"
    assert str(given) in error.message


def test_the_installed_version_is_said_for_an_unknown_type(folder: Path) -> None:
    import transformers

    edit(folder / "config.json", model_type="llama99")
    assert transformers.__version__ in refused(folder).message


@pytest.mark.parametrize("section", [{}, {"trust_remote_code": True}, {"allow": True}])
def test_code_runs_only_with_key_and_flag(folder: Path, section: dict[str, bool]) -> None:
    edit(folder / "config.json", model_type="own", auto_map=AUTO_MAP)
    (folder / "modeling.py").write_text(CANARY)
    error = refused(folder, **section)
    assert error.id == "security.remote-code"
    assert "remote code" in error.message
    assert "modeling.py" in error.message
    assert "--allow-remote-code" in (error.help or "")
    assert not list(folder.rglob("ran"))


def test_with_key_and_flag_the_code_runs_and_is_named(folder: Path) -> None:
    edit(folder / "config.json", model_type="own", auto_map=AUTO_MAP)
    (folder / "modeling.py").write_text(
        CANARY.replace("pathlib.Path", "pathlib.PurePath").replace(".touch()", "")
    )
    found = find(folder, trust_remote_code=True, allow=True)
    assert found.config.model_type == "own"
    assert list(found.facts()["code"]) == ["modeling.py"]
    assert type(load(found)).__name__ == "OwnModel"


def test_code_of_another_model_never_runs(folder: Path) -> None:
    foreign = {name: f"someone/else--{reference}" for name, reference in AUTO_MAP.items()}
    edit(folder / "config.json", model_type="own", auto_map=foreign)
    error = refused(folder, trust_remote_code=True, allow=True)
    assert error.id == "security.remote-code"
    assert "someone/else" in error.message


def test_a_built_in_family_ignores_an_auto_map(folder: Path) -> None:
    edit(folder / "config.json", auto_map=AUTO_MAP)
    (folder / "modeling.py").write_text(CANARY)
    assert type(load(find(folder))).__name__ == "LlamaForCausalLM"
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "evil/kernel"),
        ("_attn_implementation", "evil/kernel@main:f"),
        ("_attn_implementation_internal", "evil/kernel"),
        ("attn_implementation", {"text_config": "evil/kernel"}),
        ("experts_implementation", "evil/kernel"),
        ("kernel_config", {"RMSNorm": "evil/kernel"}),
        ("remote_model", "evil/model"),
        ("import_from", "os"),
        ("trust_remote_code", True),
        ("transformers_weights", "other.safetensors"),
        ("fusion_config", {"patch_embeddings": True}),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_keys_that_choose_code_or_files_are_refused(
    folder: Path, key: str, value: Any, nested: bool
) -> None:
    changes = {"text_config": [{key: value}]} if nested else {key: value}
    edit(folder / "config.json", **changes)
    error = refused(folder)
    assert error.id == "security.config"
    assert key in error.message
    if isinstance(value, str):
        assert value in error.message
    if key.endswith("_implementation"):
        assert "eager" in error.message


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation_autoset": True, "_name_or_path": "/home/someone/model"},
        {"trust_remote_code": False, "conv_kernel": 4},
    ],
)
def test_harmless_keys_of_real_files_pass(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder / "config.json", **changes)
    found = find(folder)
    assert "/home/someone" not in json.dumps(found.config.to_dict(), default=str)
    load(found)


def test_quantised_weights_are_refused(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    error = refused(folder)
    assert error.id == "model.bad-config"
    assert "gptq" in error.message


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "many"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"vocab_size": -5},
        {"hidden_size": 2**62},
        {"hidden_act": "nosuch"},
    ],
)
def test_values_that_make_no_model_are_bad_config(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder / "config.json", **changes)
    assert refused(folder).id == "model.bad-config"


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1, "a": 2}', '{"model_type": "llama"', "\x00"])
def test_a_config_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert isinstance(refused(folder), BadInput)


def test_generation_settings_are_read_and_guarded(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[2, 0])
    assert load(find(folder)).generation_config.eos_token_id == [2, 0]
    edit(folder / "generation_config.json", trust_remote_code=True)
    assert refused(folder).id == "security.config"
    (folder / "generation_config.json").unlink()
    assert load(find(folder)).generation_config.eos_token_id == 2


INDEX = "model.safetensors.index.json"


def point(folder: Path, entry: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = entry
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("entry", "id"),
    [
        ("../secret/other.safetensors", "security.path"),
        ("/etc/hostname", "security.path"),
        ("sub/other.safetensors", "security.path"),
        ("..", "security.path"),
        ("pytorch_model.bin", "security.pickle"),
        ("model.pt", "security.pickle"),
        ("hostname", "security.pickle"),
        ("pipe.safetensors", "security.path"),
        ("link.safetensors", "security.path"),
        ("absent.safetensors", "model.bad-index"),
        (7, "model.bad-index"),
        (None, "model.bad-index"),
    ],
)
def test_entries_of_the_index_stay_inside_and_are_safetensors(
    folder: Path, entry: Any, id: str
) -> None:
    secret = folder.parent / "secret"
    secret.mkdir()
    write_tiny_model(secret)
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "link.safetensors").symlink_to(secret / "model.safetensors")
    point(folder, entry)
    error = refused(folder)
    assert error.id == id
    assert str(entry) in text_of(error)
    if id == "security.path" and isinstance(entry, str) and "/" in entry:
        assert "outside" in error.message
    if id == "security.pickle":
        assert ".safetensors" in text_of(error)


def test_index_and_shards_must_agree(folder: Path) -> None:
    shards = sorted(folder.glob("model-*.safetensors"))
    holder = json.loads((folder / INDEX).read_text())["weight_map"]["lm_head.weight"]
    other = next(shard.name for shard in shards if shard.name != holder)
    point(folder, other)
    assert refused(folder).id == "model.missing-tensor"
    point(folder, holder)
    copied = folder / other
    copied.write_bytes((folder / holder).read_bytes())
    assert refused(folder).id in ("model.bad-index", "model.missing-tensor")


def test_a_folder_of_pickles_is_refused(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    error = refused(folder)
    assert error.id == "security.pickle"
    assert "pytorch_model.bin" in error.message
    (folder / "pytorch_model.bin").unlink()
    assert refused(folder).id == "model.not-found"
