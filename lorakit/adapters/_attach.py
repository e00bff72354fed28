"""Adapters on a model: attach, switch off, and ask what belongs to them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from lorakit.adapters._fused import fuse
from lorakit.adapters._layer import META, Adapted, Copy, Layer, layers_of, wrap
from lorakit.adapters._method import Method, one_of_tied, with_tied
from lorakit.errors import BadInput
from lorakit.model.sites import Site, find_sites, match


def attach(method: Method, model: PreTrainedModel, sites: Sequence[Site], seed: int) -> None:
    """Freeze a model and put a fresh adapter onto the sites that the method chose.

    On a model without weights (meta) only the shapes are made. Otherwise the same seed gives the
    same values on every device, and torch's own random state is not touched.

    Raises:
        BadInput: `recipe.conflict` when a module is both adapted and saved whole.
    """
    with model.device:
        copies = copy_layers(copied_sites(method, find_sites(model)))
    if both := sorted({site.name for site in sites} & copies.keys()):
        raise BadInput(
            "recipe.conflict",
            f"adapter.modules_to_save: {both[0]} is adapted as well",
            help="leave it out of one of the two, or add it to adapter.exclude_modules",
        )
    model.requires_grad_(False)
    with model.device:
        method.attach(model, sites)
        for name, layer in copies.items():
            wrap(model, name, layer)
    set_training(model, model.training)
    fuse(model)
    if model.device == META:
        return
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(model):
        layer.reset(generator)
    for module in model.modules():
        if isinstance(module, Adapted) and isinstance(module.adapter, Copy):
            module.adapter.fill(module.base)


def attach_layers(method: Method, model: PreTrainedModel, layers: Mapping[str, Layer]) -> None:
    """Put layers that have their values onto the modules of a frozen model, for inference."""
    for name, layer in layers.items():
        wrap(model, name, layer)
    set_training(model, False)
    method.refresh(model)


def set_training(model: nn.Module, training: bool) -> None:
    """Switch the adapter's dropout on or off; the base stays as it is."""
    for layer in layers_of(model):
        layer.train(training)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Make a model behave as its base."""
    before = {layer: layer.on for layer in layers_of(model)}
    for layer in before:
        layer.on = False
    try:
        yield
    finally:
        for layer, on in before.items():
            layer.on = on


def copied_sites(method: Method, candidates: Sequence[Site]) -> list[Site]:
    """Return the sites that `modules_to_save` names; one of two that share a weight.

    Raises:
        BadInput: `target.no-match` when an entry names no site.
    """
    entries = method.settings.saved_whole()
    return one_of_tied(match(candidates, entries), candidates) if entries else []


def copy_layers(sites: Sequence[Site]) -> dict[str, Layer]:
    """Return empty copies of sites by the module that they replace."""
    return with_tied(sites, [Copy.of(site) for site in sites])
