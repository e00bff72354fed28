"""Packed attention: equal to separate rows, blind across documents, equal to SDPA elsewhere."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorakit import devices
from lorakit.model import attention
from lorakit.model.attention_kernels import (
    TILE,
    OnDevice,
    OnHost,
    grouped_gradients,
    kernel_for,
)
from lorakit.model.checkpointing import checkpoint_layers
from lorakit.model.documents import STEP, Documents, has_flash
from lorakit.model.families import KNOWN
from lorakit.model.inputs import forward_inputs
from lorakit.model.loss import token_loss
from tests.model.batches import Rows, documents, packed, padded
from tests.tiny import FAMILIES, known_model, tiny_config, tiny_model

torch.set_num_threads(1)

LENGTHS = (9, 5, 5, 1, 12)


def gradients(loss: Tensor, model: PreTrainedModel) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(named.items(), grads, strict=True)
    }


def assert_equal_training(
    model: PreTrainedModel, batch: Rows, singles: list[Rows], tolerance: float
) -> None:
    one = token_loss(model, batch)
    many = torch.stack([token_loss(model, single) for single in singles]).sum()
    torch.testing.assert_close(one, many, rtol=tolerance, atol=tolerance)
    expected = gradients(many, model)
    for name, grad in gradients(one, model).items():
        scale = expected[name].abs().max().item() + 1
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=tolerance * scale, msg=name)


def plain(rows: list[tuple[Tensor, Tensor]]) -> list[Rows]:
    return [padded([row]) for row in rows]


@pytest.mark.parametrize("implementation", [attention.NAME, "sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_and_gradients_equal_unpacked(
    family: str, dtype: torch.dtype, tolerance: float, implementation: str
) -> None:
    model = tiny_model(family, dtype=dtype)
    model.set_attn_implementation(implementation)
    rows = documents(*LENGTHS)
    if implementation == "eager":
        tolerance = max(tolerance, 1e-6)  # its softmax is in fp32
    assert_equal_training(model, packed(rows), plain(rows), tolerance)
    assert_equal_training(model, padded(rows), plain(rows), tolerance)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 99))
@settings(max_examples=20)
def test_any_documents_pack_in_any_order(lengths: list[int], seed: int) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    model.set_attn_implementation(attention.NAME)
    rows = documents(*lengths, seed=seed)
    packed_loss = token_loss(model, packed(rows))
    torch.testing.assert_close(packed_loss, token_loss(model, packed(rows[::-1])))
    torch.testing.assert_close(packed_loss, token_loss(model, padded(rows)))


@pytest.mark.parametrize("family", sorted(KNOWN))
def test_every_known_family_keeps_packed_documents_apart(family: str) -> None:
    model = known_model(family)
    rows = documents(*LENGTHS)
    one = token_loss(model, packed(rows))
    model.set_attn_implementation("sdpa")
    many = sum(token_loss(model, single) for single in plain(rows))
    torch.testing.assert_close(one, many, rtol=1e-11, atol=1e-11)
    # And the loss above must not be the fast path's own idea of the model.
    logits = [model(input_ids=ids[None]).logits[0] for ids, _ in rows]
    reference = sum(
        torch.nn.functional.cross_entropy(row[:-1], labels[1:], reduction="sum")
        for row, (_, labels) in zip(logits, rows, strict=True)
        if (labels != -100).any()
    )
    torch.testing.assert_close(one, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_are_blind_to_each_other_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    model.set_attn_implementation(attention.NAME)
    rows = documents(*LENGTHS)
    before = model(**forward_inputs(model, packed(rows))).logits[0].split(LENGTHS)
    for changed in range(len(rows)):
        others = list(rows)
        ids, labels = rows[changed]
        others[changed] = ((ids - 3 + 7) % 300 + 3, labels)
        after = model(**forward_inputs(model, packed(others))).logits[0].split(LENGTHS)
        for place in range(len(rows)):
            assert torch.equal(before[place], after[place]) is (place != changed)


def test_sliding_windows_are_honoured() -> None:
    rows = documents(13, 4, 7)
    model = known_model("mistral", sliding_window=4)
    assert_equal_training(model, packed(rows), plain(rows), 1e-12)
    ours = token_loss(model, padded(rows))
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(ours, token_loss(model, padded(rows)), rtol=1e-12, atol=0)
    wide = known_model("mistral", sliding_window=99)
    assert abs(token_loss(wide, packed(rows)) - ours) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_left_padding_equals_sdpa(family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(3, 300, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    outputs = []
    for name in ("sdpa", attention.NAME):
        model.set_attn_implementation(name)
        outputs.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None
            )
        )
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_give_the_same_bits(family: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(attention.NAME)
    batch = packed(documents(*LENGTHS))
    kept = token_loss(model, batch)
    expected = gradients(kept, model)
    for count in (1, None):
        assert checkpoint_layers(model, count) == (count or 2)
        loss = token_loss(model, batch)
        assert torch.equal(loss, kept)
        for name, grad in gradients(loss, model).items():
            assert torch.equal(grad, expected[name]), name
    assert checkpoint_layers(model, 0) == 0
    assert not any("forward" in vars(module) for module in model.modules())


def test_checkpointing_recomputes_layers_in_eval_mode() -> None:
    model = tiny_model("llama")
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    checkpoint_layers(model, 1)
    token_loss(model, padded(documents(6))).backward()
    assert len(calls) == 2


def test_grouped_gradients_are_those_of_causal_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.3, enable_gqa=True
    )
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    ours = grouped_gradients(grad, q.detach(), k.detach(), v.detach(), 0.3)
    for one, theirs in zip(ours, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(one, theirs)


@given(
    st.lists(
        st.one_of(st.integers(1, 2 * TILE + 5), st.integers(505, 520)), min_size=1, max_size=6
    ),
    st.integers(1, 2),
)
@settings(max_examples=20)
def test_half_precision_attention_of_any_documents_is_that_of_each_alone(
    lengths: list[int], rows: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows * sum(lengths), heads, 8) for heads in (4, 2, 2, 4)]
    q, k, v, grad = (torch.randn(s, generator=generator).bfloat16() for s in shapes)
    kernel = OnHost(Documents.of(tuple(lengths), rows, q.device), 0.3)
    out, kept = kernel.forward(q, k, v)
    ours = (out, *kernel.backward(grad, q, k, v, out, *kept))
    at = 0
    for length in lengths * rows:
        part = slice(at, at + length)
        alone = [s[part].float().transpose(0, 1)[None].requires_grad_() for s in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(
            *alone, is_causal=True, scale=0.3, enable_gqa=True
        )
        grads = torch.autograd.grad(expected, alone, grad[part].float().transpose(0, 1)[None])
        for one, theirs in zip(ours, (expected.detach(), *grads), strict=True):
            theirs = theirs[0].transpose(0, 1)
            error = (one[part].float() - theirs).norm() / theirs.norm().clamp(min=1)
            assert error < 0.02
        at += length


T4, A10, H100, RTX_5090 = (7, 5), (8, 6), (9, 0), (12, 0)


@pytest.mark.parametrize(
    ("capability", "dim", "served"),
    [
        (None, 64, OnHost),
        (T4, 64, None),
        (A10, 64, OnDevice),
        (A10, 192, OnDevice),
        (A10, 200, None),
        (RTX_5090, 224, None),
        (RTX_5090, 256, OnDevice),
        (H100, 200, OnDevice),
        (H100, 68, None),
        (H100, 264, None),
    ],
)
def test_a_kernel_is_taken_where_the_gpu_has_it(
    capability: tuple[int, int] | None, dim: int, served: type | None
) -> None:
    bounds = torch.empty(2, dtype=torch.int32, device="meta")
    laid = Documents(((1, 10),), bounds if has_flash(capability) else None, capability=capability)
    query = torch.empty(10, 4, dim, dtype=torch.float16, device="meta")
    kernel = kernel_for(query, laid, 0.1, None)
    assert kernel is None if served is None else type(kernel) is served


@pytest.mark.parametrize(("capability", "built"), [(T4, True), (H100, False)])
def test_without_flash_attention_documents_run_one_by_one(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: bool
) -> None:
    """By a kernel that keeps no scores: it asks for as many heads of keys as of queries."""
    monkeypatch.setattr(devices, "capability", lambda _: capability)
    monkeypatch.setattr(devices, "has_flash_kernels", lambda: built)
    laid = Documents.of((5, 3), 1, torch.device("meta"))
    assert laid.capability == capability
    assert laid.bounds is None
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(8, heads, 4, generator=generator) for heads in (4, 2, 2))
    assert kernel_for(q.to("meta"), laid, 0.3, None) is None
    asked: list[tuple[int, bool]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def noted(query: Tensor, key: Tensor, *rest: Any, enable_gqa: bool, **named: Any) -> Tensor:
        asked.append((key.shape[1] - query.shape[1], enable_gqa))
        return real(query, key, *rest, enable_gqa=enable_gqa, **named)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", noted)
    out = attention._run_by_run(q, k, v, laid, 0.3, None, 0.0)
    assert asked == [(0, False), (0, False)]
    torch.testing.assert_close(out, attention.attend(q, k, v, Documents(laid.runs), scale=0.3))


def test_documents_of_about_one_length_share_a_shape() -> None:
    lengths = tuple(range(1, 3 * STEP + 1))
    laid = Documents.of(lengths, 1, torch.device("cpu")).sorted
    assert laid is not None
    assert laid.documents.runs == ((STEP, STEP), (STEP, 2 * STEP), (STEP, 3 * STEP))
    states = torch.arange(float(sum(lengths))).view(-1, 1, 1)
    assert torch.equal(laid.taken_back(laid.laid_out(states)), states)
    assert Documents.of((5, 5), 3, torch.device("cpu")).sorted is None


def test_a_family_that_is_not_verified_never_packs() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bloom", vocab_size=320, hidden_size=32, n_layer=2, n_head=4)
    )
    assert "bloom" in (attention.can_pack(model) or "")
    with pytest.raises(ValueError, match="bloom"):
        forward_inputs(model, packed(documents(3, 4)))
    assert attention.can_pack(tiny_config("llama")) is None
