"""The families whose forward pass lorakit knows well enough to take a shorter, equal path.

Known means, and a test holds it for each: the logits are exactly `head(decoder(ids))`, with no
scale or cap; and every attention layer goes through transformers' attention interface, is causal,
and receives the keyword arguments given to the model. Every other family takes the generic path.
"""

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

KNOWN = frozenset(
    """
    arcee ernie4_5 exaone4 gemma glm glm4 gpt2 gpt_neox llama mistral olmo olmo2 olmo3 phi phi3
    qwen2 qwen3 seed_oss smollm3 starcoder2
    """.split()
)

# Of these the decoder layer is, attribute by attribute, Llama's: RMSNorm, q, k, v with rotary
# positions (and with norms of heads where it has them), o, RMSNorm, gate, up, SiLU, down.
LLAMA_LIKE = frozenset("llama mistral qwen2 qwen3".split())


def is_known(model: PreTrainedModel | PretrainedConfig) -> bool:
    """Tell whether the model is of a known family and runs transformers' own code."""
    config = model if isinstance(model, PretrainedConfig) else model.config
    return config.model_type in KNOWN and type(config).__module__.startswith("transformers.")


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """Return the head when it is frozen, nothing but a linear layer, and fed by the decoder alone.

    None where it is adapted, trained or hooked, and for families that are not known.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not is_known(model) or type(head) is not nn.Linear or "forward" in vars(model):
        return None
    if any(parameter.requires_grad for parameter in head.parameters()):
        return None
    hooked = any(_has_hooks(module) for module in (model, head))
    return None if hooked else head


def llama_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers of a model whose layers are Llama's, none of any other model."""
    return decoder_layers(model) if is_known(model) and is_llama_like(model.config) else []


def is_llama_like(config: PretrainedConfig) -> bool:
    """Tell whether a model's layers are Llama's, by its settings."""
    return config.model_type in LLAMA_LIKE and config.hidden_act == "silu"


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers that can be recomputed one by one, from the first to the last."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
