"""Finding and loading a base: the same numbers come back, and nothing doubtful gets in."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.errors import BadInput, EnvironmentLacks, LorakitError, RunFailed
from lorakit.model import attention, base
from lorakit.model.attention import can_pack
from lorakit.recipe.sections import Model
from tests.model.finding import edit, find, load
from tests.tiny import FAMILIES, tiny_config, tiny_model, write_tiny_model

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path) -> LorakitError:
    with pytest.raises(LorakitError) as error:
        load(find(folder))
    return error.value


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_saved_is_loaded_frozen(
    family: str, tied: bool, shards: int, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "m", family, seed=3, tied=tied, shards=shards)
    found = find(folder)
    assert (found.name, found.folder, found.revision, found.notices) == ("m", folder, None, ())
    assert found.context == 256
    model, original = load(found), tiny_model(family, seed=3, tied=tied)
    loaded, saved = dict(model.named_parameters()), dict(original.named_parameters())
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert model.config.use_cache is False
    assert model.config._attn_implementation == attention.NAME
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert str(tmp_path) not in model.config.name_or_path
    assert base.load_tokenizer(found).eos_token_id == model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_skeleton_has_the_shapes_and_no_memory(family: str, tmp_path: Path) -> None:
    found = find(write_tiny_model(tmp_path / "m", family))
    bones, model = base.skeleton(found), load(found)
    assert {p.device.type for p in bones.parameters()} == {"meta"}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in bones.named_parameters()} == shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_dtype_and_attention_are_as_asked(folder: Path, dtype: torch.dtype, kind: str) -> None:
    model = load(find(folder), dtype=dtype, attention=kind)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.config._attn_implementation == kind


def test_flash_attention_that_is_missing_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(EnvironmentLacks) as error:
        load(find(folder), attention="flash")
    assert error.value.id == "env.missing-package"
    assert "sdpa" in (error.value.help or "")


def test_an_unknown_family_loads_with_the_library_s_attention(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("bloom", vocab_size=320, hidden_size=32, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    found = find(tmp_path / "m")
    assert "bloom" in (can_pack(found.config) or "")
    assert load(found).config._attn_implementation in ("sdpa", "eager")


def test_a_path_is_found_beside_the_recipe_first_then_in_the_cache(tmp_path: Path) -> None:
    cached = write_tiny_model(tmp_path / "cache/models/tiny", seed=1)
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    section = Model(path="tiny")
    options = {"offline": True, "allow_remote_code": False, "cache": tmp_path / "cache"}
    assert base.find(section, recipes, **options).folder == cached
    here = write_tiny_model(recipes / "tiny", seed=2)
    assert base.find(section, recipes, **options).folder == here
    assert base.find(Model(path=str(cached)), recipes, **options).folder == cached


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(BadInput) as error:
        find(folder, revision="main")
    assert error.value.id == "recipe.conflict"


@pytest.mark.parametrize("path", ["./nosuch", "a/b/c", "nosuch.gguf", "../nosuch"])
def test_a_path_that_is_not_there_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        base.find(
            Model(path=path), tmp_path, offline=True, allow_remote_code=False, cache=tmp_path / "c"
        )
    assert error.value.id == "model.not-found"
    text = f"{error.value.message} {error.value.help}"
    assert path in text
    assert "config.json" in text


@pytest.mark.parametrize(
    ("name", "id"), [("no-such-model", "model.not-found"), ("org/no-such-model", "env.offline")]
)
def test_a_name_without_an_owner_is_sooner_a_folder_than_a_hub_id(
    name: str, id: str, tmp_path: Path
) -> None:
    with pytest.raises(LorakitError) as error:
        base.find(
            Model(path=name), tmp_path, offline=True, allow_remote_code=False, cache=tmp_path / "c"
        )
    assert error.value.id == id
    assert name in error.value.message


@pytest.mark.parametrize("name", ["tinyllama", "./tinyllama", "TinyLlama-chat.gguf"])
def test_a_name_that_nothing_has_suggests_what_the_user_may_mean(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, cache, working = (tmp_path / each for each in ("recipes", "cache", "working"))
    working.mkdir()
    (cache / "models" / "TinyLlama-Chat").mkdir(parents=True)
    monkeypatch.chdir(working)

    def help() -> str:
        with pytest.raises(BadInput) as error:
            base.find(Model(path=name), recipes, offline=True, allow_remote_code=False, cache=cache)
        assert error.value.id == "model.not-found"
        return str(error.value.help)

    assert help() == "did you mean TinyLlama-Chat, which is in the cache?"
    (working / name).mkdir()
    assert f"write $PWD/{name.removeprefix('./')}" in help()


def test_fingerprints_follow_the_weights_and_not_the_files(tmp_path: Path) -> None:
    one = find(write_tiny_model(tmp_path / "one")).fingerprint
    assert find(write_tiny_model(tmp_path / "sharded", shards=3)).fingerprint == one
    assert find(write_tiny_model(tmp_path / "other", seed=1)).fingerprint != one
    change_tensors(tmp_path / "one", lambda t: t["model.layers.1.mlp.up_proj.weight"].mul_(1.01))
    assert find(tmp_path / "one").fingerprint != one


def test_facts_are_plain_and_show_no_path(folder: Path) -> None:
    facts = find(folder).facts()
    assert facts["name"] == "tiny"
    assert facts["model_type"] == "llama"
    assert str(folder.parent) not in str(facts)


def test_a_missing_tensor_is_found_before_weights_are_read(folder: Path) -> None:
    change_tensors(folder, lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(BadInput) as error:
        find(folder)
    assert error.value.id == "model.missing-tensor"
    assert "model.layers.1.self_attn.k_proj.weight missing" in error.value.message


def test_an_untied_head_must_be_there_and_a_tied_one_need_not(tmp_path: Path) -> None:
    tied = write_tiny_model(tmp_path / "tied", tied=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    load(find(tied))
    edit(tied / "config.json", tie_word_embeddings=False)
    assert refused(tied).id == "model.missing-tensor"


def test_wrong_shapes_and_tensors_without_a_place_are_told_apart(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=1)
    (notice,) = find(folder).notices
    assert notice.id == "model.unused-tensors"
    assert "model.layers.1." in notice.message
    edit(folder / "config.json", num_hidden_layers=2, intermediate_size=40)
    error = refused(folder)
    assert error.id == "model.shape-mismatch"
    assert "[48, 32]" in error.message
    assert "[40, 32]" in error.message
    edit(folder / "config.json", num_hidden_layers=3, intermediate_size=48)
    assert refused(folder).id == "model.missing-tensor"


def test_files_of_a_bare_decoder_load_under_their_own_names(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", "gpt2", tied=True)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    found = find(folder)
    assert found.notices == ()
    with found.weights() as weights:
        assert weights.stored_name("transformer.h.0.attn.c_attn.weight") == "h.0.attn.c_attn.weight"
        assert weights.stored_name("transformer.h.9.attn.c_attn.weight") is None
    loaded = dict(load(found).named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_stop_the_load(folder: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[3:5] = value

    change_tensors(folder, spoil)
    error = refused(folder)
    assert isinstance(error, RunFailed)
    assert error.id == "model.not-finite"
    assert "model.layers.0.mlp.up_proj.weight holds 2 values" in error.message


def test_large_finite_values_are_finite(folder: Path) -> None:
    change_tensors(folder, lambda t: t["lm_head.weight"].fill_(3e38))
    load(find(folder))


def test_a_cut_file_and_a_pointer_are_damaged(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    error = refused(folder)
    assert error.id == "model.damaged"
    assert f"{len(whole):,}" in error.message
    assert f"{len(whole) - 100:,}" in error.message
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    error = refused(folder)
    assert error.id == "model.damaged"
    assert "git lfs pull" in (error.help or "")


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "shard-00001-model-00001-of-00002.safetensors"]
)
def test_files_that_would_load_something_else_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_text('{"base_model_name_or_path": "other"}')
    error = refused(folder)
    assert error.id == "model.bad-config"
    assert name in error.message


def test_tokenizers_are_checked(folder: Path) -> None:
    edit(folder / "config.json", vocab_size=320)
    file = folder / "tokenizer.json"
    whole = file.read_text()
    for text in (whole[:-200], '{"model": {}}'):
        file.write_text(text)
        with pytest.raises(BadInput) as error:
            base.load_tokenizer(find(folder))
        assert error.value.id == "tokenizer.missing"
    file.unlink()
    with pytest.raises(BadInput, match=r"tokenizer\.json") as error:
        base.load_tokenizer(find(folder))
    assert error.value.id == "tokenizer.missing"


def test_more_tokens_than_rows_are_a_mismatch(folder: Path) -> None:
    tokenizer = base.load_tokenizer(find(folder))
    tokenizer.add_tokens(["<new-one>", *(f"<{n}>" for n in range(6)), "<last>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(BadInput) as error:
        base.load_tokenizer(find(folder))
    assert error.value.id == "tokenizer.mismatch"
    assert "321 tokens, the model 320 rows" in error.value.message
    assert "<last>" in error.value.message


def test_trust_without_the_flag_has_no_effect(folder: Path) -> None:
    (notice,) = find(folder, trust_remote_code=True).notices
    assert notice.id == "security.remote-code"
    assert "trust_remote_code has no effect without --allow-remote-code" in notice.message
    found = find(folder, trust_remote_code=True, allow=True)
    assert found.remote_code
    assert "runs with your rights" in found.notices[0].message
    assert tiny_config("llama").model_type == found.config.model_type
