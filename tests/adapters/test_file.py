"""Adapter folders, good and broken: what is written, what is read, and every refusal."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit import adapters
from lorakit.errors import BadInput, LorakitError, RunFailed
from lorakit.model.sites import find_sites
from tests.adapters.adapted import adapted, logits, put_on, scramble
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

CONFIG, TENSORS, PASSPORT = "adapter_config.json", "adapter_model.safetensors", "lorakit.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
QV = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An adapter on q and v of the tiny llama, as lorakit writes it."""
    folder = tmp_path_factory.mktemp("written") / "adapter"
    model, method, sites = adapted("llama", "lora", target_modules=QV)
    scramble(model, method)
    base = {"name": "tiny", "revision": "abc", "fingerprint": "f" * 64}
    adapters.save(folder, method, model, sites, {"base": base, "steps": 4}, tiny_tokenizer())
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of it that a test may break."""
    return Path(shutil.copytree(written, tmp_path / "adapter"))


def configure(folder, **changes):
    """Change PEFT's settings and forget the passport; `...` leaves a key out."""
    (folder / PASSPORT).unlink(missing_ok=True)
    config = json.loads((folder / CONFIG).read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(config))


def retensor(folder, change):
    """Change the tensors and forget the passport."""
    (folder / PASSPORT).unlink(missing_ok=True)
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, {"format": "pt"})


def use(folder, model=None):
    """Read a folder and put it onto a base."""
    model = tiny_model("llama") if model is None else model
    saved = adapters.read(folder)
    adapters.attach_saved(saved, model, find_sites(model))
    return model


def refusal(folder, model=None, error=BadInput):
    """Return the error of using a folder; it names a file or folder."""
    with pytest.raises(LorakitError) as refused:
        use(folder, model)
    assert isinstance(refused.value, error), refused.value
    assert refused.value.where
    return refused.value


def test_what_is_written(written):
    assert {CONFIG, TENSORS, PASSPORT, "tokenizer.json", "chat_template.jinja"} <= set(
        os.listdir(written)
    )
    config = json.loads((written / CONFIG).read_text())
    assert config["target_modules"] == sorted(
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in QV
    )
    assert config["base_model_name_or_path"] == "tiny"
    assert (written / CONFIG).read_text() == json.dumps(config, indent=2, sort_keys=True) + "\n"
    tensors = load_file(written / TENSORS)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    passport = json.loads((written / PASSPORT).read_text())
    assert passport["method"] == "lora"
    assert passport["settings"]["rank"] == 4
    assert set(passport["scales"].values()) == {2.0}
    assert set(passport["files"]) == set(os.listdir(written)) - {PASSPORT}
    assert passport["base"]["fingerprint"] == "f" * 64
    assert not list(written.glob("*.bin"))


def test_a_run_folder_is_accepted(written, folder):
    model = use(written)
    assert torch.equal(logits(use(folder.parent)), logits(model))


def test_a_bom_is_fine(folder):
    text = (folder / CONFIG).read_bytes()
    (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + text)
    use(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_tensors_fit_a_bf16_base(folder, dtype):
    retensor(folder, lambda t: t.update({key: value.to(dtype) for key, value in t.items()}))
    model = use(folder, tiny_model("llama", dtype=torch.bfloat16))
    assert logits(model).isfinite().all()
    assert all(tensor.dtype == torch.float32 for tensor in adapters.trainable(model).values())


def test_the_least_that_peft_needs_is_enough(folder):
    config = json.loads((folder / CONFIG).read_text())
    (folder / PASSPORT).unlink()
    least = {key: config[key] for key in ("peft_type", "r", "lora_alpha")} | {"target_modules": QV}
    (folder / CONFIG).write_text(json.dumps(least))
    use(folder)


def test_null_patterns_are_empty_ones(folder):
    configure(folder, rank_pattern=None, alpha_pattern=None)
    use(folder)


def test_a_harmless_key_of_a_newer_peft_is_told(folder):
    configure(
        folder,
        some_new_size=16,
        some_new_flag=False,
        some_new_table={},
        megatron_core="megatron.core",
    )
    notices = adapters.read(folder).notices
    assert [n.id for n in notices] == ["adapter.unknown-setting", "adapter.no-passport"]
    assert "some_new_size" in notices[0].message


def test_numbers_that_name_what_peft_imports_are_fine(folder):
    mapping = {
        "base_model_class": "X",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    configure(folder, auto_mapping=mapping)
    use(folder)


# Settings, the error's id, and what its message names.
BAD_SETTINGS = {
    "no type": ({"peft_type": ...}, "adapter.unknown-type", "peft_type", "LORA"),
    "odd type": ({"peft_type": "EVIL"}, "adapter.unknown-type", "EVIL", "PREFIX_TUNING"),
    "type of no text": ({"peft_type": ["LORA"]}, "adapter.unknown-type", "peft_type"),
    "r 0": ({"r": 0}, "adapter.bad-setting", "r: ", "0", "(4, 32)"),
    "r -1": ({"r": -1}, "adapter.bad-setting", "r: ", "-1", "(4, 32)"),
    "r text": ({"r": "4"}, "adapter.bad-setting", "r: ", '"4"', "(4, 32)"),
    "r huge": ({"r": 10**9}, "adapter.bad-setting", "r: ", "1000000000", "(4, 32)"),
    "r true": ({"r": True}, "adapter.bad-setting", "r: ", "true"),
    "r absent": ({"r": ...}, "adapter.bad-setting", "r: "),
    "another rank": ({"r": 8}, "adapter.bad-setting", "r: ", "8", "(4, 32)"),
    "alpha huge": ({"lora_alpha": 10**400}, "adapter.bad-setting", "lora_alpha", "finite number"),
    "alpha null": ({"lora_alpha": None}, "adapter.bad-setting", "lora_alpha", "finite number"),
    "alpha text": ({"lora_alpha": "8"}, "adapter.bad-setting", "lora_alpha", "finite number"),
    "alpha zero": ({"lora_alpha": 0}, "adapter.bad-setting", "alpha"),
    "dropout": ({"lora_dropout": 1.0}, "adapter.bad-setting", "dropout"),
    "no targets": ({"target_modules": None}, "adapter.bad-setting", "target_modules"),
    "empty targets": ({"target_modules": []}, "adapter.bad-setting", "target_modules"),
    "targets of numbers": ({"target_modules": [1]}, "adapter.bad-setting", "target_modules"),
    "backtracking": (
        {"target_modules": r"([a-z._0-9]+)+!"},
        "adapter.bad-pattern",
        "target_modules",
        "unsupported",
    ),
    "bad pattern": ({"target_modules": "("}, "adapter.bad-pattern", "target_modules"),
    "long pattern": ({"target_modules": "a" * 20_000}, "adapter.bad-pattern", "20,000"),
    "rank pattern of text": (
        {"rank_pattern": {"q_proj": "8"}},
        "adapter.bad-setting",
        "rank_pattern",
    ),
    "rank pattern": ({"rank_pattern": {"(": 8}}, "adapter.bad-pattern", "rank_pattern"),
    "rank pattern list": ({"rank_pattern": [1]}, "adapter.bad-setting", "rank_pattern"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": None}}, "adapter.bad-setting", "alpha_pattern"),
    "layers pattern": (
        {"target_modules": QV, "layers_to_transform": [0], "layers_pattern": "(a+)+"},
        "adapter.bad-pattern",
        "layers_pattern",
        "unsupported",
    ),
    "megatron": ({"megatron_core": "os.path"}, "security.import", "megatron_core", "not followed"),
    "mapping": (
        {"auto_mapping": {"base_model_class": "X", "parent_library": "antigravity"}},
        "security.import",
        "auto_mapping",
        "not followed",
    ),
    "bias": ({"bias": "all"}, "adapter.bad-setting", "bias", "all"),
    "lora bias": ({"lora_bias": True}, "adapter.bad-setting", "lora_bias"),
    "experts": ({"target_parameters": ["experts"]}, "adapter.bad-setting", "target_parameters"),
    "new tokens": (
        {"trainable_token_indices": [1]},
        "adapter.bad-setting",
        "trainable_token_indices",
    ),
    "changed base": (
        {"init_lora_weights": "pissa"},
        "adapter.bad-setting",
        "init_lora_weights",
        "pissa",
    ),
    "unknown flag": ({"use_magic": True}, "adapter.bad-setting", "use_magic"),
    "unknown mode": ({"mode": "magic"}, "adapter.bad-setting", "mode"),
    "flag of text": ({"ensure_weight_tying": "yes"}, "adapter.bad-setting", "ensure_weight_tying"),
    "another task": ({"task_type": "SEQ_CLS"}, "adapter.bad-setting", "task_type", "SEQ_CLS"),
    "dora without lengths": (
        {"use_dora": True},
        "adapter.missing-tensor",
        "lora_magnitude_vector",
        "4",
    ),
    "copies without tensors": (
        {"modules_to_save": ["lm_head"]},
        "adapter.missing-tensor",
        "lm_head",
    ),
    "a target without tensors": (
        {"target_modules": [*QV, "o_proj"]},
        "adapter.missing-tensor",
        "o_proj",
    ),
    "a target in every layer": (
        {"target_modules": ["layers.0.self_attn.q_proj", "v_proj"]},
        "adapter.unexpected-tensor",
        "layers.1.self_attn.q_proj",
    ),
    "tensors that no target means": (
        {"target_modules": ["q_proj"]},
        "adapter.unexpected-tensor",
        "v_proj",
    ),
    "all linear": ({"target_modules": "all-linear"}, "adapter.missing-tensor", "10 are missing"),
    "a pattern for more": (
        {"target_modules": r".*(q|v|k)_proj"},
        "adapter.missing-tensor",
        "k_proj",
    ),
}


# A backtracking pattern is stopped after a second of processor time, and not before.
SLOW = pytest.param("backtracking", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "case", [SLOW if name == "backtracking" else name for name in BAD_SETTINGS]
)
def test_bad_settings_are_refused(folder, case):
    changes, id, *words = BAD_SETTINGS[case]
    configure(folder, **changes)
    error = refusal(folder)
    assert error.id == id
    assert all(word in error.message for word in words), error.message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_bad_settings(folder, number):
    text = (folder / CONFIG).read_text().replace('"lora_alpha": 8', f'"lora_alpha": {number}')
    (folder / CONFIG).write_text(text)
    error = refusal(folder)
    assert error.id == "adapter.bad-setting"
    assert "finite number" in error.message


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"r": 1, "r": 2}', "\xff"])
def test_a_config_that_is_no_object_is_refused(folder, text):
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    assert refusal(folder).id == "adapter.bad-config"


def keep(tensors, *names):
    for name in set(tensors) - set(names):
        del tensors[name]


# How the tensors are changed, the error's id, and what its message names.
BAD_TENSORS = {
    "one missing": (
        lambda t: t.pop(f"{Q}.lora_A.weight"),
        "adapter.missing-tensor",
        f"{Q}.lora_A.weight",
        "missing",
    ),
    "a site missing": (
        lambda t: [t.pop(f"{Q}.lora_{m}.weight") for m in "AB"],
        "adapter.missing-tensor",
        "model.layers.0.self_attn.q_proj",
    ),
    "no prefix": (
        lambda t: [t.update({k.removeprefix("base_model.model."): t.pop(k)}) for k in list(t)],
        "adapter.missing-tensor",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.",
    ),
    "misspelt": (
        lambda t: [t.update({k.replace("lora", "lroa"): t.pop(k)}) for k in list(t)],
        "adapter.missing-tensor",
        "lora_A.weight",
        "lroa_A.weight",
    ),
    "one more": (
        lambda t: t.update(
            {
                k.replace("layers.0.self_attn.q_", "layers.0.self_attn.o_"): v.clone()
                for k, v in t.items()
            }
        ),
        "adapter.unexpected-tensor",
        "o_proj",
    ),
    "odd name": (
        lambda t: t.update({"extra": torch.ones(2)}),
        "adapter.unexpected-tensor",
        "extra",
    ),
    "unasked copy": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(320, 32)}),
        "adapter.unexpected-tensor",
        "lm_head.weight",
    ),
    "lengths without dora": (
        lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}),
        "adapter.unexpected-tensor",
        "lora_magnitude_vector",
    ),
    "base copy of no embedding": (
        lambda t: t.update({f"{Q[:-6]}o_proj.base_layer.weight": torch.ones(32, 32)}),
        "adapter.unexpected-tensor",
        "base_layer",
    ),
    "transposed": (
        lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].t().contiguous()}),
        "adapter.shape-mismatch",
        "q_proj.lora_A.weight",
        "(4, 32)",
        "(32, 4)",
    ),
    "transposed b": (
        lambda t: t.update({f"{Q}.lora_B.weight": t[f"{Q}.lora_B.weight"].t().contiguous()}),
        "adapter.shape-mismatch",
        "q_proj.lora_B.weight",
        "(4, 32)",
        "(32, 4)",
    ),
    "another rank": (
        lambda t: t.update(
            {f"{Q}.lora_A.weight": torch.ones(3, 32), f"{Q}.lora_B.weight": torch.ones(32, 3)}
        ),
        "adapter.shape-mismatch",
        "q_proj.lora_A.weight",
        "(4, 32)",
        "(3, 32)",
    ),
    "other sizes": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 96)}),
        "adapter.wrong-base",
        "96",
        "32",
    ),
    "int8": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}),
        "adapter.wrong-dtype",
        f"{Q}.lora_A.weight",
        "I8",
        "F32, F16 or BF16",
    ),
    "fp64": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.float64)}),
        "adapter.wrong-dtype",
        "F64",
    ),
    "empty": (dict.clear, "adapter.missing-tensor", "lora_A.weight"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused(folder, case):
    change, id, *words = BAD_TENSORS[case]
    retensor(folder, change)
    error = refusal(folder)
    assert error.id == id
    assert all(word in error.message for word in words), error.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(folder, value):
    retensor(folder, lambda t: t[f"{Q}.lora_B.weight"].view(-1)[3:5].fill_(value))
    error = refusal(folder, error=RunFailed)
    assert error.id == "adapter.not-finite"
    assert f"{Q}.lora_B.weight" in error.message
    assert " 2 values" in error.message


@pytest.mark.parametrize("passport", [True, False])
@pytest.mark.parametrize("size", [0, 4, 8, 20, -1, +1])
def test_a_file_of_another_length_is_damaged(folder, size, passport):
    data = (folder / TENSORS).read_bytes()
    cut = data[: len(data) + size] if size < 0 else data[:size]
    (folder / TENSORS).write_bytes(data + b"\0" if size == 1 else cut)
    if not passport:
        (folder / PASSPORT).unlink()
    error = refusal(folder, error=RunFailed)
    assert error.id == "adapter.damaged"
    assert TENSORS in str(error.where)
    assert "expected" in error.message


def test_a_flipped_bit_is_damage(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-100] ^= 1
    (folder / TENSORS).write_bytes(data)
    error = refusal(folder, error=RunFailed)
    assert error.id == "adapter.damaged"
    assert "checksum" in error.message
    digest = json.loads((folder / PASSPORT).read_text())["files"][TENSORS]
    assert digest[:12] in error.message


@pytest.mark.parametrize(
    "passport",
    [
        "[]",
        '{"format": 2, "files": {}}',
        '{"format": 1}',
        '{"format": 1, "files": {}}',
        '{"files": {}}',
    ],
)
def test_a_passport_that_cannot_be_read_is_refused(folder, passport):
    (folder / PASSPORT).write_text(passport)
    assert refusal(folder).id == "adapter.bad-config"


@pytest.mark.parametrize(
    "changes",
    [
        {"base": None},
        {"base": 5},
        {"base": {"name": 5}},
        {"recipe": []},
        {"recipe": {"model": "x"}},
        {"recipe": {"model": {"path": 5}}},
        {"recipe": {"model": {"dtype": "int3"}}},
        {"recipe": {"data": {"train": "x"}}},
        {"recipe": {"data": {"train": ["x"]}}},
        {"recipe": {"data": {"system": 5}}},
        {"template_sha256": 5},
    ],
)
def test_a_passport_with_other_types_is_refused(folder, changes):
    passport = json.loads((folder / PASSPORT).read_text())
    (folder / PASSPORT).write_text(json.dumps(passport | changes))
    error = refusal(folder)
    assert error.id == "adapter.bad-config"
    assert error.message.startswith(next(iter(changes)))


def test_a_passport_of_another_method_is_refused(folder):
    passport = json.loads((folder / PASSPORT).read_text())
    (folder / PASSPORT).write_text(json.dumps(passport | {"method": "dora"}))
    assert refusal(folder).id == "adapter.unknown-type"


def test_missing_things_are_named(folder, tmp_path):
    assert refusal(tmp_path / "absent").id == "adapter.not-found"
    assert refusal(folder / CONFIG).id == "adapter.not-found"
    (folder / CONFIG).rename(folder / "config.json")
    error = refusal(folder)
    assert error.id == "adapter.missing-file"
    assert CONFIG in error.message
    assert "config.json" in error.message
    (folder / "config.json").rename(folder / CONFIG)
    (folder / TENSORS).unlink()
    assert refusal(folder).id == "adapter.missing-file"


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "lorakit.json"]
)
def test_a_link_is_never_followed(folder, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("a secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(elsewhere)
    error = refusal(folder)
    assert error.id == "security.path"
    assert "secret" not in str(error)


def test_a_pickle_is_never_opened(folder):
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    error = refusal(folder)
    assert error.id == "security.pickle"
    assert "pickle" in error.message
    assert "safetensors" in str(error.help)


def test_a_pickle_beside_the_tensors_is_left_alone(folder):
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    use(folder)


def other_base(**changes):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(tiny_config("llama", **changes)).eval()


def test_another_base_is_refused(folder):
    error = refusal(folder, other_base(hidden_size=64))
    assert error.id == "adapter.wrong-base"
    assert error.message.startswith("the adapter was trained on hidden size 32, the base has 64: ")
    assert 'which its settings call "tiny"' in str(error.help)
    error = refusal(folder, other_base(num_hidden_layers=1))
    assert error.id == "adapter.wrong-base"
    assert "layers.1" in error.message
    assert error.message.endswith("to model.layers.1.self_attn.v_proj")


def test_an_adapter_of_a_shallower_base_is_refused_unless_something_tells(folder):
    """Its settings name whole paths, as lorakit writes them for a recipe's `layers` too."""
    deeper = other_base(num_hidden_layers=4)
    use(folder, deeper)  # the fingerprint tells, in `check_base`
    configure(folder)
    error = refusal(folder, other_base(num_hidden_layers=4))
    assert error.id == "adapter.wrong-base"
    assert "the first 2 layers, the base has 4" in error.message
    assert '"layers_to_transform": [0, 1]' in str(error.help)
    use(folder)
    configure(folder, layers_to_transform=[0, 1])
    use(folder, other_base(num_hidden_layers=4))


def test_a_deeper_base_is_refused_where_the_settings_mean_its_layers(folder):
    configure(folder, target_modules=QV)
    error = refusal(folder, other_base(num_hidden_layers=3))
    assert error.id == "adapter.missing-tensor"
    assert "layers.2" in error.message


class Base:
    name = "other"

    def __init__(self, fingerprint, **sizes):
        self.fingerprint, self.sizes, self.stored = fingerprint, sizes, None


def test_a_fingerprint_tells_bases_apart(folder):
    saved = adapters.read(folder)
    assert adapters.check_base(saved, Base("f" * 64)) is None
    with pytest.raises(BadInput) as refused:
        adapters.check_base(saved, Base("e" * 64))
    assert refused.value.id == "adapter.wrong-base"
    assert "fingerprint" in refused.value.message
    assert adapters.check_base(saved, Base("f" * 64, layers=4)) is None  # an older passport
    passport = json.loads((folder / PASSPORT).read_text())
    passport["base"]["sizes"] = {"hidden size": 32, "layers": 2}
    (folder / PASSPORT).write_text(json.dumps(passport))
    for size in ("hidden size", "layers"):
        with pytest.raises(BadInput, match=f"trained on {size} .*, the base has 64") as refused:
            adapters.check_base(adapters.read(folder), Base("e" * 64, **{size: 64}))
        assert refused.value.id == "adapter.wrong-base"
    (folder / PASSPORT).unlink()
    notice = adapters.check_base(adapters.read(folder), Base("e" * 64))
    assert notice
    assert notice.id == "adapter.base-unknown"


def test_an_adapter_that_learnt_nothing_is_not_saved(tmp_path):
    model, method, sites = adapted("llama", "lora")
    adapters.save(tmp_path / "fresh", method, model, sites, {"steps": 0})
    with pytest.raises(RunFailed, match="changes nothing") as failed:
        adapters.save(tmp_path / "trained", method, model, sites, {"steps": 2})
    assert failed.value.id == "adapter.not-saved"


def test_trained_copies_do_not_hide_an_update_that_learnt_nothing(tmp_path):
    model, method, sites = adapted("llama", "lora", target_modules=QV, modules_to_save=["norm"])
    adapters.trainable(model)["model.norm.weight"].data.add_(1)
    with pytest.raises(RunFailed, match="changes nothing"):
        adapters.save(tmp_path, method, model, sites, {"steps": 2})


def test_an_older_file_with_weight_after_lengths_is_read(tmp_path):
    model, method, sites = adapted("llama", "dora", target_modules=QV)
    scramble(model, method)
    adapters.save(tmp_path, method, model, sites, {"steps": 2})

    def older(tensors):
        for name in list(tensors):
            if name.endswith("vector"):
                tensors[f"{name}.weight"] = tensors.pop(name)

    retensor(tmp_path, older)
    assert torch.equal(logits(use(tmp_path)), logits(model))


def test_an_adapter_with_nan_is_not_saved(tmp_path):
    model, method, sites = adapted("llama", "lora")
    next(iter(adapters.trainable(model).values())).data[0, 0] = float("nan")
    with pytest.raises(RunFailed) as failed:
        adapters.save(tmp_path, method, model, sites, {"steps": 2})
    assert failed.value.id == "adapter.not-finite"


def test_a_file_that_changes_while_it_is_written_is_noticed(tmp_path, monkeypatch):
    from lorakit.adapters import _file

    def half(path, tensors):
        return write(path, {key: value * 0.5 for key, value in tensors.items()})

    write = _file.write_tensors
    monkeypatch.setattr(_file, "write_tensors", half)
    model, method, sites = adapted("llama", "lora")
    with pytest.raises(RunFailed, match="not in the file") as failed:
        adapters.save(tmp_path, method, model, sites, {})
    assert failed.value.id == "adapter.not-saved"


@pytest.fixture
def tied(tmp_path):
    """An adapter on both ends of a tied llama."""
    model, method, sites = put_on(
        tiny_model("llama", tied=True), "lora", target_modules=["lm_head", *QV]
    )
    scramble(model, method)
    adapters.save(tmp_path / "adapter", method, model, sites, {"steps": 1})
    return tmp_path / "adapter"


def test_a_tie_is_said_and_kept(tied):
    config = json.loads((tied / CONFIG).read_text())
    assert config["ensure_weight_tying"] is True
    use(tied, tiny_model("llama", tied=True))


def test_one_end_of_a_tie_alone_is_refused(tied):
    configure(tied, ensure_weight_tying=False)
    error = refusal(tied, tiny_model("llama", tied=True))
    assert error.id == "adapter.bad-setting"
    assert "ensure_weight_tying" in error.message


def test_ends_that_differ_are_refused(tied):
    retensor(tied, lambda t: t["base_model.model.lm_head.lora_A.weight"].add_(1))
    error = refusal(tied, tiny_model("llama", tied=True))
    assert error.id == "adapter.bad-setting"
    assert "lm_head" in error.message or "embed" in error.message


def test_a_tie_is_two_equal_updates_on_an_untied_base(tied):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    same = tiny_model("llama", tied=True)
    assert torch.equal(logits(model), logits(same))
    assert (logits(use(tied, model)) - logits(use(tied, same))).abs().max() < 1e-4


def test_a_copy_of_another_embedding_is_refused(tmp_path):
    model, method, sites = adapted("llama", "lora", target_modules=["embed_tokens"])
    scramble(model, method)
    adapters.save(tmp_path, method, model, sites, {"steps": 1})
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    weight = tiny_model("llama").model.embed_tokens.weight.detach()
    sites = find_sites(tiny_model("llama"))
    retensor(tmp_path, lambda t: t.update({name: weight}))
    use(tmp_path)
    layer = adapters.merge_layers(adapters.read(tmp_path), sites)["model.embed_tokens"]
    layer.merged({"weight": weight[:9]}, slice(0, 9))
    retensor(tmp_path, lambda t: t.update({name: weight + 1}))
    assert refusal(tmp_path).id == "adapter.wrong-base"
    layer = adapters.merge_layers(adapters.read(tmp_path), sites)["model.embed_tokens"]
    with pytest.raises(BadInput, match="embed_tokens"):
        layer.merged({"weight": weight[:9]}, slice(0, 9))


def test_names_that_look_like_ours_inside_a_model_confuse_nothing(tmp_path):
    """Modules called `base`, `lora` and `weight` are adapted, saved and found again."""

    def renamed():
        model = tiny_model("llama")
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.lora_A, attention.base = torch.nn.Module(), torch.nn.Module()
            attention.lora_A.weight, attention.base.linear = attention.q_proj, attention.v_proj
            del attention.q_proj, attention.v_proj
            attention.q_proj, attention.v_proj = attention.lora_A.weight, attention.base.linear
            del attention._modules["q_proj"], attention._modules["v_proj"]
        return model

    model = renamed()
    names = [
        site.name
        for site in find_sites(model)
        if ".lora_A.weight" in site.name or ".base." in site.name
    ]
    assert len(names) == 4
    method = adapters.get("lora")(adapters.settings_for("lora")(rank=2, target_modules=names))
    sites = method.sites(find_sites(model))
    adapters.attach(method, model, sites, seed=0)
    scramble(model, method)
    adapters.save(tmp_path, method, model, sites, {"steps": 1})
    saved = adapters.read(tmp_path)
    assert sorted(saved.settings.target_modules) == sorted(names)
    assert set(adapters.merge_layers(saved, find_sites(renamed()))) == set(names)


def test_a_tokenizer_file_that_changed_or_went_missing_is_damage(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "assistent"))
    error = refusal(folder, error=RunFailed)
    assert error.id == "adapter.damaged"
    assert error.where.file == str(path)
    path.unlink()
    error = refusal(folder, error=RunFailed)
    assert error.id == "adapter.damaged"
    assert "chat_template.jinja is missing" in error.message


def test_an_adapter_without_its_tokenizer_is_whole(folder, written):
    for path in folder.iterdir():
        if path.name not in (CONFIG, TENSORS, PASSPORT):
            path.unlink()
    assert torch.equal(logits(use(folder)), logits(use(written)))


def test_settings_that_scale_otherwise_than_in_training_are_refused(folder):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] + 1}))
    error = refusal(folder)
    assert error.id == "adapter.bad-setting"
    assert "was trained to count" in error.message
    (folder / PASSPORT).unlink()
    use(folder)


def test_a_changed_passport_is_told(folder):
    assert not adapters.read(folder).notices
    passport = json.loads((folder / PASSPORT).read_text())
    (folder / PASSPORT).write_text(json.dumps(passport | {"steps": 5}))
    assert [notice.id for notice in adapters.read(folder).notices] == ["adapter.passport-changed"]
