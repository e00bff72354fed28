"""Adapted models by their configuration, on the CPU or on meta, and their shapes."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from lorakit import adapters
from lorakit.model.attention import NAME
from lorakit.model.quantizer import quantizable
from lorakit.model.sites import find_sites
from lorakit.training.memory import Shape
from lorakit.training.trace import trace


def llama(
    hidden: int, mlp: int, layers: int, heads: int, key_heads: int, vocabulary: int, **more: Any
) -> LlamaConfig:
    """Return the configuration of a decoder of the usual kind."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        **more,
    )


def adapted(
    config: PretrainedConfig, device: str, dtype: torch.dtype, **adapter: Any
) -> PreTrainedModel:
    """Return a model of a configuration with an adapter on it, as it trains."""
    config._attn_implementation = NAME
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).eval()
    name = adapter.get("method", "lora")
    method = adapters.get(name)(adapters.settings_for(name).model_validate(adapter))
    adapters.attach(method, model, method.sites(find_sites(model)), seed=0)
    adapters.set_training(model, True)
    return model


def shape(
    config: PretrainedConfig,
    dtype: torch.dtype = torch.bfloat16,
    *,
    length: int = 64,
    packed: bool = True,
    **adapter: Any,
) -> Shape:
    """Return what an estimate knows of a model of a configuration."""
    with torch.device("meta"):
        sites = quantizable(AutoModelForCausalLM.from_config(config, dtype=dtype))
    model = adapted(config, "meta", dtype, **adapter)
    traced = trace(model, length, packed=packed)
    return Shape.of(model, traced, [(site.outputs, site.inputs) for site in sites])
