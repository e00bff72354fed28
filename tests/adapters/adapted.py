"""Tiny models with adapters on them, for the tests of this folder."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit import adapters
from lorakit.adapters import Method
from lorakit.model.quantized import Quantization, QuantizedLinear
from lorakit.model.quantizer import quantize
from lorakit.model.sites import Site, find_sites
from tests.tiny import VOCABULARY, tiny_model

Triple = tuple[PreTrainedModel, Method, list[Site]]

# What a method needs beyond its defaults to be of a size for tiny models.
SMALL: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8},
    "rslora": {"rank": 4, "alpha": 4},
    "dora": {"rank": 4, "alpha": 8},
    "ia3": {},
    "prefix": {"tokens": 5},
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
# A rate at which the method learns within a few steps.
RATES = {"ia3": 0.1, "prefix": 0.05}


def method_of(name: str, **settings: Any) -> Method:
    """Return a method with small settings, and the given ones."""
    method = adapters.get(name)
    return method(method.Settings(method=name, **{**SMALL.get(name, {}), **settings}))


def put_on(model: PreTrainedModel, name: str, *, seed: int = 0, **settings: Any) -> Triple:
    """Put a fresh adapter onto a model, as a run does."""
    method = method_of(name, **settings)
    sites = method.sites(find_sites(model))
    adapters.attach(method, model, sites, seed=seed)
    method.start(model, sites, [text()])
    return model, method, sites


def adapted(
    family: str, name: str, *, seed: int = 0, base_seed: int = 0, **settings: Any
) -> Triple:
    """Return a tiny model with a fresh adapter."""
    return put_on(tiny_model(family, seed=base_seed), name, seed=seed, **settings)


def base_of(family: str, held: str = "fp32", seed: int = 0) -> PreTrainedModel:
    """Return a tiny model whose weights are dense in a dtype, or held quantised for fp32."""
    if held in DTYPES:
        return tiny_model(family, seed=seed, dtype=DTYPES[held])
    model = tiny_model(family, seed=seed)
    quantize(model, Quantization(held), torch.device("cpu"))
    return model


def dense(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model whose weights are all dense."""
    model = copy.deepcopy(model)
    for site in find_sites(model):
        held = model.get_submodule(site.name)
        if not isinstance(held, QuantizedLinear):
            continue
        plain = (
            Conv1D(site.outputs, site.inputs)
            if site.kind == "conv1d"
            else nn.Linear(site.inputs, site.outputs)
        )
        weight = held.dense().clone()
        plain.weight = nn.Parameter(weight.t().contiguous() if site.kind == "conv1d" else weight)
        plain.bias = held.bias
        model.set_submodule(site.name, plain.requires_grad_(False))
    return model


def ids(rows: int = 3, tokens: int = 11, seed: int = 5) -> Tensor:
    """Return random token ids."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=draw)


def text() -> SimpleNamespace:
    """Return a batch whose every token but the first is trained."""
    return SimpleNamespace(input_ids=ids(), labels=ids().index_fill(1, torch.tensor([0]), -100))


def logits(model: PreTrainedModel, given: Tensor | None = None) -> Tensor:
    """Return the model's output without gradients or dropout."""
    adapters.set_training(model, False)
    with torch.no_grad():
        return model(input_ids=ids() if given is None else given, use_cache=False).logits


def loss(model: PreTrainedModel) -> Tensor:
    """Return the mean loss over fixed ids, with its graph."""
    out = model(input_ids=ids(), use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(out.flatten(0, 1).float(), ids()[:, 1:].flatten())


def train(model: PreTrainedModel, method: Method, steps: int = 5) -> Iterator[float]:
    """Train, yielding the loss before each step."""
    rate = RATES.get(method.name(), 0.02)
    optimizer = torch.optim.AdamW(method.param_groups(model, rate), weight_decay=0.0)
    adapters.set_training(model, True)
    for step in range(steps):
        value = loss(model)
        value.backward()
        optimizer.step()
        method.after_step(model, step, steps)
        optimizer.zero_grad()
        yield value.item()


def scramble(model: PreTrainedModel, method: Method, seed: int = 1, size: float = 0.3) -> None:
    """Move every trained tensor away from where it started."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapters.trainable(model).values():
            tensor.add_(torch.randn(tensor.shape, generator=draw).to(tensor.device) * size)
    method.refresh(model)


def distance(one: Tensor, other: Tensor) -> float:
    """Return the relative L2 distance."""
    return ((one - other).double().norm() / other.double().norm()).item()
