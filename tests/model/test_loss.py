"""The loss: equal to transformers' own on every path, with exact gradients."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lorakit.model import liger, loss
from lorakit.model.families import CAPPED, KNOWN, head_of
from lorakit.model.loss import head_loss, take_faster, token_loss, token_scores, way_of
from tests.adapters.adapted import put_on, scramble
from tests.model.batches import Rows, documents, packed, padded
from tests.tiny import FAMILIES, VOCABULARY, known_model, tiny_model

torch.set_num_threads(1)


class Unwaited(TorchDispatchMode):
    """Refuse every operation whose result a host would have to wait for on a GPU."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        waits = operation._overloadpacket in (
            aten._local_scalar_dense,
            aten.equal,
            aten.is_nonzero,
            aten.masked_select,
            aten.nonzero,
        )
        if operation._overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            waits = any(at is not None and at.dtype is torch.bool for at in args[1])
        assert not waits, f"{operation} makes the host wait"
        return operation(*args, **(kwargs or {}))


class Adapted(nn.Module):
    """Stand in for a site that an adapter wraps."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


def wrap(model: PreTrainedModel) -> None:
    model.set_output_embeddings(Adapted(model.get_output_embeddings()))


def train(model: PreTrainedModel) -> None:
    model.get_output_embeddings().weight.requires_grad_()


def hook(model: PreTrainedModel) -> None:
    model.register_forward_hook(lambda *_: None)


def leave(model: PreTrainedModel) -> None:
    pass


def frozen(
    family: str, dtype: torch.dtype = torch.float32, *, tied: bool = False
) -> PreTrainedModel:
    return train_a_layer(tiny_model(family, dtype=dtype, tied=tied))


def train_a_layer(model: PreTrainedModel) -> PreTrainedModel:
    layers = next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList))
    model.requires_grad_(False)
    layers[0].requires_grad_()
    return model


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the rows into chunks of four, so that several are needed."""
    monkeypatch.setattr(loss, "CHUNK_ROWS", (1, 4))


def transformers_loss(model: PreTrainedModel, batch: object) -> Tensor:
    """Return transformers' own loss with a mask for the padding, as a sum."""
    mask = torch.ones_like(batch.input_ids)
    for row, labels in enumerate(batch.labels):
        mask[row, len(labels) - int((batch.input_ids[row] == 2).sum()) :] = 0
    return model(
        input_ids=batch.input_ids, attention_mask=mask, labels=batch.labels, num_items_in_batch=1
    ).loss


@pytest.mark.parametrize(
    ("change", "plain"), [(leave, True), (wrap, False), (train, False), (hook, False)]
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_paths_equal_transformers_on_padded_rows(
    family: str,
    tied: bool,
    change: Callable[[PreTrainedModel], None],
    plain: bool,
    small_chunks: None,
) -> None:
    model = frozen(family, torch.float64, tied=tied)
    batch = padded(documents(11, 6, 9))
    expected = transformers_loss(model, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    reference = torch.autograd.grad(expected, trained)
    change(model)
    head = head_of(model)
    assert (head is not None and head.linear is not None) is plain
    ours = token_loss(model, batch)
    # transformers computes its cross-entropy in fp32.
    torch.testing.assert_close(ours.float(), expected.float(), rtol=1e-6, atol=0)
    for mine, theirs in zip(torch.autograd.grad(ours, trained), reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_the_paths_equal_each_other_exactly_in_fp64(small_chunks: None) -> None:
    model = frozen("llama", torch.float64)
    batch = padded(documents(11, 6, 9))
    trained = [p for p in model.parameters() if p.requires_grad]
    fast = token_loss(model, batch)
    fast_grads = torch.autograd.grad(fast, trained)
    wrap(model)
    slow = token_loss(model, batch)
    torch.testing.assert_close(fast, slow, rtol=1e-13, atol=0)
    for mine, theirs in zip(fast_grads, torch.autograd.grad(slow, trained), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("with_bias", [False, True])
def test_head_loss_passes_gradcheck(with_bias: bool, small_chunks: None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(7, generator=generator, dtype=torch.float64) if with_bias else None
    targets = torch.randint(7, (9,), generator=generator)
    assert torch.autograd.gradcheck(lambda h: 3 * head_loss(h, weight, bias, targets), (hidden,))
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")
    torch.testing.assert_close(head_loss(hidden, weight, bias, targets), expected)


def test_targets_whose_probability_is_zero_in_fp32_have_their_loss(small_chunks: None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = (300 * torch.randn(9, 4, generator=generator)).requires_grad_()
    weight, targets = torch.randn(11, 4, generator=generator), torch.arange(9)
    logits = hidden.double() @ weight.t().double()
    assert logits.float().softmax(-1).gather(1, targets[:, None]).min() == 0
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    found = head_loss(hidden, weight, None, targets)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(found, hidden)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, hidden)[0])


def stand_in(
    monkeypatch: pytest.MonkeyPatch, seconds: float, error: float = 0.0, factor: float | None = 1.0
) -> list[int]:
    """Put a library of Liger's signature in its place, whose loss and gradient are as asked.

    Ours takes a second, so say the clocks. Returns how many tokens each of its calls got.
    """
    calls: list[int] = []

    def fused_linear_cross_entropy_forward(
        given: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **how: Any
    ) -> tuple[Any, ...]:
        expected = {"reduction": "sum", "compute_gradients": True, "weight_requires_grad": False}
        assert how == expected
        calls.append(len(target))
        with torch.enable_grad():
            hidden = given.detach().requires_grad_()
            total = F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="sum")
            (grad,) = torch.autograd.grad(total, hidden)
        grad = None if factor is None else factor * grad
        return (1 + error) * total.detach(), None, None, None, grad, None, None

    def timed(way: Any, *given: Any) -> tuple[float, Tensor, float]:
        total, grad = way(*given)
        return total.item(), grad, 1.0 if way is loss._in_chunks else seconds

    library = SimpleNamespace(fused_linear_cross_entropy_forward=fused_linear_cross_entropy_forward)
    package = SimpleNamespace(fused_linear_cross_entropy=library)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(ops=package))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", package)
    monkeypatch.setattr(liger, "find_spec", lambda _: True)
    monkeypatch.setattr(loss, "_timed", timed)
    monkeypatch.setattr(loss, "_liger", None)
    return calls


def test_ligers_loss_is_taken_where_it_is_faster_and_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = frozen("llama"), padded(documents(11, 6, 9))
    trained = [p for p in model.parameters() if p.requires_grad]
    own = token_loss(model, batch)
    expected = torch.autograd.grad(own, trained)
    stand_in(monkeypatch, 1.1)
    assert take_faster(model, 20) == "own"
    assert take_faster(model, 20, at_any_speed=True) == "liger"
    calls = stand_in(monkeypatch, 0.9)
    assert take_faster(model, 20) == "liger"
    assert calls == [20]
    theirs = token_loss(model, batch)
    assert len(calls) == 2
    torch.testing.assert_close(theirs, own, rtol=1e-6, atol=0)
    for mine, other in zip(expected, torch.autograd.grad(theirs, trained), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    wrap(model)  # as an adapter does
    assert take_faster(model, 20) == "own"


@pytest.mark.parametrize(
    ("error", "factor", "reason"),
    [
        (0.01, 1.0, "is another: "),
        (0.0, 100.0, "has another gradient: "),
        (0.0, float("nan"), "has another gradient: "),
        (0.0, None, "fails: ValueError: it returns no gradient"),
    ],
)
def test_a_library_whose_loss_or_gradient_is_wrong_leaves_our_loss(
    error: float, factor: float | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, 0.5, error, factor)
    assert take_faster(frozen("llama"), 20).startswith(f"own, for Liger's {reason}")
    assert loss._liger is None


def test_a_library_that_fails_leaves_our_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen("llama")
    monkeypatch.setattr(liger, "find_spec", lambda _: None)
    assert take_faster(model, 20) == "own"
    stand_in(monkeypatch, 0.5)
    package = sys.modules["liger_kernel.ops"]
    monkeypatch.setattr(package, "fused_linear_cross_entropy", SimpleNamespace())
    assert take_faster(model, 20).startswith("own, for Liger's fails: AttributeError: ")


def test_bf16_hidden_states_give_an_fp32_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(90, 16, generator=generator).bfloat16()
    targets = torch.randint(90, (40,), generator=generator)
    value = head_loss(hidden, weight, None, targets)
    assert value.dtype is torch.float32
    (grad,) = torch.autograd.grad(value, hidden)
    exact = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(exact @ weight.double().T, targets, reduction="sum")
    assert grad.dtype is torch.bfloat16
    # 8 bits of mantissa in the logits, of size about 10.
    torch.testing.assert_close(value.double(), expected, rtol=1e-2, atol=0)
    (reference,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(grad.double(), reference, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("change", [leave, wrap])
def test_scores_are_the_loss_token_by_token(
    change: Callable[[PreTrainedModel], None], small_chunks: None
) -> None:
    model = frozen("qwen2")
    rows = documents(8, 5, 12)
    batch = padded(rows)
    change(model)
    nll, hits = token_scores(model, batch)
    assert len(nll) == int((batch.labels != -100).sum())
    torch.testing.assert_close(nll.sum(), token_loss(model, batch))
    place = 0
    for ids, labels in rows:
        logits = model(input_ids=ids[None]).logits[0]
        for at in (labels != -100).nonzero().flatten().tolist():
            expected = F.cross_entropy(logits[at - 1], labels[at])
            torch.testing.assert_close(nll[place], expected, rtol=1e-4, atol=1e-5)
            assert bool(hits[place]) is (logits[at - 1].argmax().item() == labels[at].item())
            place += 1


@pytest.mark.parametrize("change", [leave, wrap])
def test_a_batch_without_trained_tokens_costs_nothing_and_keeps_its_graph(
    change: Callable[[PreTrainedModel], None],
) -> None:
    model = frozen("llama")
    change(model)
    batch = padded([(ids, torch.full_like(ids, -100)) for ids, _ in documents(4, 3)])
    value = token_loss(model, batch)
    assert value.item() == 0
    value.backward()
    assert all(
        parameter.grad is None or not parameter.grad.any() for parameter in model.parameters()
    )
    nll, hits = token_scores(model, batch)
    assert nll.shape == hits.shape == (0,)


@pytest.mark.parametrize("change", [leave, wrap])
@pytest.mark.parametrize("lay", [packed, padded])
@pytest.mark.parametrize("family", sorted(KNOWN))
def test_a_micro_batch_never_makes_the_host_wait_for_a_device(
    family: str,
    lay: Callable[..., Rows],
    change: Callable[[PreTrainedModel], None],
    small_chunks: None,
) -> None:
    model = known_model(family).float().requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    change(model)
    batch = lay(documents(9, 5, 12))
    with Unwaited():
        token_loss(model, batch).backward()
        token_scores(model, batch)


def capped(family: str) -> PreTrainedModel:
    """Return a model of a family whose logits, where they can be, are capped where it matters."""
    model = train_a_layer(known_model(family))
    model.set_attn_implementation("eager")
    if family in CAPPED:
        model.config.final_logit_softcapping = 2.0
    return model


def lora_on_the_head(model: PreTrainedModel) -> None:
    _, method, _ = put_on(model, "lora", target_modules=["lm_head", "q_proj"])
    scramble(model, method)
    model.double()


def copy_of_the_head(model: PreTrainedModel) -> None:
    _, method, _ = put_on(model, "lora", modules_to_save=["lm_head"])
    scramble(model, method)
    model.double()


@pytest.mark.parametrize("change", [leave, wrap, train, lora_on_the_head, copy_of_the_head])
@pytest.mark.parametrize("family", ["llama", "phi", *sorted(CAPPED)])
def test_a_head_run_by_chunks_is_the_models_own_logits_exactly(
    family: str,
    change: Callable[[PreTrainedModel], None],
    small_chunks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = capped(family), padded(documents(11, 6, 9))
    change(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert way_of(model) == ("ready" if change is leave else "again")
    ours = token_loss(model, batch)
    grads = torch.autograd.grad(ours, trained)
    nll, hits = token_scores(model, batch)
    monkeypatch.setattr(loss, "head_of", lambda _: None)
    expected = token_loss(model, batch)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12 * theirs.abs().max().item())
    torch.testing.assert_close((nll, hits), token_scores(model, batch))


class Widest(TorchDispatchMode):
    """Find the most rows of logits that are ever in one tensor, the model's own left out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.rows, self.held = 0, {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = operation(*args, **(kwargs or {}))
        for made in (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            if made.shape[-1:] == (VOCABULARY,) and made.untyped_storage()._cdata not in self.held:
                self.rows = max(self.rows, made.numel() // VOCABULARY)
        return out


@pytest.mark.parametrize("change", [leave, wrap, lora_on_the_head])
@pytest.mark.parametrize("family", ["llama", *sorted(CAPPED)])
def test_there_are_never_logits_for_more_rows_than_a_chunk(
    family: str, change: Callable[[PreTrainedModel], None], small_chunks: None
) -> None:
    model = capped(family)
    change(model)
    with Widest(model) as seen:
        token_loss(model, padded(documents(30, 30, 30))).backward()
        token_scores(model, padded(documents(30, 30, 30)))
    assert seen.rows == 4


class OfItsOwn(LlamaForCausalLM):
    """A model with a forward pass of its own, which knows of no rows to leave out."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, use_cache: bool = False, **rest: Any
    ) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))


class Deaf(OfItsOwn):
    """A model that takes the rows to keep, and keeps all."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, use_cache: bool = False, logits_to_keep: int = 0
    ) -> CausalLMOutputWithPast:
        return super().forward(input_ids, use_cache)


@pytest.mark.parametrize("kind", [OfItsOwn, Deaf])
def test_a_model_that_makes_all_logits_has_its_loss(kind: type[LlamaForCausalLM]) -> None:
    model, batch = frozen("llama"), padded(documents(11, 6, 9))
    own = kind(model.config)
    own.load_state_dict(model.state_dict())
    expected = token_loss(model, batch)
    own.config.model_type = "of its own"
    assert way_of(own) == "whole"
    torch.testing.assert_close(token_loss(own.eval(), batch), expected)
