"""Attention over documents that lie side by side in one row and never see each other.

Registered with transformers under our own name, with a mask function that builds no mask: each
document runs its own causal attention, so time and memory follow the documents and not the row.
How rows fall into documents travels as a keyword argument of the forward pass; without it
(generation, foreign callers) it is transformers' SDPA attention with its masks.

Where a fused kernel serves, all documents are one autograd node that keeps queries, keys, values,
the outputs and a number for each query and head; elsewhere SDPA runs them run by run.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lorakit.model.attention_kernels import OnDevice, OnHost, by_document, kernel_for
from lorakit.model.documents import Documents
from lorakit.model.families import KNOWN, is_known

NAME = "lorakit_documents"
# What keeps as much as transformers' flash attention, which cannot run on the meta device: SDPA in
# its place, given no mask. For a name with "flash" transformers would load a package.
LIKE_FLASH = "lorakit_unmasked"


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

    `key` and `value` may have fewer heads. `sliding_window` tokens are seen, the own included.
    """
    if documents is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    out = attend(q, k, v, documents, scale=scaling, window=sliding_window, dropout=dropout)
    return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None


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


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    *,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Run causal attention within documents laid end to end, (tokens, heads, dim).

    Args:
        query: of all rows, end to end.
        key: the same, with as many heads or a divisor of them.
        value: like key.
        documents: how the tokens fall into documents.
        scale: of the products of query and key; None is dim^-½.
        window: how many tokens are seen, the own included; None is all before.
        dropout: share of the probabilities that are dropped.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window = window if window and window < documents.longest else None
    kernel = kernel_for(query, documents, scale, window)
    if kernel is None or dropout:
        return _run_by_run(query, key, value, documents, scale, window, dropout)
    out: Tensor = _Attention.apply(query, key, value, kernel)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: OnHost | OnDevice) -> Tensor:
        out, kept = kernel.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.kernel = kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.kernel.backward(grad.contiguous(), *ctx.saved_tensors), None


def _run_by_run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scale: float,
    window: int | None,
    dropout: float,
) -> Tensor:
    """Run SDPA over one run of equally long documents after the other.

    On a GPU each head gets keys and values of its own: the kernel that serves there without scores
    in memory (Rabe and Staats 2021, arXiv 2112.05682) takes no fewer.
    """
    outs, groups = [], query.shape[1] // key.shape[1]
    repeats = groups if documents.capability else 1
    for at, count, length in documents.within(len(query)):
        q, k, v = (by_document(states[at], count, length) for states in (query, key, value))
        if repeats > 1:
            k, v = (states.repeat_interleave(repeats, dim=1) for states in (k, v))
        mask = None
        if window and window < length:
            whole = torch.ones(length, length, dtype=torch.bool, device=q.device)
            mask = whole.tril() & whole.triu(1 - window)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, document_mask)
AttentionInterface.register(LIKE_FLASH, sdpa_attention_forward)
AttentionMaskInterface.register(LIKE_FLASH, lambda **_: None)
