"""Lean twins of decoder layers: the same maths, fewer passes over memory and fewer tensors kept.

A twin stands in for a layer's forward pass. It owns nothing: it reads the layer's own modules, and
each site says itself whether it is a plain low-rank product at this moment. Where all that read
the same x are, they are one node with the norm or the gate before them; where one is not (DoRA,
IA3, a whole copy), that part runs module by module. Any call that is not a training or scoring
pass over documents, such as generation with its cache, runs the layer's own forward.

In bf16 such a layer keeps, a token, 8 d + 4 f + 4 kv + 4 heads bytes and 2 for each rank: the two
residual streams, queries, keys, values, the attention's output, gate and up.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters._layer import Adapted
from lorakit.adapters._linear import ITSELF, Product, products
from lorakit.model.attention import attend
from lorakit.model.documents import Documents
from lorakit.model.elementwise import Gated, Normed, Prologue, rms_normed, rotate
from lorakit.model.families import llama_layers
from lorakit.model.frozen import is_frozen_linear

GATED = Gated()


def fuse(model: PreTrainedModel) -> int:
    """Let twins stand in for the layers of families that have them; return how many."""
    layers = llama_layers(model)
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)
    return len(layers)


def _forward(
    layer: Any,
    own: Callable[..., Any],
    hidden_states: Tensor,
    *,
    documents: Documents | None = None,
    past_key_values: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **rest: Any,
) -> Any:
    """Return the layer's output, (rows, tokens, dim)."""
    if documents is None or past_key_values is not None or position_embeddings is None:
        return own(
            hidden_states,
            documents=documents,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **rest,
        )
    x = _attention(layer, hidden_states, position_embeddings, documents)
    return _mlp(layer, x)


def _attention(
    layer: Any, x: Tensor, position_embeddings: tuple[Tensor, Tensor], documents: Documents
) -> Tensor:
    """Return x + o(attention(q, k, v)) with q, k, v of the normed x."""
    block = layer.self_attn
    heads = (*x.shape[:-1], -1, block.head_dim)
    sites = (block.q_proj, block.k_proj, block.v_proj)
    q, k, v = (states.view(heads) for states in _read(x, layer.input_layernorm, sites))
    if hasattr(block, "q_norm"):
        q, k = _norm(q, block.q_norm), _norm(k, block.k_norm)
    q, k = (rotate(states, *position_embeddings) for states in (q, k))
    out = attend(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        documents,
        scale=block.scaling,
        window=_window(block),
        dropout=block.attention_dropout if block.training else 0.0,
    )
    return _write([out.view(*x.shape[:-1], -1)], ITSELF, block.o_proj, x)


def _mlp(layer: Any, x: Tensor) -> Tensor:
    """Return x + down(silu(gate) ⊙ up) with gate and up of the normed x."""
    block = layer.mlp
    gate, up = _read(x, layer.post_attention_layernorm, (block.gate_proj, block.up_proj))
    return _write([gate, up], GATED, block.down_proj, x)


def _read(x: Tensor, norm: nn.Module, sites: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Return what the sites make of the normed x."""
    of, dropout = _products(sites)
    if not of:
        normed = norm(x)
        return tuple(site(normed) for site in sites)
    if _is_trained(norm):
        return products([norm(x)], of, dropout=dropout)
    return products([x], of, prologue=Normed(*_weight_and_eps(norm)), dropout=dropout)


def _write(inputs: list[Tensor], prologue: Prologue, site: nn.Module, residual: Tensor) -> Tensor:
    """Return the residual stream and what the site makes of the inputs."""
    of, dropout = _products([site])
    if not of:
        x, _ = prologue.forward(*inputs)
        out: Tensor = residual + site(x)
        return out
    return products(inputs, of, prologue=prologue, added=residual, dropout=dropout)[0]


def _norm(x: Tensor, norm: nn.Module) -> Tensor:
    out: Tensor = norm(x) if _is_trained(norm) else rms_normed(x, *_weight_and_eps(norm))
    return out


def _products(sites: Sequence[nn.Module]) -> tuple[list[Product], float]:
    """Return the products that the sites are now, none where one of them is more, and dropout."""
    found, dropout = [], 0.0
    for site in sites:
        product = Product(site)
        if isinstance(site, Adapted):
            layer = site.adapter
            product = Product(site.base, layer.low_rank() if layer.on else None)
            if layer.on and product.update is None:
                return [], 0.0
            dropout = layer.dropout if layer.on and layer.training else dropout
        if product.base is None or not is_frozen_linear(product.base):
            return [], 0.0
        found.append(product)
    return found, dropout


def _is_trained(norm: nn.Module) -> bool:
    return isinstance(norm, Adapted) or any(p.requires_grad for p in norm.parameters())


def _weight_and_eps(norm: Any) -> tuple[Tensor, float]:
    return norm.weight, norm.variance_epsilon


def _window(block: Any) -> int | None:
    """Return how many tokens a layer's attention sees, None for all before."""
    if block.config.model_type == "mistral":
        return block.config.sliding_window  # type: ignore[no-any-return]
    return getattr(block, "sliding_window", None)
