"""Lean twins of decoder layers: the same loss and gradients as the layers, with less kept."""

from collections import Counter
from collections.abc import Iterable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lorakit import adapters
from lorakit.model import attention
from lorakit.model.families import KNOWN, LLAMA_LIKE, llama_layers
from lorakit.model.inputs import forward_inputs
from lorakit.model.loss import token_loss, token_scores
from tests.adapters.adapted import put_on, scramble
from tests.model.batches import documents, packed, padded
from tests.tiny import known_model

torch.set_num_threads(1)

LENGTHS = (9, 5, 5, 1, 12)
# What a recipe may ask for that changes which parts of a layer are plain low-rank products.
ADAPTERS = {
    "all": ("lora", {}),
    "q and v": ("lora", {"target_modules": ["q_proj", "v_proj"]}),
    "down": ("rslora", {"target_modules": ["down_proj"]}),
    "ranks": (
        "lora",
        {"rank_pattern": {"k_proj": 2, "up_proj": 7}, "alpha_pattern": {"o_proj": 3}},
    ),
    "one layer": ("lora", {"layers": [1]}),
    "norms too": ("lora", {"modules_to_save": ["post_attention_layernorm"]}),
    "a whole copy": (
        "lora",
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["up_proj", "o_proj"]},
    ),
    "dora": ("dora", {}),
    "ia3": ("ia3", {}),
}


def in_fp64(model: PreTrainedModel) -> None:
    """Widen a model whole: transformers' own RMSNorm would compute in fp32."""
    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(exact_norm, module)


def exact_norm(norm: torch.nn.Module, x: Tensor) -> Tensor:
    return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def twins_off(model: PreTrainedModel) -> None:
    for layer in llama_layers(model):
        del layer.forward


def loss_and_gradients(model: PreTrainedModel, batch: object) -> tuple[Tensor, dict[str, Tensor]]:
    trained = adapters.trainable(model)
    torch.manual_seed(7)
    loss = token_loss(model, batch)
    grads = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    return loss.detach(), dict(zip(trained, grads, strict=True))


def assert_equal(model: PreTrainedModel, batch: object, tolerance: float) -> None:
    loss, grads = loss_and_gradients(model, batch)
    twins_off(model)
    expected_loss, expected = loss_and_gradients(model, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    for name, grad in grads.items():
        bound = tolerance * expected[name].norm() + 1e-30
        assert (grad - expected[name]).norm() <= bound, name


@pytest.mark.parametrize("family", sorted(LLAMA_LIKE))
@pytest.mark.parametrize("about", ADAPTERS)
def test_a_twin_is_its_layer(family: str, about: str) -> None:
    name, settings = ADAPTERS[about]
    model, method, _ = put_on(known_model(family), name, **settings)
    scramble(model, method)
    in_fp64(model)
    assert len(llama_layers(model)) == 2
    batch = packed(documents(*LENGTHS)) if about != "down" else padded(documents(*LENGTHS))
    assert_equal(model, batch, 1e-10)


@pytest.mark.parametrize("family", sorted(LLAMA_LIKE))
def test_biases_windows_and_wide_heads(family: str) -> None:
    changes = {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "sliding_window": 4}
    model, method, _ = put_on(known_model(family, **changes), "lora")
    scramble(model, method)
    in_fp64(model)
    assert_equal(model, packed(documents(*LENGTHS)), 1e-10)


def test_dropout_falls_on_the_inputs_of_each_update() -> None:
    model, method, _ = put_on(
        known_model("llama"), "lora", dropout=0.4, target_modules=["o_proj", "down_proj"]
    )
    scramble(model, method)
    in_fp64(model)
    adapters.set_training(model, True)
    assert_equal(model, packed(documents(*LENGTHS)), 1e-10)
    adapters.set_training(model, False)
    still = token_loss(model, packed(documents(*LENGTHS)))
    adapters.set_training(model, True)
    assert token_loss(model, packed(documents(*LENGTHS))) != still


def test_in_bf16_a_twin_is_as_exact_as_its_layer() -> None:
    model, method, _ = put_on(known_model("llama").bfloat16(), "lora")
    for layer in adapters.layers_of(model):
        layer.float()
    scramble(model, method, size=0.05)
    wide, _, _ = put_on(known_model("llama"), "lora")
    wide.load_state_dict(model.state_dict())
    batch = packed(documents(*LENGTHS))
    truth = flat(loss_and_gradients(wide, batch)[1])
    of_twin = flat(loss_and_gradients(model, batch)[1])
    twins_off(model)
    of_layer = flat(loss_and_gradients(model, batch)[1])
    assert 0 < (of_twin - truth).norm() <= 1.5 * (of_layer - truth).norm() < 0.2 * truth.norm()


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in named.values()])


def test_switched_off_a_twin_is_the_base() -> None:
    batch = packed(documents(*LENGTHS))
    base = known_model("qwen2")
    in_fp64(base)
    before = token_scores(base, batch)[0]
    model, method, _ = put_on(base, "lora")
    scramble(model, method)
    with adapters.switched_off(model):
        torch.testing.assert_close(token_scores(model, batch)[0], before, rtol=1e-12, atol=1e-12)
    assert (token_scores(model, batch)[0] - before).abs().max() > 1e-3


def test_generation_runs_the_layers_own_forward() -> None:
    model, method, _ = put_on(known_model("llama"), "lora")
    scramble(model, method)
    given = torch.randint(3, 300, (2, 6), generator=torch.Generator().manual_seed(0))
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    out = model.generate(given, attention_mask=torch.ones_like(given), **asked)
    twins_off(model)
    assert torch.equal(out, model.generate(given, attention_mask=torch.ones_like(given), **asked))


VIEWS = """
    view t transpose slice split split_with_sizes unsqueeze detach alias _unsafe_view chunk expand
    empty empty_like select promote_types
""".split()


class Counted(TorchDispatchMode):
    """Counts what is computed, and how often a master is read for it."""

    def __init__(self, masters: Iterable[Tensor]) -> None:
        super().__init__()
        self.masters = {tensor.data_ptr() for tensor in masters}
        self.operations: Counter[str] = Counter()
        self.reads = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._overloadpacket.__name__
        if name not in VIEWS:
            self.operations[name] += 1
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.reads += any(tensor.data_ptr() in self.masters for tensor in tensors)
        return operation(*args, **(kwargs or {}))


class NoKernel:
    """In place of attention, whose operations depend on the CPU."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        return torch.empty_like(q), []

    def backward(self, grad: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in kept[:3])


def operations(layers: int) -> tuple[Counter[str], Counter[str]]:
    """Return what a model of bf16 computes, forward and backward, after its first micro-batch."""
    model, method, _ = put_on(known_model("llama", num_hidden_layers=layers).bfloat16(), "lora")
    for layer in adapters.layers_of(model):
        layer.float()
    scramble(model, method)
    trained = adapters.trainable(model).values()
    inputs = forward_inputs(model, packed(documents(6, 6)))
    for _ in range(2):
        with Counted(trained) as forward:
            hidden = model.base_model(**inputs)[0]
        with Counted(trained) as backward:
            hidden.backward(torch.ones_like(hidden))
    assert (forward.reads, backward.reads) == (0, 0)
    return forward.operations, backward.operations


def test_a_layer_computes_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation is a launch on a GPU: more than time allows where micro-batches are small."""
    monkeypatch.setattr(attention, "kernel_for", lambda *_: NoKernel())
    (forward, backward), (less, back) = operations(3), operations(2)
    assert (forward - less).total() <= 48, forward - less
    assert (backward - back).total() <= 109, backward - back


def test_names_do_not_know_of_twins() -> None:
    model, method, _ = put_on(known_model("llama"), "lora")
    names = set(model.state_dict()), set(method.tensors(model))
    twins_off(model)
    assert names == (set(model.state_dict()), set(method.tensors(model)))


@pytest.mark.parametrize("family", sorted(KNOWN - LLAMA_LIKE))
def test_other_families_have_no_twins(family: str) -> None:
    model, _, _ = put_on(known_model(family), "lora", target_modules="all-linear")
    assert not llama_layers(model)
    assert not any("forward" in vars(module) for module in model.modules())


def kept_bytes(layers: int, tokens: int, rank: int) -> int:
    """Return the bytes of all tensors that a forward pass keeps for the backward pass."""
    model = known_model("llama", num_hidden_layers=layers).float()
    put_on(model, "lora", rank=rank)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        token_loss(model, packed(documents(tokens)))
    return sum(kept.values())


def test_a_layer_keeps_as_little_as_is_said() -> None:
    """In fp32; in bf16 half of all but the last two: a sum a head and two norms are fp32."""
    d, f, kv, heads, rank = 32, 48, 16, 4, 3
    tokens = 20
    grown = kept_bytes(4, tokens, rank) - kept_bytes(3, tokens, rank)
    assert grown == tokens * (16 * d + 8 * f + 8 * kv + 28 * rank + 4 * heads + 8)
