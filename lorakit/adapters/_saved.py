"""A saved adapter and a base: whether it fits, exactly; then onto the model or into the weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters._attach import attach, copied_sites, copy_layers
from lorakit.adapters._layer import ALL, Layer, layers_of
from lorakit.adapters._linear import LowRank
from lorakit.adapters._method import Method, SiteSettings
from lorakit.adapters._names import missing_tensors, unexpected_tensors
from lorakit.adapters._peft import shown
from lorakit.adapters._read import CONFIG, PASSPORT, TENSORS, Saved
from lorakit.errors import BadInput, Notice, Place
from lorakit.model.frozen import dense_weight
from lorakit.model.sites import Site, find_sites


class Base(Protocol):
    """What tells one base from another."""

    @property
    def name(self) -> str: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def stored(self) -> object | None: ...


def attach_saved(saved: Saved, model: PreTrainedModel, sites: Sequence[Site]) -> Method:
    """Put a saved adapter onto its base; `sites` are all of the model, or those of a recipe.

    Raises:
        BadInput: when names, shapes or ties are not exactly those of the sites.
    """
    method = saved.method()
    chosen, _ = _fitting(saved, method, sites, find_sites(model))
    for module, copy in saved.base_copies.items():
        _check_copy(saved, module, dense_weight(model.get_submodule(module)), copy)
    attach(method, model, chosen, seed=0)
    _fill(saved, layers_of(model))
    method.refresh(model)
    return method


def merge_layers(saved: Saved, sites: Sequence[Site]) -> dict[str, Layer]:
    """Return for each module that changes the layer which changes it; no model is needed.

    Raises:
        BadInput: `adapter.not-mergeable`, or when the adapter does not fit all these sites.
    """
    method = saved.method()
    if not method.mergeable:
        raise BadInput(
            "adapter.not-mergeable",
            f"{method.name()} changes no weights, so there is nothing to merge",
            where=str(saved.folder),
            help="use the adapter beside its base",
        )
    _, layers = _fitting(saved, method, sites, sites)
    _fill(saved, layers.values(), shared=True)
    copies = saved.base_copies
    return {
        name: OnItsBase(saved, layer, copies[name]) if name in copies else layer
        for name, layer in layers.items()
    }


def check_base(saved: Saved, base: Base) -> Notice | None:
    """Compare the base with the one that the adapter's passport names.

    Returns:
        A notice when the passport does not say, as of the weights that those which were stored in
        4 or 8 bits were made from.

    Raises:
        BadInput: `adapter.wrong-base` when sizes or fingerprints differ.
    """
    known = _trained_on(saved)
    for size, found in base.sizes.items():
        if (trained := known.get("sizes", {}).get(size, found)) != found:
            message = f"the adapter was trained on {size} {trained}, the base has {found}"
            raise _wrong_base(saved, message, PASSPORT)
    fingerprint = known.get("fingerprint")
    if fingerprint == base.fingerprint:
        return None
    if fingerprint is not None and not (known.get("stored") and base.stored is None):
        message = (
            f"fingerprint: the adapter was trained on {known.get('name')} ({str(fingerprint)[:12]})"
            f", the base {base.name} is {base.fingerprint[:12]}"
        )
        raise _wrong_base(saved, message, PASSPORT)
    message = f"nothing tells whether {base.name} is the right base"
    if fingerprint is not None:
        message += f": the adapter was trained on weights stored as {known['stored']}"
    return Notice("adapter.base-unknown", message, Place(str(saved.folder)))


class OnItsBase(Layer):
    """A layer that is merged only into the base whose embedding the file holds a copy of."""

    def __init__(self, saved: Saved, layer: Layer, copy: Tensor) -> None:
        super().__init__(layer.name)
        self.saved, self.layer, self.copy = saved, layer, copy
        self.scale = layer.scale

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return what the layer returns."""
        out: Tensor = self.layer(x, base)
        return out

    def merged(self, base: Mapping[str, Tensor], rows: slice = ALL) -> dict[str, Tensor]:
        """Return what the layer makes of a base that is the right one.

        Raises:
            BadInput: `adapter.wrong-base`.
        """
        _check_copy(self.saved, self.name, base["weight"], self.copy[rows])
        return self.layer.merged(base, rows)

    def tensors(self) -> dict[str, Tensor]:
        """Return the layer's tensors."""
        return self.layer.tensors()

    def low_rank(self) -> LowRank | None:
        """Return the layer's update."""
        return self.layer.low_rank()


def _fitting(
    saved: Saved, method: Method, sites: Sequence[Site], everywhere: Sequence[Site]
) -> tuple[list[Site], dict[str, Layer]]:
    """Return the sites that the adapter is on and its layers, still without values.

    Raises:
        BadInput: when anything is missing, left over, or of another shape.
    """
    settings = saved.settings
    _check_known(saved, settings.saved_whole(), everywhere)
    if isinstance(settings, SiteSettings):
        names = settings.target_modules
        _check_known(saved, names, sites)
        _check_all_there(saved, method, sites)
        here = tuple(site.name for site in sites if site.name in names)
        method = type(method)(settings.model_copy(update={"target_modules": here}))
    chosen = method.sites(sites)
    copied = copied_sites(method, everywhere)
    if not saved.config.flag("ensure_weight_tying"):
        for site in (*chosen, *copied):
            if site.tied is not None:
                message = f"not true, but in this base {site.name} and {site.tied} share a weight"
                help = "an adapter of one end alone cannot be merged: train it again with true"
                raise saved.config.wrong("ensure_weight_tying", message, help=help)
    layers = {**method.layers(chosen), **copy_layers(copied)}
    _check_tensors(saved, layers.values(), (*chosen, *copied), everywhere)
    _check_scales(saved, layers)
    return chosen, layers


def _check_scales(saved: Saved, layers: Mapping[str, Layer]) -> None:
    """Check that each layer counts for as much as it was trained to.

    Raises:
        BadInput: `adapter.bad-setting` when the settings were changed after the training.
    """
    scales = (saved.passport or {}).get("scales")
    for name, layer in layers.items():
        trained = scales.get(name) if isinstance(scales, dict) else None
        if trained is not None and trained != layer.scale:
            raise BadInput(
                "adapter.bad-setting",
                f"{name} would count {layer.scale:g} times, but was trained to count {trained} "
                "times: the settings were changed",
                where=str(saved.folder / CONFIG),
                help=f"put them back, or remove {PASSPORT} to take them as they are",
            )


def _check_known(saved: Saved, names: Iterable[str], sites: Sequence[Site]) -> None:
    """Check that the base has every module that the adapter has tensors for."""
    known = {end for site in sites for end in (site.name, site.tied)}
    if unknown := [name for name in names if name not in known]:
        layers = {site.layer for site in sites if site.layer is not None}
        message = (
            f"the adapter has tensors for {len(unknown)} modules that this base of {len(layers)} "
            f"layers lacks, from {unknown[0]} to {unknown[-1]}"
        )
        raise _wrong_base(saved, message, TENSORS)


def _check_all_there(saved: Saved, method: Method, sites: Sequence[Site]) -> None:
    """Check that every module which the settings mean has its tensors.

    Settings that name whole paths mean the layers of the base that they were written for. Without
    a fingerprint of that base, an adapter of the first layers alone is one of a shallower base.

    Raises:
        BadInput: `adapter.missing-tensor` or `adapter.wrong-base`.
    """
    possible = [site for site in sites if site.kind in method.kinds]
    if saved.config.values["target_modules"] == "all-linear":
        meant = {site.name for site in possible if site.kind != "embedding" and site.role != "head"}
    else:
        meant = saved.config.targeted([site.name for site in possible])
    owned = {name.rpartition(".")[0] for name in saved.tensors}
    owned |= {name.rpartition(".")[0] for name in owned}
    if absent := sorted(meant - owned):
        raise missing_tensors([f"any of {name}" for name in absent], saved.file)
    there = {site.layer for site in possible if site.layer is not None}
    adapted = {site.layer for site in possible if site.name in meant and site.layer is not None}
    told = saved.config.values.get("layers_to_transform") or "fingerprint" in _trained_on(saved)
    if not told and adapted and adapted < there and adapted == set(range(len(adapted))):
        message = (
            f"the adapter has tensors for the first {len(adapted)} layers, the base has "
            f"{len(there)}: nothing tells that it is not of a shallower model"
        )
        help = f'if it is for these layers, write "layers_to_transform": {sorted(adapted)}'
        raise _wrong_base(saved, message, CONFIG, f"{help} into {CONFIG}")


def _check_tensors(
    saved: Saved, layers: Iterable[Layer], sites: Sequence[Site], everywhere: Sequence[Site]
) -> None:
    """Check that the file's names and shapes are exactly those of the layers."""
    expected = {name: tensor.shape for name, tensor in _named(layers).items()}
    extra = sorted(saved.tensors.keys() - expected.keys())
    if missing := sorted(expected.keys() - saved.tensors.keys()):
        raise missing_tensors(missing, saved.file, extra)
    if extra:
        raise unexpected_tensors(extra, saved.file)
    sizes = {size for site in sites for size in (site.inputs, site.outputs)}
    hidden = {site.outputs for site in everywhere if site.role == "embed"}
    for name, shape in expected.items():
        found = saved.tensors[name].shape
        if found == shape:
            continue
        # Only the base's own sizes differ: the rest of the shape is as the settings want it.
        pairs = list(zip(found, shape, strict=False))
        elsewhere = len(found) == len(shape) and all(a == b or b in sizes for a, b in pairs)
        if elsewhere and found != shape[::-1]:
            message = f"{name} is {tuple(found)} in the adapter, this base needs {tuple(shape)}"
            for trained, here in pairs:
                if trained != here and here in hidden:
                    sized = f"the adapter was trained on hidden size {trained}, the base has {here}"
                    message = f"{sized}: {message}"
            raise _wrong_base(saved, message, TENSORS)
        message = f"{name}: expected {tuple(shape)}, found {tuple(found)}"
        raise BadInput("adapter.shape-mismatch", message, where=saved.file)


def _check_copy(saved: Saved, module: str, weight: Tensor, copy: Tensor) -> None:
    """Check that an embedding which the adapter was trained beside is the base's own."""
    if weight.shape != copy.shape or not torch.equal(weight.to("cpu", copy.dtype), copy):
        message = (
            f"{module}.weight: the adapter holds a copy {tuple(copy.shape)} that differs from the "
            f"base's {tuple(weight.shape)}"
        )
        raise _wrong_base(saved, message, TENSORS)


def _trained_on(saved: Saved) -> Mapping[str, Any]:
    """Return what the passport says of the base, nothing where there is none."""
    return (saved.passport or {}).get("base") or {}


def _wrong_base(saved: Saved, message: str, file: str, help: str = "") -> BadInput:
    """Return the error about a base that is not the adapter's, with the name of the one that is."""
    name = _trained_on(saved).get("name") or saved.config.values.get("base_model_name_or_path")
    named = f", which its settings call {shown(name)}" if name else ""
    return BadInput(
        "adapter.wrong-base",
        message,
        where=str(saved.folder / file),
        help=help or f"name the base that the adapter was trained on{named}",
    )


@torch.no_grad()
def _fill(saved: Saved, layers: Iterable[Layer], *, shared: bool = False) -> None:
    """Give the layers their values, or where they are `shared` the saved tensors themselves.

    Raises:
        BadInput: `adapter.bad-setting` when two ends of a tie have different values.
    """
    layers = tuple(layers)
    for name, tensor in _named(layers).items():
        given = saved.tensors[name]
        if tensor._base is not None:
            continue  # shows what the other end of a tie holds
        if shared and given.dtype == tensor.dtype:
            tensor.data = given
        else:
            tensor.copy_(given)
    for name, tensor in _named(layers).items():
        if not torch.equal(tensor, saved.tensors[name].to(tensor)):
            message = f"{name} differs from the tensor at the other end of its tie"
            raise saved.config.wrong("ensure_weight_tying", message)


def _named(layers: Iterable[Layer]) -> dict[str, Tensor]:
    return {name: tensor for layer in layers for name, tensor in layer.tensors().items()}
