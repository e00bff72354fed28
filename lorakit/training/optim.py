"""The optimizer, its schedule, and one flat buffer that holds every gradient."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import RunFailed
from lorakit.recipe.sections import Train

# The share of the steps in which `wsd` comes down (Hu et al. 2024, 2404.06395, section 4).
WSD_DECAY = 0.2


class Gradients:
    """All gradients in one fp32 buffer: one sum over processes, one norm, one fill with zeros.

    Each parameter's `.grad` is a view of the buffer, so backward adds into it. Two more places
    travel with them: the step's loss, and how many processes were asked to stop.
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self.named = dict(named)
        parameters = self.named.values()
        first = next(iter(parameters))
        self.buffer = torch.zeros(count(parameters) + 2, device=first.device)
        self.flat, self.loss, self.stops = self.buffer[:-2], self.buffer[-2], self.buffer[-1]
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


def build(section: Train, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """Make the optimizer; a group is `{"params": […]}` and may carry its own `lr`.

    Tensors of one dimension, biases and norms, get no weight decay.
    """
    split = []
    for group in groups:
        for decays in (True, False):
            members = [p for p in group["params"] if (p.ndim > 1) is decays]
            if members:
                decay = section.weight_decay if decays else 0.0
                split.append({"weight_decay": decay, **group, "params": members})
    optimizer = torch.optim.AdamW(split, lr=section.learning_rate, fused=True)
    for made in optimizer.param_groups:
        made["highest_lr"] = made["lr"]
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's rate to its highest times `factor`; return the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["highest_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def factor(section: Train, step: int, steps: int) -> float:
    """Return the rate of optimizer step `step` (from 0) of `steps` as a share of the highest.

    A pure function, so that nothing of a schedule needs to be saved. It is above 0 in every
    step, the first and the last included.
    """
    warmup = warmup_steps(section, steps)
    if step < warmup:
        return (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)
    match section.schedule:
        case "constant":
            return 1.0
        case "linear":
            return left
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
        case "wsd":
            decay = max(1, math.ceil(WSD_DECAY * steps))
            return min(1.0, (steps - step) / decay)


def warmup_steps(section: Train, steps: int) -> int:
    """Return the number of warm-up steps: below 1 `train.warmup` is a share of all steps."""
    return round(section.warmup * steps) if section.warmup < 1 else int(section.warmup)


def state_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> dict[str, Tensor]:
    """Return the optimizer's state as plain tensors named `moment/parameter`."""
    return {
        f"{key}/{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_state_tensors(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `state_tensors` returned; the step counts stay where the optimizer keeps them.

    Raises:
        RunFailed: when the tensors are not those of these parameters.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        moment, _, name = key.partition("/")
        states.setdefault(name, {})[moment] = value
    if states and set(states) != set(named):
        odd = sorted(set(states) ^ set(named))
        raise RunFailed("checkpoint.damaged", f"the optimizer's state does not fit: {odd[0]}")
    for name, state in states.items():
        parameter = named[name]
        optimizer.state[parameter] = {
            moment: value.to(parameter.device)
            if value.ndim or optimizer.defaults["fused"]
            else value
            for moment, value in state.items()
        }


def finite_gate(optimizer: torch.optim.Optimizer, spoilt: Tensor) -> None:
    """Make the next `optimizer.step` do nothing where the flag `spoilt` is 1.

    The fused kernels read the flag on its device, so the host need not wait for it.
    """
    optimizer.found_inf = spoilt  # type: ignore[attr-defined]  # torch's own contract with GradScaler


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Return the number of values in these parameters."""
    return sum(parameter.numel() for parameter in parameters)
