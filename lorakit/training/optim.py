"""The optimizer with its schedule and its state.

AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101. States in 8 bits: Dettmers et al. 2022, arXiv
2110.02861; paged ones: Dettmers et al. 2023, arXiv 2305.14314, section 3. Lion: Chen et al. 2023,
arXiv 2302.06675. Adafactor: Shazeer and Stern 2018, arXiv 1804.04235.
"""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lorakit.errors import EnvironmentLacks, Notice, RunFailed
from lorakit.recipe.sections import Optimizer, Train
from lorakit.storage.redact import printable
from lorakit.training.memory import gib, state_bytes

# What a paged optimizer is where there is no GPU to page from.
UNPAGED: Mapping[Optimizer, Optimizer] = {
    "paged_adamw_8bit": "adamw_8bit",
    "paged_adamw_32bit": "adamw",
}
# bitsandbytes' classes.
BITSANDBYTES: Mapping[Optimizer, str] = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "lion_8bit": "Lion8bit",
}
# Adafactor's ε₁ and ε₂. With the paper's 10⁻³ a B that starts at zero would hardly move; with 1 a
# step has the size that the recipe's rate says, as with AdamW, for tensors of ordinary size.
ADAFACTOR_EPS = (1e-16, 1.0)
# The share of the steps in which `wsd` comes down (Hu et al. 2024, 2404.06395, section 4).
WSD_DECAY = 0.2


def resolve(section: Train, device: torch.device) -> tuple[Optimizer, list[Notice]]:
    """Return the optimizer that a device has for a recipe, with a notice where it is another one.

    Raises:
        EnvironmentLacks: when bitsandbytes is missing, or the recipe wants that optimizer or none.
    """
    name = section.optimizer
    notices = []
    if device.type == "cpu" and name in UNPAGED:
        message = f"train.optimizer: {name} moves states from a GPU to the host; here is no GPU"
        if section.strict_optimizer:
            raise EnvironmentLacks(
                "env.missing-device",
                message,
                help=f"set train.optimizer: {UNPAGED[name]}, or train.strict_optimizer: false",
            )
        name = UNPAGED[name]
        notices = [Notice("run.optimizer", f"{message}; {name} takes its place")]
    if name in BITSANDBYTES and find_spec("bitsandbytes") is None:
        raise _lacks(name, "is not installed")
    return name, notices


def build(
    section: Train, groups: Sequence[Mapping[str, Any]], name: Optimizer, free_bytes: int
) -> torch.optim.Optimizer:
    """Make an optimizer; a group is `{"params": […]}` and may carry its own `lr`.

    Tensors of one dimension, biases and norms, get no weight decay.

    Args:
        section: the rates.
        groups: of parameters.
        name: what `resolve` returned.
        free_bytes: of the device, which states must not outgrow: paged memory beyond that can
            bring a GPU to a stop.

    Raises:
        RunFailed: `run.out-of-memory` when the states are larger than what is free.
        EnvironmentLacks: when bitsandbytes cannot be used.
    """
    split = []
    for group in groups:
        for decays in (True, False):
            members = [p for p in group["params"] if (p.ndim > 1) is decays]
            if members:
                decay = section.weight_decay if decays else 0.0
                split.append({"weight_decay": decay, **group, "params": members})
    needed = sum(state_bytes(tuple(p.shape), name) for group in split for p in group["params"])
    if needed > free_bytes:
        raise RunFailed(
            "run.out-of-memory",
            f"the states of {name} take {gib(needed)}, {gib(free_bytes)} are free",
            help="set train.optimizer: adamw_8bit, or lower adapter.rank",
        )
    optimizer = _made(name, split, section.learning_rate)
    for made in optimizer.param_groups:
        made["highest_lr"] = made["lr"]
    return optimizer


def _made(name: Optimizer, split: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    match name:
        case "adamw":
            return torch.optim.AdamW(split, lr=lr, fused=True)
        case "sgd":
            return torch.optim.SGD(split, lr=lr, fused=True)
        case "adafactor":
            return torch.optim.Adafactor(split, lr=lr, eps=ADAFACTOR_EPS)
    made: torch.optim.Optimizer = getattr(_library(name), BITSANDBYTES[name])(split, lr=lr)
    return made


def _library(name: Optimizer) -> Any:
    """Return bitsandbytes' optimizers; importing them takes seconds, which others need not pay."""
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise _lacks(name, f"cannot be imported ({error})") from error
    return optim


def _lacks(name: Optimizer, what: str) -> EnvironmentLacks:
    return EnvironmentLacks(
        "env.missing-package",
        f"train.optimizer: {name} needs bitsandbytes, which {what}",
        help='pip install "bitsandbytes>=0.50", or set train.optimizer: adamw',
    )


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


def take_step(optimizer: torch.optim.Optimizer, spoilt: Tensor) -> None:
    """Take a step; where the flag `spoilt` is 1 change nothing.

    The fused kernels read the flag on its device, so the host need not wait for it. For the others
    it waits, as bitsandbytes itself does after each tensor.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = spoilt  # type: ignore[attr-defined]  # torch's own contract
        optimizer.step()
    elif not spoilt:
        optimizer.step()
    # Fused kernels and bitsandbytes' do not tell autograd, whose count of changes says which copies
    # of the factors still hold (`adapters/_copies.py`).
    for group in optimizer.param_groups:
        increment_version(group["params"])


def state_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> dict[str, Tensor]:
    """Return the optimizer's state as plain tensors named `moment/parameter`.

    bitsandbytes' tables of the values that 8 bits mean are the same everywhere, and stay out.
    """
    return {
        f"{key}/{names[parameter]}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if not key.startswith("qmap")
    }


def load_state_tensors(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `state_tensors` returned, into the kind of memory that the optimizer takes.

    Raises:
        RunFailed: when the tensors are not those of these parameters.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        moment, _, name = key.partition("/")
        states.setdefault(name, {})[moment] = value
    odd = sorted(set(states) ^ set(named)) if states else []
    ours = not hasattr(optimizer, "init_state")  # bitsandbytes holds moments in its own shapes
    odd += [n for n, state in states.items() if ours and n in named and not _fits(state, named[n])]
    if odd:
        raise RunFailed(
            "checkpoint.damaged",
            f"the optimizer's state does not fit: {printable(odd[0])}",
            help="bring the checkpoint back as it was, or start again with --overwrite",
        )
    if states and not ours:
        _load_bitsandbytes(optimizer, {named[name]: state for name, state in states.items()})
        return
    for name, state in states.items():
        parameter = named[name]
        optimizer.state[parameter] = {
            # Step counts are where the kernels want them: only the fused ones on the device.
            moment: value.to(parameter.device)
            if value.ndim or optimizer.defaults.get("fused")
            else value
            for moment, value in state.items()
        }


def _fits(state: Mapping[str, Tensor], parameter: nn.Parameter) -> bool:
    """Tell whether moments can be those of a parameter; Adafactor's are 1 wide in a dimension."""
    return all(
        size in (1, whole)
        for value in state.values()
        if value.ndim == parameter.ndim
        for size, whole in zip(value.shape, parameter.shape, strict=True)
    )


def _load_bitsandbytes(optimizer: Any, states: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    """Let the optimizer make its states, paged ones as pages, and copy the values into them."""
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, number, place)
            made = optimizer.state[parameter]
            for moment, value in states[parameter].items():
                if isinstance(made[moment], Tensor):
                    made[moment].copy_(value)
                else:
                    made[moment] = int(value)
