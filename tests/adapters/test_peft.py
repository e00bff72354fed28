"""Adapters of lorakit in PEFT and the reverse: the same tensors, the same logits."""

import copy
import json

import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file

from lorakit import adapters
from lorakit.model.sites import find_sites
from tests.adapters.adapted import distance, ids, logits, put_on, scramble
from tests.adapters.test_conformance import merge_into
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")

EQUAL = 1e-6
LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
SMALL = {"rank": 4, "alpha": 8}
QV = ["q_proj", "v_proj"]
Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"

# What: family, tied, method, lorakit's settings, PEFT's settings.
CASES = {
    "qv": ("llama", False, "lora", {"target_modules": QV}, {"target_modules": QV}),
    "all-linear": ("qwen2", False, "lora", {}, {"target_modules": "all-linear"}),
    "dropout": (
        "llama",
        False,
        "lora",
        {"dropout": 0.25, "target_modules": QV},
        {"lora_dropout": 0.25, "target_modules": QV},
    ),
    "embedding": (
        "llama",
        False,
        "lora",
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["model.embed_tokens", "q_proj"]},
    ),
    "both-ends": (
        "llama",
        False,
        "lora",
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ),
    "rank-pattern": (
        "llama",
        False,
        "lora",
        {"target_modules": QV, "rank_pattern": {"layers.1.self_attn.v_proj": 2, "q_proj": 3}},
        {"target_modules": QV, "rank_pattern": {"1.self_attn.v_proj": 2, "q_.*": 3}},
    ),
    "alpha-pattern": (
        "llama",
        False,
        "rslora",
        {"target_modules": QV, "alpha_pattern": {"re:.*layers\\.0.*q_proj": 5.5}},
        {"target_modules": QV, "alpha_pattern": {Q0: 5.5}, "use_rslora": True},
    ),
    "modules-to-save": (
        "qwen2",
        False,
        "lora",
        {"target_modules": QV, "modules_to_save": ["lm_head", "input_layernorm", "k_proj"]},
        {"target_modules": QV, "modules_to_save": ["lm_head", "input_layernorm", "k_proj"]},
    ),
    "tied-embedding": (
        "llama",
        True,
        "lora",
        {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"embed_tokens": 2}},
        {
            "target_modules": ["embed_tokens", "q_proj"],
            "ensure_weight_tying": True,
            "rank_pattern": {"embed_tokens": 2, "lm_head": 2},
        },
    ),
    "tied-head": (
        "gpt2",
        True,
        "rslora",
        {"target_modules": ["lm_head", "c_attn"]},
        {"target_modules": ["lm_head", "c_attn"], "ensure_weight_tying": True, "use_rslora": True},
    ),
    "tied-copy": (
        "qwen2",
        True,
        "lora",
        {"target_modules": QV, "modules_to_save": ["lm_head"]},
        {"target_modules": QV, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "tied-copy-of-the-embedding": (
        "gpt2",
        True,
        "dora",
        {"target_modules": ["c_attn"], "modules_to_save": ["wte", "wpe"]},
        {
            "target_modules": ["c_attn"],
            "modules_to_save": ["wpe", "lm_head"],
            "ensure_weight_tying": True,
            "use_dora": True,
        },
    ),
    "conv1d": (
        "gpt2",
        False,
        "lora",
        {"target_modules": ["c_attn", "c_fc", "c_proj"]},
        {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True},
    ),
    "conv1d-copy": (
        "gpt2",
        False,
        "lora",
        {"target_modules": ["c_attn"], "modules_to_save": ["mlp.c_proj", "ln_f", "wpe"]},
        {
            "target_modules": ["c_attn"],
            "modules_to_save": ["mlp.c_proj", "ln_f", "wpe"],
            "fan_in_fan_out": True,
        },
    ),
    "regex": (
        "llama",
        False,
        "lora",
        {"target_modules": "re:.*layers\\.1\\..*(q|down)_proj"},
        {"target_modules": r"model\.layers\.1\..*(q|down)_proj"},
    ),
    "layers": (
        "llama",
        False,
        "lora",
        {"target_modules": QV, "layers": [1]},
        {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "exclude": (
        "llama",
        False,
        "lora",
        {"target_modules": "attention", "exclude_modules": ["o_proj"], "init": "gaussian"},
        {
            "target_modules": "all-linear",
            "exclude_modules": r".*(o_proj|mlp\..*)",
            "init_lora_weights": "gaussian",
        },
    ),
    "rslora": ("qwen2", False, "rslora", {}, {"target_modules": "all-linear", "use_rslora": True}),
    "dora": ("qwen2", False, "dora", {}, {"target_modules": "all-linear", "use_dora": True}),
    "dora-conv1d": (
        "gpt2",
        False,
        "dora",
        {"rank_pattern": {"c_fc": 2}},
        {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"c_fc": 2}},
    ),
    "ia3": ("llama", False, "ia3", {}, {}),
    "ia3-conv1d": (
        "gpt2",
        False,
        "ia3",
        {},
        {
            "target_modules": ["c_attn", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"],
            "fan_in_fan_out": True,
        },
    ),
    "ia3-bias": (
        "qwen2",
        False,
        "ia3",
        {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
    ),
    "prefix": ("llama", False, "prefix", {"tokens": 5}, {"num_virtual_tokens": 5}),
    "prefix-conv1d": ("gpt2", False, "prefix", {"tokens": 3}, {"num_virtual_tokens": 3}),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def ours(case):
    """Return a scrambled adapter of lorakit."""
    family, tied, name, settings, _ = case
    sizes = SMALL if name in ("lora", "rslora", "dora") else {}
    triple = put_on(tiny_model(family, tied=tied), name, seed=7, **{**sizes, **settings})
    scramble(*triple[:2])
    return triple


def theirs(case):
    """Return a scrambled adapter of PEFT."""
    family, tied, name, _, settings = case
    configs = {"ia3": IA3Config, "prefix": PrefixTuningConfig}
    sizes = LORA if name not in configs else {"task_type": "CAUSAL_LM"}
    config = configs.get(name, LoraConfig)(**copy.deepcopy({**sizes, **settings}))
    model = get_peft_model(tiny_model(family, tied=tied), config)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn(tensor.shape, generator=draw) * 0.3)
    return model.eval()


def peft_logits(model):
    with torch.no_grad():
        return model(input_ids=ids()).logits


def files(folder):
    """Return the tensors without PEFT's copies of whole embeddings."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key: tensor for key, tensor in tensors.items() if not key.endswith("base_layer.weight")}


def assert_same_files(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_peft_is_the_version_that_this_was_measured_with():
    assert peft.__version__.split(".")[:2] == ["0", "21"]


def test_ours_loads_in_peft(case, tmp_path):
    family, tied, *_ = case
    model, method, sites = ours(case)
    adapters.save(tmp_path / "ours", method, model, sites, {"steps": 1})
    loaded = PeftModel.from_pretrained(tiny_model(family, tied=tied), tmp_path / "ours").eval()
    assert distance(peft_logits(loaded), logits(model)) <= EQUAL
    loaded.save_pretrained(tmp_path / "theirs")
    assert_same_files(files(tmp_path / "theirs"), files(tmp_path / "ours"))


def test_theirs_loads_in_lorakit(case, tmp_path):
    family, tied, name, *_ = case
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    saved = adapters.read(tmp_path / "theirs")
    assert [notice.id for notice in saved.notices] == ["adapter.no-passport"]
    again = tiny_model(family, tied=tied)
    method = adapters.attach_saved(saved, again, find_sites(again))
    assert method.name() == name
    assert distance(logits(again), peft_logits(model)) <= EQUAL
    sites = method.sites(find_sites(tiny_model(family, tied=tied)))
    adapters.save(tmp_path / "ours", method, again, sites, {"steps": 1})
    assert_same_files(files(tmp_path / "ours"), files(tmp_path / "theirs"))


def test_what_theirs_says_is_said_again(case, tmp_path):
    """Every setting of PEFT that is not at its default is in the file that lorakit writes."""
    family, tied, *_ = case
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    again = tiny_model(family, tied=tied)
    method = adapters.attach_saved(adapters.read(tmp_path / "theirs"), again, find_sites(again))
    sites = method.sites(find_sites(tiny_model(family, tied=tied)))
    adapters.save(tmp_path / "ours", method, again, sites, {"steps": 1})
    before, after = (
        json.loads((tmp_path / one / "adapter_config.json").read_text())
        for one in ("theirs", "ours")
    )
    default = type(model.peft_config["default"])().to_dict()
    names = "target_modules exclude_modules modules_to_save layers_to_transform layers_pattern"
    names += " rank_pattern alpha_pattern feedforward_modules"
    # How values started is history; which modules are meant is said by their paths.
    ignored = {*names.split(), "peft_version", "init_lora_weights", "encoder_hidden_size"}
    for key, value in before.items():
        if key not in ignored and value != default[key]:
            assert after[key] == value, key


def test_theirs_merges_as_they_merge_it(case, tmp_path):
    family, tied, name, *_ = case
    if name == "prefix":
        return
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    merged = tiny_model(family, tied=tied)
    layers = adapters.merge_layers(adapters.read(tmp_path / "theirs"), find_sites(merged))
    for path, layer in layers.items():
        if path != "lm_head" or not tied:  # its weight is the embedding's, merged already
            merge_into(merged, path, layer)
    # In fp64, so that what differs is the merge and not how a processor rounds products.
    assert distance(logits(merged.double()), peft_logits(model.double())) <= 2 * EQUAL


def test_dropout_has_the_same_law_in_dora():
    """With dropout on both compute one function of the dropped inputs."""
    settings = {"target_modules": QV, "dropout": 0.5}
    model, method, _ = put_on(tiny_model("qwen2"), "dora", **SMALL, **settings)
    scramble(model, method)
    config = LoraConfig(**LORA, target_modules=QV, lora_dropout=0.5, use_dora=True)
    other = get_peft_model(tiny_model("qwen2"), config)
    named = method.tensors(model)
    with torch.no_grad():
        for key, tensor in other.named_parameters():
            if tensor.requires_grad:
                ours_key = key.removeprefix("base_model.model.").replace(".default", "")
                tensor.copy_(
                    named[ours_key.removesuffix(".weight") if "magnitude" in key else ours_key]
                )
    path = "model.layers.0.self_attn.q_proj"
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    adapters.set_training(model, True)
    outputs = []
    for module in (model.get_submodule(path), other.base_model.model.get_submodule(path).train()):
        torch.manual_seed(11)
        outputs.append(module(x))
    assert distance(*outputs) <= EQUAL


def test_prefix_generates_the_same_tokens(tmp_path):
    case = CASES["prefix"]
    model, method, sites = ours(case)
    adapters.save(tmp_path, method, model, sites, {"steps": 1})
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    prompt = ids(2, 6)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    own = model.generate(input_ids=prompt, **options)
    assert torch.equal(own, loaded.generate(input_ids=prompt, **options))


def test_gradients_are_those_of_peft():
    model, _, _ = put_on(tiny_model("llama"), "lora", **SMALL, target_modules=QV, seed=3)
    other = get_peft_model(tiny_model("llama"), LoraConfig(**LORA, target_modules=QV))
    own = adapters.trainable(model)
    pairs = {}
    with torch.no_grad():
        for key, tensor in other.named_parameters():
            if tensor.requires_grad:
                name = key.removeprefix("base_model.model.").replace(".default", "")
                own[name].add_(0.1)
                tensor.copy_(own[name])
                pairs[name] = tensor
    model(input_ids=ids(), labels=ids()).loss.backward()
    other(input_ids=ids(), labels=ids()).loss.backward()
    assert own.keys() == pairs.keys()
    for name, tensor in pairs.items():
        assert distance(own[name].grad, tensor.grad) <= 1e-5
