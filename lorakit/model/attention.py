"""Attention over documents that lie side by side in one row and never see each other.

Registered with transformers under our own name, with a mask function that builds no mask: each
document runs its own causal attention, so time and memory follow the documents and not the row.
The lengths travel as a keyword argument of the forward pass; without them (generation, foreign
callers) it is transformers' SDPA attention with its masks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lorakit.model.families import KNOWN, is_known

NAME = "lorakit_documents"

# Up to here a bf16 matrix product beats the fused kernel of CPUs; in fp32 the fused one wins.
GROUPED_TOKENS = 512

Documents = tuple[tuple[int, int], ...]


def can_pack(model: PreTrainedModel | PretrainedConfig) -> str | None:
    """Return why documents cannot share a row of this model, None when they can."""
    if is_known(model):
        return None
    config = model if isinstance(model, PretrainedConfig) else model.config
    return f"packing is not verified for {config.model_type}, only for {', '.join(sorted(KNOWN))}"


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attend within each document: query (rows, heads, tokens, dim) to (rows, tokens, heads, dim).

    `key` and `value` may have fewer heads. `documents` says how a row is made up: (2, 5), (1, 3)
    are two documents of 5 tokens and one of 3. `sliding_window` tokens are seen, the own included.
    """
    if documents is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sizes = [count * length for count, length in documents]
    pieces = zip(*(torch.split(s, sizes, dim=2) for s in (query, key, value)), strict=True)
    outputs = []
    for (count, length), piece in zip(documents, pieces, strict=True):
        q, k, v = (
            states.unflatten(2, (count, length)).transpose(1, 2).flatten(0, 1) for states in piece
        )
        window = sliding_window if sliding_window and sliding_window < length else None
        out = _causal(q, k, v, scale, dropout, window)
        outputs.append(out.transpose(1, 2).reshape(len(query), count * length, *out.shape[1::2]))
    return torch.cat(outputs, dim=1), None


def document_mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **rest: Any,
) -> Tensor | None:
    """Build no mask for a whole causal row; else the one that SDPA attention would get."""
    whole = attention_mask is None and q_length == kv_length and not use_vmap
    if whole and (local_size is None or kv_length <= local_size):
        return None
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        **rest,
    )


def _causal(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, window: int | None
) -> Tensor:
    """Run causal attention over equally long documents, (documents, heads, tokens, dim)."""
    length = q.shape[2]
    short = q.device.type == "cpu" and q.dtype is torch.bfloat16 and length <= GROUPED_TOKENS
    if short and window is None and dropout == 0.0:
        return grouped_attention(q, k, v, scale)
    mask = None
    if window is not None:
        whole = torch.ones(length, length, dtype=torch.bool, device=q.device)
        mask = whole.tril() & whole.triu(1 - window)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Run causal attention as batched products, all query heads of a key head in one of them.

    The probabilities are computed again in the backward pass, so that memory stays linear.
    """
    out: Tensor = _Grouped.apply(q, k, v, scale)  # type: ignore[no-untyped-call]
    return out


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        documents, heads, length, dim = q.shape
        groups = documents * k.shape[1]
        q = q.reshape(groups, -1, dim)
        k, v = (states.reshape(groups, length, dim) for states in (k, v))
        out = torch.bmm(_probabilities(q, k, scale), v)
        ctx.save_for_backward(q, k, v, out)
        ctx.scale = scale
        return out.view(documents, heads, length, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        documents, heads, length, dim = grad.shape
        grad = grad.reshape(q.shape)
        p = _probabilities(q, k, ctx.scale)
        dv = torch.bmm(p.transpose(1, 2), grad)
        # Softmax: ds = p * (dp - sum(dp * p)), and that sum is grad · out.
        ds = torch.bmm(grad, v.transpose(1, 2))
        ds.sub_((grad * out).sum(-1, keepdim=True)).mul_(p)
        dq = torch.bmm(ds, k).mul_(ctx.scale).view(documents, heads, length, dim)
        dk = torch.bmm(ds.transpose(1, 2), q).mul_(ctx.scale)
        return dq, *(d.view(documents, -1, length, dim) for d in (dk, dv)), None


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return softmax(scale * q k + causal mask): (groups, query heads * tokens, tokens)."""
    length = k.shape[1]
    future = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
    mask = future.repeat(q.shape[1] // length, 1)
    return torch.baddbmm(mask.expand(len(q), -1, -1), q, k.transpose(1, 2), alpha=scale).softmax(-1)


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, document_mask)
