"""Gradient checkpointing, layer by layer, for models that train in eval mode.

transformers recomputes a layer only in training mode, which would switch its dropout on; ours
wraps the forward of as many layers as memory asks for, and works in either mode.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lorakit.model.families import decoder_layers


def checkpoint_layers(model: PreTrainedModel, count: int | None = None) -> int:
    """Recompute the first `count` layers in the backward pass, all when None; return how many.

    The first ones, because their activations would be kept longest; 0 switches it off.
    """
    layers = decoder_layers(model)
    count = len(layers) if count is None else min(count, len(layers))
    for layer in layers:
        vars(layer).pop("forward", None)
    for layer in layers[:count]:
        layer.forward = partial(_recomputed, layer.forward)
    return count


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
