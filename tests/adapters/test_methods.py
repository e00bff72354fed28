"""What single methods promise beyond what all of them do."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lorakit import adapters
from lorakit.adapters._layer import Copy
from lorakit.errors import BadInput
from lorakit.evaluation import generation
from lorakit.evaluation.generation import Decoding, generate
from lorakit.model.loss import token_loss
from lorakit.model.sites import find_sites
from tests.adapters.adapted import (
    adapted,
    base_of,
    distance,
    ids,
    logits,
    loss,
    method_of,
    put_on,
    scramble,
    train,
)
from tests.tiny import FAMILIES, tiny_config, tiny_model, tiny_tokenizer

QV = ["q_proj", "v_proj"]


def layer_at(model, path):
    return model.get_submodule(path).adapter


def refused(name, family="llama", tied=False, **settings):
    """Return the error of choosing sites, or of attaching; both need no weights."""
    with torch.device("meta"):
        skeleton = tiny_model(family, tied=tied)
    method = method_of(name, **settings)
    with pytest.raises(BadInput) as error:
        adapters.attach(method, skeleton, method.sites(find_sites(skeleton)), seed=0)
    return error.value


@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("settings", [{"rank": 33}, {"rank": 4, "rank_pattern": {"q_proj": 33}}])
def test_a_rank_above_the_smaller_side_is_refused(name, settings):
    error = refused(name, target_modules=QV, **settings)
    assert error.id == "target.rank-too-large"
    assert "rank 33 at model.layers.0.self_attn.q_proj, whose smaller side is 32" in error.message


@pytest.mark.parametrize("name", ["lora", "rslora"])
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 16.0}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4.0}},
    ],
)
def test_who_serves_it_is_who_scales_it_alike(name, patterns):
    """vLLM scales all sites by the settings' rank, llama.cpp each by its own and never by √rank."""
    method = method_of(name, rank=4, alpha=8.0, target_modules=QV, **patterns)
    with torch.device("meta"):
        sites = method.sites(find_sites(tiny_model("llama")))
    layers = method.layers(sites).values()
    root = 0.5 if name == "rslora" else 1.0
    vllm = all(layer.scale == 8.0 / 4**root for layer in layers)
    llama = all(layer.scale == 8.0 / len(layer.A) for layer in layers)
    served = method.servable(sites)
    assert served["PEFT"] == "yes"
    assert (served["vLLM"] == "yes") is vllm
    assert (served["llama.cpp"] == "yes") is (llama and name == "lora")


@pytest.mark.parametrize(
    ("settings", "reader", "said"),
    [
        ({"rank": 17}, "vLLM", "yes, with --max-lora-rank 32"),
        ({"rank": 24, "alpha": 24}, "vLLM", "yes, with --max-lora-rank 32"),
        ({"rank": 600}, "vLLM", "no: rank 600 is above its 512"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "vLLM", "no: it takes embeddings"),
        ({"target_modules": ["lm_head"]}, "vLLM", "no: it takes embeddings and heads"),
        ({"target_modules": ["lm_head"]}, "llama.cpp", "yes"),
        ({"modules_to_save": ["lm_head"]}, "vLLM", "no: it takes no modules that are saved whole"),
        ({"modules_to_save": ["lm_head"]}, "llama.cpp", "no: it takes no modules that are saved"),
        ({"modules_to_save": ["lm_head"]}, "PEFT", "yes"),
    ],
)
def test_who_serves_it_and_why_not(settings, reader, said):
    method = method_of("lora", **{"target_modules": QV, **settings})
    config = tiny_config("llama", hidden_size=640, num_key_value_heads=4, vocab_size=640)
    with torch.device("meta"):
        candidates = find_sites(AutoModelForCausalLM.from_config(config))
    assert method.servable(method.sites(candidates))[reader].startswith(said)


def test_a_tied_embedding_is_not_served_by_llama_cpp():
    method = method_of("lora", target_modules=["lm_head"])
    with torch.device("meta"):
        sites = method.sites(find_sites(tiny_model("llama", tied=True)))
    assert method.servable(sites)["llama.cpp"] == "no: it takes no update of a tied embedding"


def test_what_cannot_be_adapted_is_refused():
    assert refused("lora", target_modules=["input_layernorm"]).id == "target.unsupported"
    assert refused("dora", target_modules=["embed_tokens"]).id == "target.unsupported"
    assert refused("ia3", tied=True, target_modules=["lm_head"]).id == "target.unsupported"
    assert refused("dora", tied=True, target_modules=["lm_head"]).id == "target.unsupported"
    assert refused("lora", target_modules=["q_proj", "q_prj"]).id == "target.no-match"
    assert refused("lora", target_modules=QV, rank_pattern={"k_proj": 2}).id == "target.no-match"
    assert refused("lora", modules_to_save=["no_such"]).id == "target.no-match"


def test_a_module_is_adapted_or_saved_whole():
    error = refused("lora", target_modules=QV, modules_to_save=["layers.1.self_attn.q_proj"])
    assert error.id == "recipe.conflict"
    assert "layers.1.self_attn.q_proj" in error.message


def test_the_scale_of_each_site_is_a_value_of_its_layer():
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 8}}
    patterns["alpha_pattern"] = {"re:.*v_proj": 2.0}
    scales = {}
    for name in ("lora", "rslora", "dora"):
        model, method, sites = adapted(
            "llama", name, rank=4, alpha=8, target_modules=QV, **patterns
        )
        layers = {site.name: layer_at(model, site.name) for site in sites}
        assert [method.rank_of(site) for site in sites] == [2, 4, 8, 4]
        assert [layer.A.shape[0] for layer in layers.values()] == [2, 4, 8, 4]
        scales[name] = [layer.scale for layer in layers.values()]
    assert scales["lora"] == scales["dora"] == [4.0, 0.5, 1.0, 0.5]
    assert scales["rslora"] == [8 / math.sqrt(2), 1.0, 8 / math.sqrt(8), 1.0]


def test_starts_have_the_stated_spread():
    for init, spread in (("default", 1 / math.sqrt(3 * 32)), ("gaussian", 1 / 16)):
        model, _, _ = adapted("llama", "lora", rank=16, init=init)
        drawn = torch.cat(
            [layer.A.flatten() for layer in adapters.layers_of(model) if layer.A.shape[1] == 32]
        )
        assert abs(drawn.std().item() / spread - 1) < 0.05
        assert not any(layer.B.any() for layer in adapters.layers_of(model))
    assert drawn.abs().max() > 3 / 16


def test_dropout_acts_in_training_alone():
    model, method, _ = adapted("llama", "lora", dropout=0.5)
    scramble(model, method)
    adapters.set_training(model, True)
    assert not torch.equal(model(ids()).logits, model(ids()).logits)
    assert not model.model.layers[0].self_attn.training
    adapters.set_training(model, False)
    assert torch.equal(model(ids()).logits, model(ids()).logits)


def test_a_layer_that_is_a_plain_product_says_so():
    model, _, _ = adapted("llama", "lora", target_modules=["embed_tokens", "q_proj", "lm_head"])
    for layer in adapters.layers_of(model):
        A, B, scale = layer.low_rank()
        zero = torch.zeros(B.shape[0], A.shape[1])
        assert torch.allclose(layer.merged({"weight": zero})["weight"], scale * B @ A)
    for name in ("dora", "ia3", "prefix"):
        model, _, _ = adapted("llama", name)
        assert all(layer.low_rank() is None for layer in adapters.layers_of(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["lm_head", "embed"])
def test_lora_on_either_end_of_a_tie_is_one_update_of_both(family, target):
    embedding = "wte" if family == "gpt2" else "embed_tokens"
    targets = [embedding if target == "embed" else "lm_head"]
    model, method, sites = put_on(
        tiny_model(family, tied=True), "lora", rank=4, target_modules=targets
    )
    assert [site.kind for site in sites] == ["embedding"]
    assert len(adapters.trainable(model)) == 2
    scramble(model, method)
    expected = logits(model)
    merged = tiny_model(family, tied=True)
    layer = layer_at(model, sites[0].name)
    weight = merged.get_submodule(sites[0].name).weight
    weight.data = layer.merged({"weight": weight.detach()})["weight"].detach()
    merged.tie_weights()
    assert distance(logits(merged), expected) <= 2e-6
    head = layer_at(model, "lm_head")
    assert torch.equal(
        head.merged({"weight": weight})["weight"], layer.merged({"weight": weight})["weight"]
    )


def test_an_embedding_that_scales_what_it_looks_up_scales_the_update_too():
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    model = tiny_model("llama")
    scaled = Scaled(320, 32)
    scaled.weight = model.model.embed_tokens.weight
    model.model.embed_tokens = scaled
    model, method, _ = put_on(model, "lora", target_modules=["embed_tokens"])
    scramble(model, method)
    layer = layer_at(model, "model.embed_tokens")
    table = layer.merged({"weight": scaled.weight.detach()})["weight"]
    assert distance(model.model.embed_tokens(ids()), table[ids()] * 3.0) <= 1e-6


def test_copies_are_trained_in_place_of_the_base(tmp_path):
    model, method, _ = adapted(
        "qwen2", "lora", target_modules=["q_proj"], modules_to_save=["k_proj", "norm", "lm_head"]
    )
    names = [layer.name for layer in adapters.layers_of(model) if isinstance(layer, Copy)]
    assert len(names) == 4
    before = {name: model.get_submodule(name).weight.clone() for name in names}
    start = logits(tiny_model("qwen2"))
    assert torch.equal(logits(model), start)
    assert [round(value, 6) for value in train(model, method, steps=3)]
    for name in names:
        module = model.get_submodule(name)
        assert torch.equal(module.weight, before[name])
        assert not torch.equal(module.adapter.weight, before[name])
    trained = adapters.trainable(model)
    assert "model.layers.0.self_attn.k_proj.bias" in trained
    assert "model.norm.weight" in trained
    with adapters.switched_off(model):
        assert torch.equal(logits(model), start)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_a_quantised_weight_starts_as_the_dense_one(family, tmp_path):
    base = base_of(family, "nf4")
    before = logits(base)
    copied = ["c_attn", "lm_head"] if family == "gpt2" else ["v_proj", "lm_head"]
    targets = ["c_fc"] if family == "gpt2" else ["q_proj"]
    model, method, sites = put_on(base, "lora", target_modules=targets, modules_to_save=copied)
    assert distance(logits(model), before) < 1e-6
    losses = list(train(model, method, steps=6))
    assert losses[-1] < losses[0] - 0.02
    adapters.save(tmp_path / "adapter", method, model, sites, {})
    again = base_of(family, "nf4")
    adapters.attach_saved(adapters.read(tmp_path / "adapter"), again, find_sites(again))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_a_copy_of_a_tied_embedding_is_one_for_both_ends(end):
    model, method, sites = put_on(
        tiny_model("llama", tied=True), "lora", target_modules=["q_proj"], modules_to_save=[end]
    )
    copies = [key for key in adapters.trainable(model) if "lora" not in key]
    assert copies == ["model.embed_tokens.weight"]
    list(train(model, method, steps=2))
    expected = logits(model)
    whole = tiny_model("llama", tied=True)
    layer = layer_at(model, "model.embed_tokens")
    base = {"weight": whole.lm_head.weight.detach()}
    assert torch.equal(layer_at(model, "lm_head").merged(base)["weight"], layer.weight)
    for site in sites:
        module = whole.get_submodule(site.name)
        module.weight.data = (
            layer_at(model, site.name).merged({"weight": module.weight.data})["weight"].data
        )
    whole.lm_head.weight.data.copy_(layer.weight.data)
    assert distance(logits(whole), expected) <= 2e-6


def test_dora_norms_are_those_of_the_whole_weight():
    model, method, sites = put_on(tiny_model("gpt2"), "dora")
    scramble(model, method)
    for site in sites:
        module = model.get_submodule(site.name)
        weight = module.weight.t() if site.kind == "conv1d" else module.weight
        layer = module.adapter
        whole = weight + layer.scale * layer.B @ layer.A
        assert distance(layer.norm, whole.norm(dim=1)) <= 1e-6


def test_dora_norms_do_not_depend_on_how_rows_are_cut(monkeypatch):
    from lorakit.adapters import dora

    norms = []
    for values in (1, 1 << 24):
        monkeypatch.setattr(dora, "ROW_VALUES", values)
        model, method, _ = adapted("llama", "dora")
        scramble(model, method)
        norms.append(torch.cat([layer.norm for layer in adapters.layers_of(model)]))
    assert distance(*norms) <= 1e-6


def test_no_gradient_flows_through_the_norm_of_dora():
    model, method, _ = adapted("llama", "dora")
    scramble(model, method)
    path = "model.layers.0.self_attn.q_proj"
    module, layer = model.get_submodule(path), layer_at(model, path)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    module(x).square().sum().backward()
    own = [tensor.grad.clone() for tensor in (layer.A, layer.B, layer.magnitude)]
    A, B, m = (
        tensor.detach().clone().requires_grad_() for tensor in (layer.A, layer.B, layer.magnitude)
    )
    whole = module.weight + layer.scale * B @ A
    y = x @ (whole * (m / whole.norm(dim=1).detach())[:, None]).t()
    y.square().sum().backward()
    for ours, plain in zip(own, (A.grad, B.grad, m.grad), strict=True):
        assert distance(ours, plain) <= 2e-6


def test_ia3_takes_keys_values_and_the_end_of_the_mlp():
    _, method, sites = adapted("llama", "ia3")
    assert {site.role for site in sites} == {"k", "v", "down"}
    assert {site.role for site in adapted("gpt2", "ia3")[2]} == {"qkv", "down"}
    model, method, sites = adapted("llama", "ia3", layers=[1])
    assert {site.layer for site in sites} == {1}
    assert all(group["weight_decay"] == 0.0 for group in method.param_groups(model, 1e-3))


def test_small_factors_of_ia3_and_dora_are_not_lost_in_bf16():
    for name, attribute in (("ia3", "factors"), ("dora", "magnitude")):
        model, _, _ = put_on(
            tiny_model("llama", dtype=torch.bfloat16), name, target_modules=["v_proj"]
        )
        module = model.model.layers[0].self_attn.v_proj
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
        with torch.no_grad():
            before = module(x)
            vars(module.adapter)["_parameters"][attribute].mul_(1.003)
            assert not torch.equal(module(x), before)


def batch(given, lengths=None):
    """Return a batch as the loss takes it, every token but the first trained."""
    labels = given.clone()
    labels[:, 0] = -100
    positions = torch.arange(given.shape[1]).expand_as(given)
    return SimpleNamespace(input_ids=given, labels=labels, position_ids=positions, lengths=lengths)


def document_model(family):
    from lorakit.model.attention import NAME

    model = tiny_model(family)
    model.config._attn_implementation = NAME
    model.config.use_cache = False
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_from_text_is_that_text(family):
    """The first tokens' keys and values before other tokens do what the tokens themselves do."""
    model, _, _ = adapted(family, "prefix", tokens=7)
    text, rest = ids()[:1, :7], ids(1, 6, seed=8)
    whole = logits(tiny_model(family), torch.cat([text, rest], dim=1))
    assert distance(logits(model, rest), whole[:, 7:]) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_works_in_our_loss(family):
    model, method, _ = put_on(document_model(family), "prefix")
    scramble(model, method, size=0.1)
    given = ids()
    ours = token_loss(model, batch(given))
    plain, _, _ = adapted(family, "prefix")
    scramble(plain, method, size=0.1)
    assert distance(ours, loss(plain) * given[:, 1:].numel()) <= 1e-5
    ours.backward()
    assert all(tensor.grad.any() for tensor in adapters.trainable(model).values())


def test_documents_of_one_row_never_share_a_prefix():
    model, _, _ = put_on(document_model("llama"), "prefix")
    with pytest.raises(ValueError, match="prefix"):
        token_loss(model, batch(ids(1, 11), lengths=(5, 6)))


@pytest.mark.parametrize("begin", [[], [11, 12, 13, 14, 15]])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_stands_once_before_generated_text(family, begin, monkeypatch):
    """With a cache, left padding and a beginning that prompts share, as without and alone."""
    monkeypatch.setattr(generation, "SHARED_TOKENS", 4)
    model, method, _ = put_on(document_model(family), "prefix")
    scramble(model, method, size=0.2)
    adapters.set_training(model, False)
    prompts = [begin + ids(1, length, seed=length)[0].tolist() for length in (4, 9, 6)]
    stops = frozenset[int]()
    answers = generate(model, tiny_tokenizer(), prompts, Decoding(max_new_tokens=6), stops=stops)
    for prompt, answer in zip(prompts, answers, strict=True):
        for _ in range(6):
            prompt = [*prompt, int(logits(model, torch.tensor([prompt]))[0, -1].argmax())]
        assert list(answer.tokens) == prompt[-6:]


def test_a_prefix_makes_its_own_cache_when_asked():
    model, method, _ = adapted("llama", "prefix")
    scramble(model, method)
    given = ids(2, 8)
    with torch.no_grad():
        first = model(given[:, :5])
        second = model(given[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    together = torch.cat([first.logits, second.logits], dim=1)
    assert distance(together, logits(model, given)) <= 1e-6


def test_prefix_starts():
    for init in ("zero", "random"):
        model, _, _ = adapted("llama", "prefix", init=init)
        (tensor,) = adapters.trainable(model).values()
        assert bool(tensor.any()) is (init == "random")
    method = method_of("prefix")
    with pytest.raises(ValueError, match="no text"):
        method.start(model, [], [])


def test_a_short_text_is_repeated():
    model = tiny_model("llama")
    method = method_of("prefix", tokens=5)
    sites = method.sites(find_sites(model))
    adapters.attach(method, model, sites, seed=0)
    short = batch(torch.tensor([[7, 8, 2, 2]]))
    short.labels[:, 2:] = -100
    method.start(model, sites, [short])
    rest = ids(1, 4)
    whole = logits(tiny_model("llama"), torch.cat([torch.tensor([[7, 8, 7, 8, 7]]), rest], dim=1))
    assert distance(logits(model, rest), whole[:, 5:]) <= 1e-6


def test_a_model_without_known_keys_has_no_prefix():
    sites = [site for site in find_sites(tiny_model("llama")) if site.role != "k"]
    with pytest.raises(BadInput, match="width") as error:
        method_of("prefix").sites(sites)
    assert error.value.id == "target.unsupported"


def test_without_known_roles_ia3_asks_for_names():
    sites = [
        site for site in find_sites(tiny_model("llama")) if site.role not in ("k", "v", "down")
    ]
    with pytest.raises(BadInput, match="keys") as error:
        method_of("ia3").sites(sites)
    assert error.value.id == "target.no-match"
