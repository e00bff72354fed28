"""Quantised bases: what is held, what stays dense, and the same maths as with dense weights."""

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, Qwen2MoeConfig

from lorakit.errors import BadInput, EnvironmentLacks, RunFailed
from lorakit.model import quantized
from lorakit.model.frozen import dense_weight, frozen_product
from lorakit.model.quantized import Quantization, QuantizedLinear, Scratch
from lorakit.model.quantizer import quantizable
from lorakit.model.sites import find_sites
from tests.model.finding import edit, find, load
from tests.tiny import (
    FAMILIES,
    SMALL,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    write_tiny_model,
    write_wide_model,
)

torch.set_num_threads(1)

FORMS = [Quantization("nf4"), Quantization("nf4", False), Quantization("fp4"), Quantization("int8")]
BITS = {"nf4": "load_in_4bit", "fp4": "load_in_4bit", "int8": "load_in_8bit"}


@pytest.fixture(params=FORMS, ids=str)
def how(request: pytest.FixtureRequest) -> Quantization:
    return request.param


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def by_transformers(folder: Path, how: Quantization) -> nn.Module:
    """Load a folder as users of transformers quantise it."""
    settings = BitsAndBytesConfig(
        **{BITS[how.form]: True},
        bnb_4bit_quant_type=how.form if how.form != "int8" else "fp4",
        bnb_4bit_use_double_quant=how.double,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32
    )


def quantized_in(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def dense_twin(model: nn.Module, folder: Path) -> nn.Module:
    """Return an ordinary model with linear layers that hold the dequantised weights."""
    twin = load(find(folder), dtype=model.dtype)
    for name, module in quantized_in(model).items():
        linear = nn.Linear(module.inputs, module.outputs, bias=False)
        linear.weight = nn.Parameter(module.dense().clone(), requires_grad=False)
        linear.bias = module.bias
        twin.set_submodule(name, linear)
    return twin


def ids() -> torch.Tensor:
    return torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(3))


def test_the_same_values_are_held_as_transformers_holds(
    tmp_path: Path, family: str, how: Quantization
) -> None:
    folder = write_tiny_model(tmp_path / "model", family)
    ours, theirs = load(find(folder), quantization=how), by_transformers(folder, how)
    held = quantized_in(ours)
    assert held.keys() == {
        name
        for name, m in theirs.named_modules()
        if type(m).__name__.startswith("Linear") and type(m) is not nn.Linear
    }
    for name, module in held.items():
        weight = theirs.get_submodule(name).weight
        assert torch.equal(module.weight, weight.data)
        if how.form != "int8":
            assert torch.equal(module.scales.absmax, weight.quant_state.absmax)
            assert (module.scales.state2 is not None) is how.double


def test_head_embeddings_and_norms_stay_dense_and_sites_are_the_same(
    tmp_path: Path, family: str
) -> None:
    folder = write_tiny_model(tmp_path / "model", family)
    dense, held = load(find(folder)), load(find(folder), quantization=FORMS[0])
    assert find_sites(held) == find_sites(dense)
    assert {site.name for site in quantizable(dense)} == quantized_in(held).keys()
    for name, tensor in dense.state_dict().items():
        if name.removesuffix(".weight") not in quantized_in(held):
            assert torch.equal(held.state_dict()[name], tensor), name
    assert type(held.get_output_embeddings()) is nn.Linear
    assert not any(parameter.requires_grad for parameter in held.parameters())
    assert not hasattr(held.config, "quantization_config")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_outputs_and_gradients_are_those_of_the_dense_weight(
    tmp_path: Path, family: str, how: Quantization, dtype: torch.dtype
) -> None:
    folder = write_tiny_model(tmp_path / "model", family)
    model = load(find(folder), quantization=how, dtype=dtype)
    grads = []
    for one in (model, dense_twin(model, folder)):
        x = one.get_input_embeddings()(ids()).detach().requires_grad_()
        logits = one(inputs_embeds=x, use_cache=False).logits
        logits.float().logsumexp(-1).sum().backward()
        grads.append((logits, x.grad))
    (logits, grad), (expected, expected_grad) = grads
    assert torch.equal(logits, expected)
    assert grad.abs().max() > 0
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(37, 48), (64, 96), (5, 544), (40, 64), (3, 10)], ids=str)
def test_values_are_the_codes_times_the_scales_of_their_blocks(
    shape: tuple[int, int], double: bool
) -> None:
    """Looked up one by one, however blocks of 64 values lie across the rows."""
    module = QuantizedLinear(shape, torch.float32, Quantization("nf4", double), Scratch())
    module.take(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    packed = module.weight.flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: shape[0] * shape[1]]
    values = module.scales.code[codes.long()]
    scales = module._scales.repeat_interleave(64)[: len(values)]
    assert torch.equal(module.dense(), (values * scales).view(shape))


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_product_without_bias_keeps_nothing_dense(form: str) -> None:
    module = QuantizedLinear((6, 8), torch.float32, Quantization(form), Scratch())
    module.take(torch.randn(6, 8))
    x, G = torch.randn(3, 8, requires_grad=True), torch.randn(3, 6)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        frozen_product(x, module).backward(G)
    assert not kept
    assert torch.equal(x.grad, G @ dense_weight(module))


def test_a_bias_that_is_trained_gets_its_gradient() -> None:
    module = QuantizedLinear((6, 8), torch.float32, FORMS[0], Scratch())
    module.take(torch.randn(6, 8))
    bias, x = torch.randn(6, requires_grad=True), torch.randn(2, 3, 8)
    module.product(x, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 6.0))


def test_one_buffer_serves_all_and_grows_to_the_largest() -> None:
    scratch = Scratch()
    modules = []
    for shape in ((4, 8), (16, 8), (8, 8)):
        module = QuantizedLinear(shape, torch.bfloat16, Quantization("int8"), scratch)
        module.take(torch.randn(shape).bfloat16())
        modules.append(module)
    small, large, middle = (module.dense() for module in modules)
    assert [tuple(one.shape) for one in (small, large, middle)] == [(4, 8), (16, 8), (8, 8)]
    assert middle.data_ptr() == large.data_ptr() == modules[0].dense().data_ptr()
    device = torch.device("cpu")
    assert scratch.matrix(16, 8, device, torch.float32).data_ptr() != large.data_ptr()


def test_a_copy_of_the_model_is_the_model(tmp_path: Path) -> None:
    model = load(find(write_tiny_model(tmp_path / "model")), quantization=FORMS[0])
    again = copy.deepcopy(model)
    assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_routers_and_fused_experts_stay_dense() -> None:
    config = Qwen2MoeConfig(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        **tiny_config("llama").to_diff_dict() | {"model_type": "qwen2_moe"},
    )
    model = AutoModelForCausalLM.from_config(config)
    leaves = {site.name.rpartition(".")[2] for site in quantizable(model)}
    assert leaves == set("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
    assert any(name.endswith("shared_expert_gate") for name, _ in model.named_modules())


EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "hunyuan_v1_moe": ("mlp.gate.wg", {"num_experts": 4, "moe_topk": 2, "head_dim": 8}),
    "jetmoe": ("mlp.router.layer", {"num_local_experts": 4, "kv_channels": 8}),
    "longcat_flash": ("mlp.router.classifier", {"n_routed_experts": 4}),
    "gemma4_text": (
        "router.proj",
        {
            "head_dim": 8,
            "global_head_dim": 8,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "dbrx": (
        "ffn.router.layer",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0},
            "ffn_config": {
                "ffn_hidden_size": 48,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "hidden_size": 32,
            },
        },
    ),
}


@pytest.mark.parametrize("family", EXPERTS)
def test_a_router_that_holds_its_layer_within_stays_dense(family: str) -> None:
    router, settings = EXPERTS[family]
    shape = {"vocab_size": 320} if family == "dbrx" else SMALL
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, **settings))
    linear = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert any(name.endswith(router) for name in linear)
    quantised = {site.name for site in quantizable(model)}
    assert not [name for name in quantised if "router" in name or ".gate." in name]
    assert any(name.endswith("_proj") or "attn" in name for name in quantised)
    gates = {name for name in linear if name.endswith("mlp.gate_proj")}
    assert gates <= quantised


@pytest.mark.parametrize("stored", [FORMS[0], FORMS[2], FORMS[3]], ids=str)
def test_a_folder_that_is_stored_quantised_loads_as_it_is(
    tmp_path: Path, family: str, stored: Quantization
) -> None:
    folder = write_tiny_model(tmp_path / "model", family)
    by_transformers(folder, stored).save_pretrained(tmp_path / "stored")
    tiny_tokenizer().save_pretrained(tmp_path / "stored")
    found = find(tmp_path / "stored")
    assert found.stored is not None
    assert found.stored.form == stored.form
    held, expected = load(found), load(find(folder), quantization=stored)
    assert find_sites(held) == find_sites(expected)
    for name, module in quantized_in(expected).items():
        assert torch.equal(held.get_submodule(name).dense(), module.dense())
    assert torch.equal(held(input_ids=ids()).logits, expected(input_ids=ids()).logits)
    assert torch.equal(
        load(find(tmp_path / "stored", quantization=stored.form))(input_ids=ids()).logits,
        held(input_ids=ids()).logits,
    )
    other = "int8" if stored.form != "int8" else "nf4"
    with pytest.raises(BadInput, match=f"stored as {stored.form}, not {other}") as refused:
        find(tmp_path / "stored", quantization=other)
    assert refused.value.id == "recipe.conflict"


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "fp8"])
def test_other_stored_forms_are_named(tmp_path: Path, method: str) -> None:
    folder = write_tiny_model(tmp_path / "model")
    edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(BadInput, match=f"quantised by {method}") as refused:
        find(folder)
    assert refused.value.id == "model.bad-config"
    assert "model.quantization" in (refused.value.help or "")


@pytest.mark.parametrize(
    "values",
    [
        "nf4",
        {"quant_method": "bitsandbytes"},
        {"load_in_4bit": True, "load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"},
        {"load_in_4bit": True, "llm_int8_skip_modules": "lm_head"},
        {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
    ],
    ids=str,
)
def test_wrong_values_of_a_stored_form_are_refused(tmp_path: Path, values: object) -> None:
    folder = write_tiny_model(tmp_path / "model")
    edit(folder / "config.json", quantization_config=values)
    with pytest.raises(BadInput, match="quantization_config") as refused:
        find(folder)
    assert refused.value.id == "model.bad-config"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_found_before_it_is_quantised(
    tmp_path: Path, value: float
) -> None:
    model = tiny_model("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[3, :2] = value
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(RunFailed, match=r"layers\.1\.mlp\.up_proj\.weight holds 2 ") as refused:
        load(find(tmp_path / "model"), quantization=FORMS[0])
    assert refused.value.id == "model.not-finite"
    assert str(tmp_path) in str(refused.value.where)


def test_without_bitsandbytes_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_model(tmp_path / "model")
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentLacks, match=r"model\.quantization: bitsandbytes") as lacks:
        find(folder, quantization="nf4")
    assert lacks.value.id == "env.missing-package"
    assert "pip install" in (lacks.value.help or "")
    find(folder)


def tensor_bytes() -> int:
    """Return what all tensors of this process take, each piece of memory counted once."""
    found = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    alive = [one for one in found if not isinstance(one, FakeTensor)]  # of a compiler before us
    return sum({one.data_ptr(): one.nbytes for one in alive if one.device.type == "cpu"}.values())


def test_loading_never_holds_more_than_one_shard_besides_what_it_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = write_wide_model(tmp_path / "model")
    files = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    shard = max((tmp_path / "model" / file).stat().st_size for file in files["weight_map"].values())
    found = find(tmp_path / "model")
    gc.collect()
    before, peak, take = tensor_bytes(), 0, QuantizedLinear.take

    def watched(module: QuantizedLinear, weight: torch.Tensor) -> None:
        nonlocal peak
        take(module, weight)
        peak = max(peak, tensor_bytes())

    monkeypatch.setattr(QuantizedLinear, "take", watched)
    held = load(found, quantization=FORMS[0])
    mapped = Path("/proc/self/maps")
    assert not mapped.is_file() or str(tmp_path) not in mapped.read_text(), "read, not mapped"
    kept = sum(parameter.nbytes for parameter in held.parameters())
    assert kept < 0.2 * stored
    assert kept < peak - before < kept + shard < 0.3 * stored
