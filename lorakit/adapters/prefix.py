"""Prefix tuning: trained keys and values before those of every layer.

Each layer attends to L trained positions besides the tokens: softmax(q [P_k; k]ᵀ) [P_v; v]. The
tokens' own positions begin at L. The file holds P as (L, layers · 2 · kv_dim), with kv_dim the key
heads times their dimension.
Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190.

Deviations: P is trained itself, without the paper's reparametrising network, and by default starts
as the keys and values of the first training tokens (`init: text`). A fresh prefix changes the
output. It is no part of the weights, so it cannot be merged, and PEFT's file of a prefix has no
place for modules that are saved whole.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lorakit.adapters._attach import switched_off
from lorakit.adapters._layer import Layer, layers_of, parameter
from lorakit.adapters._method import Method, MethodSettings
from lorakit.adapters._peft import Found, PeftConfig
from lorakit.errors import BadInput
from lorakit.model.inputs import MASKED
from lorakit.model.sites import Site

SERVABLE = {
    "PEFT": "",
    "vLLM": "it serves low-rank updates alone",
    "llama.cpp": "its converter takes low-rank updates alone",
}
FOREIGN = ("prefix_tuning", "prefix-tuning", "p_tuning_v2")

TENSOR = "prompt_embeddings"
KEYS = """
num_virtual_tokens token_dim num_attention_heads num_layers encoder_hidden_size init_weights
"""


class PrefixSettings(MethodSettings):
    """How long the prefix is and how it starts."""

    tokens: int = Field(
        20, ge=1, le=1_000_000, description="trained positions before every layer's own"
    )
    init: Literal["text", "zero", "random"] = Field(
        "text", description="text: keys and values of the first training tokens; zero; random"
    )


class Prefixed(DynamicCache):
    """A prefix that layers read; what they add is not kept, so a layer may run again."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the prefix and the given states, (rows, heads, positions, dim)."""
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], -2), torch.cat([layer.values, value_states], -2)


class PrefixLayer(Layer):
    """The keys and values of all layers in one tensor."""

    def __init__(self, tokens: int, layers: int, width: int, init: str) -> None:
        super().__init__("")
        self.count = layers
        self.init = init
        self.heads = 1  # until the model is known
        self.states = parameter(tokens, layers * 2 * width)

    def by_layer(self, rows: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of each layer, (rows, heads, tokens, dim)."""
        split = self.states.to(dtype).view(len(self.states), self.count, 2, self.heads, -1)
        split = split.permute(1, 2, 3, 0, 4).unsqueeze(2).expand(-1, -1, rows, -1, -1, -1)
        return [(keys, values) for keys, values in split]

    def tensors(self) -> dict[str, Tensor]:
        """Return the one tensor."""
        return {TENSOR: self.states}

    def reset(self, generator: torch.Generator) -> None:
        """Draw standard normal values, or zeros; a text sets them in `start`."""
        drawn = torch.zeros(self.states.shape)
        if self.init == "random":
            drawn.normal_(generator=generator)
        with torch.no_grad():
            self.states.copy_(drawn)


class Prefix(Method):
    """Trained keys and values before those of every layer."""

    Settings = PrefixSettings
    settings: PrefixSettings
    mergeable: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    PEFT_TYPE: ClassVar[str] = "PREFIX_TUNING"
    PREFIX: ClassVar[str] = ""
    PARTS: ClassVar[tuple[frozenset[str], ...]] = (frozenset({TENSOR}),)
    PEFT_KEYS: ClassVar[frozenset[str]] = frozenset(KEYS.split())
    PEFT_FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "prefix_projection": (False,),
        "num_transformer_submodules": (1, None),
    }

    def positions(self) -> int:
        """Return the length of the prefix, which the tokens' own positions begin at."""
        return self.settings.tokens

    def sites(self, candidates: Sequence[Site]) -> list[Site]:
        """Return the modules that compute keys and values.

        Raises:
            BadInput: `target.unsupported` when they are not known, or differ between layers.
        """
        within = [site for site in candidates if site.layer is not None]
        chosen = [site for site in within if site.role in ("k", "v")]
        chosen = chosen or [site for site in within if site.role in ("qkv", "o")]
        _shape(chosen)
        return chosen

    def layers(self, sites: Sequence[Site]) -> dict[str, Layer]:
        """Return the one layer, which stands before the whole decoder."""
        return {"": PrefixLayer(self.settings.tokens, *_shape(sites), self.settings.init)}

    def attach(self, model: PreTrainedModel, sites: Sequence[Site]) -> None:
        """Put the prefix before every call of the decoder."""
        layer = PrefixLayer(self.settings.tokens, *_shape(sites), self.settings.init)
        layer.heads = _heads(model)
        decoder: Any = model.base_model
        names = tuple(inspect.signature(decoder.forward).parameters)

        def before(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if not layer.on:
                return None
            return (), prefixed(layer, decoder, {**dict(zip(names, args, strict=False)), **kwargs})

        decoder.add_module("lorakit_prefix", layer)
        decoder.register_forward_pre_hook(before, with_kwargs=True)

    @torch.no_grad()
    def start(self, model: PreTrainedModel, sites: Sequence[Site], batches: Iterable[Any]) -> None:
        """Take the keys and values that the base computes for the first training tokens."""
        if self.settings.init != "text":
            return
        ids = _first_tokens(batches, self.settings.tokens).to(model.device)
        cache = DynamicCache()
        with switched_off(model):
            model.base_model(input_ids=ids[None], past_key_values=cache, use_cache=True)
        filled: list[Any] = cache.layers
        states = torch.stack([torch.stack([one.keys[0], one.values[0]]) for one in filled])
        for layer in layers_of(model):
            for tensor in layer.tensors().values():
                tensor.copy_(states.permute(3, 0, 1, 2, 4).flatten(1))

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether PEFT's settings are those of a prefix."""
        return config.get("peft_type") == cls.PEFT_TYPE

    @classmethod
    def from_peft(cls, config: PeftConfig, found: Found) -> PrefixSettings:
        """Return the settings of an adapter that PEFT describes."""
        tokens = config.integer("num_virtual_tokens")
        expected = (tokens, config.integer("num_layers") * 2 * config.integer("token_dim"))
        if found.shapes[TENSOR] != expected:
            raise BadInput(
                "adapter.shape-mismatch",
                f"{TENSOR}: expected {expected} by its settings, found {found.shapes[TENSOR]}",
                where=config.path,
            )
        return PrefixSettings(method=cls.name(), tokens=tokens)

    def to_peft(self, model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, Any]:
        """Return PEFT's settings."""
        layers, width = _shape(sites)
        return {
            "peft_type": self.PEFT_TYPE,
            "num_virtual_tokens": self.settings.tokens,
            "num_layers": layers,
            "token_dim": width,
            "num_attention_heads": _heads(model),
            "num_transformer_submodules": 1,
            "encoder_hidden_size": width,
            "prefix_projection": False,
        }


def prefixed(layer: PrefixLayer, decoder: PreTrainedModel, named: dict[str, Any]) -> dict[str, Any]:
    """Return the decoder's arguments with the prefix in its cache, its mask and its positions.

    Without a cache, or with an empty one, the prefix is put in; with a filled one it is there.
    """
    given = named.get("input_ids")
    rows = len(named["inputs_embeds"] if given is None else given)
    past, positions = named.get("past_key_values"), named.get("position_ids")
    mask = named.get("attention_mask")
    documents = named.pop("documents", None)
    if documents is not None and documents.in_a_row > 1:
        raise ValueError("documents in one row would share a prefix")
    keeps = named.get("use_cache")
    keeps = decoder.config.use_cache if keeps is None else keeps
    if past is None or not past.get_seq_length():
        states = layer.by_layer(rows, decoder.dtype)
        if past is not None:
            for index, (keys, values) in enumerate(states):
                past.update(keys, values, index)
        else:
            named["past_key_values"] = DynamicCache(states) if keeps else Prefixed(states)
    if positions is not None:
        named["position_ids"] = positions + len(layer.states)
    if mask is not None:
        named["attention_mask"] = torch.cat([mask.new_ones(rows, len(layer.states)), mask], dim=1)
    return named


def _shape(sites: Sequence[Site]) -> tuple[int, int]:
    """Return the number of layers and the width of their keys.

    Raises:
        BadInput: `target.unsupported` when not every layer has keys of one and the same width.
    """
    inputs = {site.layer: site.inputs for site in sites if site.role == "o"}
    widths = {site.layer: site.outputs for site in sites if site.role == "k"}
    for site in sites:
        if site.role == "qkv" and site.layer in inputs:  # queries are as wide as what `o` takes
            widths[site.layer] = (site.outputs - inputs[site.layer]) // 2
    if set(widths) != set(range(len(widths))) or len(set(widths.values())) != 1:
        raise BadInput(
            "target.unsupported",
            "a prefix needs keys of one known width in every layer",
            help="take another adapter.method for this model",
        )
    return len(widths), next(iter(widths.values()))


def _heads(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _first_tokens(batches: Iterable[Any], count: int) -> Tensor:
    """Return the first `count` ids of rows up to their last trained one; again when too few."""
    ids: list[int] = []
    for batch in batches:
        for row, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            last = max((place for place, label in enumerate(labels) if label != MASKED), default=-1)
            ids += row[: last + 1]
        if len(ids) >= count:
            break
    if not ids:
        raise ValueError("no text to start a prefix from")
    return torch.tensor((ids * -(-count // len(ids)))[:count])
