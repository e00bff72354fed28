"""The families whose forward pass lorakit knows well enough to take a shorter, equal path.

Known means, and a test holds it for each: the logits are exactly `head(decoder(ids))`, with no
scale or cap; and every attention layer goes through transformers' attention interface, is causal,
and receives the keyword arguments given to the model. Every other family takes the generic path.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

KNOWN = frozenset(
    """
    arcee ernie4_5 exaone4 gemma glm glm4 gpt2 gpt_neox llama mistral olmo olmo2 olmo3 phi phi3
    qwen2 qwen3 seed_oss smollm3 starcoder2
    """.split()
)

# Of these only the way from the decoder to the logits is known: the head, then a soft cap.
CAPPED = frozenset("gemma2 gemma3_text".split())

# Of these the decoder layer is, attribute by attribute, Llama's: RMSNorm, q, k, v with rotary
# positions (and with norms of heads where it has them), o, RMSNorm, gate, up, SiLU, down.
LLAMA_LIKE = frozenset("llama mistral qwen2 qwen3".split())


class Head(NamedTuple):
    """How logits come from a decoder's states: cap tanh(module(states) / cap), or without a cap."""

    module: nn.Module
    cap: float | None

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits of states (n, dim), (n, vocabulary)."""
        logits: Tensor = self.module(states[None])[0]
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @property
    def linear(self) -> nn.Linear | None:
        """The module when it is frozen and nothing but a linear layer; None when adapted."""
        trained = any(parameter.requires_grad for parameter in self.module.parameters())
        return None if type(self.module) is not nn.Linear or trained else self.module


def is_known(model: PreTrainedModel | PretrainedConfig) -> bool:
    """Tell whether the model is of a known family and runs transformers' own code."""
    return _is_one_of(KNOWN, model)


def head_of(model: PreTrainedModel) -> Head | None:
    """Return the head when it is fed by the decoder alone, and nothing but a cap follows it.

    None where model or head are hooked, and for families of which that is not known.
    """
    module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not _is_one_of(KNOWN | CAPPED, model) or module is None or "forward" in vars(model):
        return None
    if any(_has_hooks(one) for one in (model, *module.modules())):
        return None
    capped = model.config.model_type in CAPPED
    return Head(module, model.config.final_logit_softcapping if capped else None)


def llama_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers of a model whose layers are Llama's, none of any other model."""
    return decoder_layers(model) if is_llama_like(model.config) else []


def is_llama_like(config: PretrainedConfig) -> bool:
    """Tell whether a model's layers are Llama's, in transformers' own code, by its settings."""
    return _is_one_of(LLAMA_LIKE, config) and config.hidden_act == "silu"


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers that can be recomputed one by one, from the first to the last."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _is_one_of(families: frozenset[str], model: PreTrainedModel | PretrainedConfig) -> bool:
    config = model if isinstance(model, PretrainedConfig) else model.config
    return config.model_type in families and type(config).__module__.startswith("transformers.")
