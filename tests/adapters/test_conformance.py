"""What every method must do, on every family, in fp32, in bf16 and on a 4-bit base."""

import hashlib
import math
from collections import Counter

import pytest
import torch

from lorakit import adapters
from lorakit.errors import BadInput
from lorakit.model.checkpointing import checkpoint_layers
from lorakit.model.quantized import QuantizedLinear
from lorakit.model.sites import find_sites
from tests.adapters.adapted import (
    SMALL,
    adapted,
    base_of,
    dense,
    distance,
    logits,
    loss,
    method_of,
    put_on,
    scramble,
    train,
)
from tests.tiny import FAMILIES, tiny_model

METHODS = adapters.names()
HELD = ("fp32", "bf16", "nf4")
# Forward against merged forward through a whole tiny model (measured: 4e-7 and 1e-2).
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}
OF_SITES = [name for name in METHODS if adapters.get(name).mergeable]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=HELD)
def held(request):
    return request.param


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def digest(model):
    """Return a digest of every tensor that is not the adapter's."""
    own = {id(tensor) for layer in adapters.layers_of(model) for tensor in layer.parameters()}
    found = hashlib.sha256()
    for path, tensor in model.named_parameters():
        if id(tensor) not in own:
            found.update(
                path.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
            )
            assert not tensor.requires_grad
            assert tensor.grad is None
    return found.hexdigest()


def test_all_methods_are_listed():
    assert set(METHODS) == set(SMALL), "a new method needs a small setting in adapted.py"


@pytest.mark.parametrize("name", [n for n in METHODS if n != "prefix"])
def test_a_fresh_adapter_is_the_base(family, name, held):
    base = base_of(family, held)
    before = logits(base)
    model, _, _ = put_on(base, name)
    assert torch.equal(logits(model), before)


def test_every_tensor_learns_and_the_base_stays(family, name, held):
    model, method, _ = put_on(base_of(family, held), name)
    before = digest(model)
    tensors = adapters.trainable(model)
    assert tensors
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    reached = {}
    for key, tensor in tensors.items():
        tensor.register_post_accumulate_grad_hook(
            lambda t, key=key: reached.update({key: reached.get(key) or bool(t.grad.any())})
        )
    losses = []
    for step, value in enumerate(train(model, method, steps=8)):
        losses.append(value)
        if step == 1:
            assert set(reached) == set(tensors)
            assert all(reached.values()), [key for key, moved in reached.items() if not moved]
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert losses[-1] < losses[0] - 0.02
    assert digest(model) == before


def test_switched_off_it_is_the_base_bit_for_bit(family, name, held):
    base = base_of(family, held)
    before = logits(base)
    model, method, _ = put_on(base, name)
    scramble(model, method)
    changed = logits(model)
    with adapters.switched_off(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), changed)
    assert distance(changed, before) > 1e-3


@pytest.mark.parametrize("held", ["fp32", "nf4"])
def test_saved_and_read_onto_the_same_base_it_is_the_same(family, name, held, tmp_path):
    model, method, sites = put_on(base_of(family, held), name, seed=1)
    scramble(model, method)
    adapters.save(tmp_path / "adapter", method, model, sites, {"steps": 3})
    again = base_of(family, held)
    restored = adapters.attach_saved(adapters.read(tmp_path / "adapter"), again, find_sites(again))
    assert restored.name() == name
    assert torch.equal(logits(again), logits(model))
    assert restored.tensors(again).keys() == method.tensors(model).keys()


def test_the_seed_alone_decides_the_start(family, name):
    state = torch.random.get_rng_state()
    one, _, _ = adapted(family, name, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    two, _, _ = adapted(family, name, seed=1)
    other, _, _ = adapted(family, name, seed=2)
    tensors = [adapters.trainable(model) for model in (one, two, other)]
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())
    if name in ("lora", "rslora", "dora"):
        assert not all(torch.equal(tensor, tensors[2][key]) for key, tensor in tensors[0].items())


@pytest.mark.parametrize("name", OF_SITES)
@pytest.mark.parametrize("held", ["fp64", *HELD])
def test_merged_weights_do_what_the_adapter_does(family, name, held, tmp_path):
    base = base_of(family, held)
    merged = dense(base)
    model, method, sites = put_on(base, name)
    scramble(model, method, size=0.05)
    expected = logits(model)
    for path, layer in method.layers(sites).items():
        own = model.get_submodule(path).adapter
        assert own.tensors().keys() == layer.tensors().keys()
        merge_into(merged, path, own)
    assert distance(logits(merged), expected) <= BOUNDS[merged.dtype]


def merge_into(model, path, layer):
    """Put merged tensors into a model, as the streaming merge does, a few rows at a time."""
    module = model.get_submodule(path)
    flipped = type(module).__name__ == "Conv1D"
    usual = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
    if flipped:
        usual["weight"] = usual["weight"].t()
    before = {name: tensor.clone() for name, tensor in usual.items()}
    with torch.no_grad():
        whole = layer.merged(usual)
        half = len(usual["weight"]) // 2
        pieces = [
            layer.merged({name: tensor[rows] for name, tensor in usual.items()}, rows)
            for rows in (slice(0, half), slice(half, None))
        ]
    for name, tensor in usual.items():
        assert torch.equal(tensor, before[name]), "merged() changed what it was given"
        assert (
            whole[name].dtype == torch.promote_types(tensor.dtype, torch.float32) or name == "bias"
        )
        together = torch.cat([piece[name] for piece in pieces])
        assert distance(together, whole[name]) <= 1e-6
        rounded = whole[name].detach().to(tensor.dtype)
        module.get_parameter(name).data.copy_(
            rounded.t() if flipped and name == "weight" else rounded
        )


@pytest.mark.parametrize("name", OF_SITES)
def test_merging_from_the_file_needs_no_model(family, name, tmp_path):
    model, method, sites = adapted(family, name, seed=3)
    scramble(model, method, size=0.05)
    adapters.save(tmp_path / "adapter", method, model, sites, {})
    merged = tiny_model(family)
    layers = adapters.merge_layers(adapters.read(tmp_path / "adapter"), find_sites(merged))
    assert layers.keys() == {site.name for site in sites}
    for path, layer in layers.items():
        merge_into(merged, path, layer)
    assert distance(logits(merged), logits(model)) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("name", [n for n in METHODS if n not in OF_SITES])
def test_what_cannot_be_merged_says_so(name, tmp_path):
    model, method, sites = adapted("llama", name)
    adapters.save(tmp_path / "adapter", method, model, sites, {})
    with pytest.raises(BadInput, match="merge") as refused:
        adapters.merge_layers(adapters.read(tmp_path / "adapter"), find_sites(tiny_model("llama")))
    assert refused.value.id == "adapter.not-mergeable"


def test_without_weights_only_shapes_are_made(family, name):
    with torch.device("meta"):
        skeleton = tiny_model(family)
    method = method_of(name)
    sites = method.sites(find_sites(skeleton))
    adapters.attach(method, skeleton, sites, seed=0)
    shapes = {key: tensor.shape for key, tensor in adapters.trainable(skeleton).items()}
    model, _, _ = adapted(family, name)
    assert shapes == {key: tensor.shape for key, tensor in adapters.trainable(model).items()}
    assert all(tensor.device.type == "meta" for tensor in adapters.trainable(skeleton).values())


@pytest.mark.parametrize(("held", "dropout"), [("fp32", 0), ("nf4", 0), ("fp32", 0.3)])
def test_gradients_are_the_same_when_layers_are_recomputed(family, name, held, dropout):
    """The masks of a dropout are drawn again as they were."""
    settings = adapters.get(name).Settings.model_fields
    dropped = {"dropout": dropout} if dropout and "dropout" in settings else {}
    model, method, _ = put_on(base_of(family, held), name, **dropped)
    scramble(model, method)
    adapters.set_training(model, True)
    grads = []
    for count in (0, None):
        checkpoint_layers(model, count)
        torch.manual_seed(3)
        loss(model).backward()
        grads.append({key: t.grad.clone() for key, t in adapters.trainable(model).items()})
        for tensor in adapters.trainable(model).values():
            tensor.grad = None
    assert all(torch.equal(grad, grads[1][key]) for key, grad in grads[0].items())


def test_a_weight_is_dequantised_once_in_each_direction(family, name, monkeypatch):
    model, method, _ = put_on(base_of(family, "nf4"), name)
    scramble(model, method)
    adapters.set_training(model, True)
    made, counts = QuantizedLinear.dense, Counter()

    def counted(module):
        counts[module] += 1
        return made(module)

    monkeypatch.setattr(QuantizedLinear, "dense", counted)
    total = loss(model)
    assert counts.keys() == {m for m in model.modules() if isinstance(m, QuantizedLinear)}
    assert set(counts.values()) == {1}
    counts.clear()
    total.backward()
    assert set(counts.values()) == {1}  # none where no gradient goes on to an input


def test_gradients_on_a_quantised_base_are_those_on_the_dense_weight(family, name, monkeypatch):
    base = base_of(family, "nf4")
    expected = gradients(dense(base), name)
    made, last = QuantizedLinear.dense, []

    def spoiling(module):
        """Return the weight where it holds until the next call, as one buffer for all does."""
        for tensor in last:
            tensor.fill_(math.nan)
        last[:] = [made(module)]
        return last[0]

    monkeypatch.setattr(QuantizedLinear, "dense", spoiling)
    found = gradients(base, name)
    assert len(last) == 1
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        assert grad.any()
        assert distance(grad, expected[key]) <= 2e-6, key


def gradients(model, name):
    """Return the gradients of an adapter with dropout, where the method has it."""
    settings = {"dropout": 0.1} if "dropout" in adapters.get(name).Settings.model_fields else {}
    model, method, _ = put_on(model, name, **settings)
    scramble(model, method)
    adapters.set_training(model, True)
    torch.manual_seed(7)
    loss(model).backward()
    return {key: tensor.grad for key, tensor in adapters.trainable(model).items()}
