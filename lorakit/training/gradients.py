"""One flat buffer that holds every gradient, and a watch on which of them arrive."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lorakit.errors import RunFailed


class Gradients:
    """All gradients in one fp32 buffer: one sum over processes, one norm, one fill with zeros.

    Each parameter's `.grad` is a view of the buffer, so backward adds into it. Four more places
    travel with them: the step's loss, and how many processes ended their part of it early, ran
    out of memory, and were asked to stop.
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self.named = dict(named)
        parameters = self.named.values()
        first = next(iter(parameters))
        self.buffer = torch.zeros(sum(p.numel() for p in parameters) + 4, device=first.device)
        self.flat = self.buffer[:-4]
        self.loss, self.dropped, self.short, self.stops = self.buffer[-4:].unbind()
        start = 0
        for parameter in parameters:
            stop = start + parameter.numel()
            parameter.grad = self.flat[start:stop].view_as(parameter)
            start = stop

    def clip(self, longest: float) -> Tensor:
        """Scale the gradients down to a norm of at most `longest`; return the norm before.

        The norm stays on its device. Where it is not finite the gradients are spoilt, and the
        optimizer must not see them.
        """
        norm: Tensor = torch.linalg.vector_norm(self.flat)
        self.flat.mul_((longest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def zero(self) -> None:
        """Forget the gradients and the loss of the step."""
        self.buffer.zero_()

    def watch(self) -> "Watch":
        """Begin to note which parameters the backward passes of one step reach."""
        return Watch(self.named)


class Watch:
    """Notes which parameters received a gradient, to be asked once after the first step."""

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self._missing = dict.fromkeys(named)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._reached, name))  # type: ignore[no-untyped-call]
            for name, parameter in named.items()
        ]

    def finish(self) -> None:
        """Stop watching.

        Raises:
            RunFailed: when a parameter took no part in the loss.
        """
        for hook in self._hooks:
            hook.remove()
        if self._missing:
            first = next(iter(self._missing))
            raise RunFailed(
                "run.no-gradient",
                f"{len(self._missing)} adapter tensors got no gradient in the first step, "
                f"the first is {first}",
                help="the loss does not depend on them: adapt other modules, or report this",
            )

    def _reached(self, name: str, _: Tensor) -> None:
        self._missing.pop(name, None)
