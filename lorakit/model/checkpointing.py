"""Gradient checkpointing, layer by layer, for models that train in eval mode.

transformers recomputes a layer only in training mode, which would switch its dropout on; ours
wraps the forward of as many layers as memory asks for, and works in either mode. What is kept of
such a layer, its input, can wait in host memory while other layers are computed.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lorakit.model.families import decoder_layers

# Inputs that leave a GPU or come back at a time: one is copied while another is computed with.
ON_THE_WAY = 2


def checkpoint_layers(
    model: PreTrainedModel, count: int | None = None, *, queue: "Queue | None" = None
) -> int:
    """Recompute the first `count` layers in the backward pass, all when None; return how many.

    The first ones, because their activations would be kept longest; 0 switches it off. With a
    queue their inputs wait in host memory.
    """
    layers = decoder_layers(model)
    count = len(layers) if count is None else min(count, len(layers))
    for layer in layers:
        if isinstance(recomputed := vars(layer).get("forward"), _Recomputed):
            del layer.forward
            if layer.forward != recomputed.forward:  # a twin's
                layer.forward = recomputed.forward
    store = Offload(queue) if queue else None
    for number, layer in enumerate(layers[:count]):
        layer.forward = _Recomputed(layer.forward, number, store)
    return count


class _Recomputed:
    """A layer's forward pass, of which only the inputs are kept."""

    def __init__(self, forward: Callable[..., Any], number: int, store: "Offload | None") -> None:
        self.forward = forward
        self.number = number
        self.store = store

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if self.store is None or not args:
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        with self.store.keeping(args[0], self.number):
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


class Queue(Protocol):
    """A second queue of a device's work, for copies that run beside the first."""

    def host_like(self, tensor: Tensor) -> Tensor:
        """Return host memory for a tensor's values, which copies reach without waiting."""
        ...

    def copy(self, to: Tensor, source: Tensor) -> Any:
        """Copy once all that was asked for before is done; return the moment when it is copied."""
        ...

    def wait_for(self, moment: Any) -> None:
        """Let all that is asked for from now on wait for a moment; the host does not wait."""
        ...


@dataclass(eq=False)
class _Input:
    """The input of layer `number`: in host memory, and on the device while `tensor` is there.

    `copied` is the moment when the copy begun last, in either direction, is done.
    """

    number: int
    device: torch.device
    host: Tensor
    tensor: Tensor | None
    copied: Any


class Offload:
    """Keeps the inputs of layers in host memory, at most `ON_THE_WAY` of them on the device.

    The device's memory is given up only after its own queue was told to wait for the copy, so
    nothing can be written over what is still being read.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._leaving: deque[_Input] = deque()
        self._newest: dict[int, _Input] = {}

    def keeping(self, states: Tensor, number: int) -> saved_tensors_hooks:
        """Send `states`, where autograd keeps them for layer `number`, to the host.

        Whatever else it keeps, such as masks, all layers share. States without a gradient stay:
        they are those of the first layer that needs them, or are never asked for again.
        """

        def pack(tensor: Tensor) -> Tensor | _Input:
            is_input = tensor.data_ptr() == states.data_ptr() and tensor.shape == states.shape
            return (
                self._send(tensor.detach(), number) if is_input and states.requires_grad else tensor
            )

        def unpack(kept: Tensor | _Input) -> Tensor:
            return self._bring(kept) if isinstance(kept, _Input) else kept

        return saved_tensors_hooks(pack, unpack)

    def _send(self, tensor: Tensor, number: int) -> _Input:
        host = self._queue.host_like(tensor)
        copied = self._queue.copy(host, tensor)
        one = _Input(number, tensor.device, host, tensor, copied)
        self._newest[number] = one
        self._leaving.append(one)
        if len(self._leaving) > ON_THE_WAY:
            gone = self._leaving.popleft()
            self._queue.wait_for(gone.copied)
            gone.tensor = None
        return one

    def _bring(self, one: _Input) -> Tensor:
        """Return an input on its device, and begin to fetch that of the layer before it."""
        tensor = self._fetched(one)
        self._queue.wait_for(one.copied)
        one.tensor = None
        if before := self._newest.get(one.number - 1):
            self._fetched(before)
        return tensor

    def _fetched(self, one: _Input) -> Tensor:
        if one.tensor is None:
            one.tensor = torch.empty_like(one.host, device=one.device, pin_memory=False)
            one.copied = self._queue.copy(one.tensor, one.host)
        return one.tensor
