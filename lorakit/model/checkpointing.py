"""Gradient checkpointing, layer by layer, for models that train in eval mode.

transformers recomputes a layer only in training mode, which would switch its dropout on; ours
wraps the forward of as many layers as memory asks for, and works in either mode.
"""

from collections.abc import Callable
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
        if isinstance(recomputed := vars(layer).get("forward"), _Recomputed):
            del layer.forward
            if layer.forward != recomputed.forward:  # a twin's
                layer.forward = recomputed.forward
    for layer in layers[:count]:
        layer.forward = _Recomputed(layer.forward)
    return count


class _Recomputed:
    """A layer's forward pass, of which only the inputs are kept."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
