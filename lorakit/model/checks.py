"""What must hold of a base: every tensor there, of the right shape, with finite values."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from lorakit.errors import BadInput, Notice, Place, RunFailed
from lorakit.model.weights import Weights
from lorakit.storage.redact import printable

# Buffers that old files hold and that models compute by themselves today.
_COMPUTED = r"rotary_emb\.inv_freq$|(^|\.)position_ids$"


@contextmanager
def at_most(count: int, where: str) -> Iterator[None]:
    """Stop a module that is made in the block once it has more parameters than can be right.

    Numbers in config.json decide how many there are, and a million layers take hours to make.

    Raises:
        BadInput: `model.missing-tensor`.
    """
    made = 0

    def registered(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += parameter is not None
        if made > count:
            raise BadInput(
                "model.missing-tensor",
                f"config.json describes more than {count:,} tensors: those of most layers are "
                "missing from the weights",
                where=where,
                help="fetch the model again, or check that config.json belongs to these files",
            )

    hook = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


def check_tensors(weights: Weights, model: PreTrainedModel, where: str) -> tuple[Notice, ...]:
    """Check that files hold what the model's shape asks for; the model may be on meta.

    Families whose tensors transformers converts while loading are checked after loading alone.

    Returns:
        A notice when the files hold tensors that the model has no place for.

    Raises:
        BadInput: `model.missing-tensor` or `model.shape-mismatch`.
    """
    if get_model_conversion_mapping(model, add_legacy=False):
        return ()
    shared: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        shared[id(tensor)].append((name, tensor))
    missing, used = [], set()
    for named in shared.values():
        stored = [kept for name, _ in named if (kept := weights.stored_name(name))]
        used |= set(stored)
        if not stored and not _ignored(model._keys_to_ignore_on_load_missing, named[0][0]):
            missing.append(named[0][0])
        for name in stored:
            _check_shape(name, weights.shape(name), named[0][1].shape, where)
            if named[0][1].is_floating_point() and not weights.dtype(name).is_floating_point:
                raise BadInput(
                    "model.shape-mismatch",
                    f"{printable(name)} is {weights.dtype(name)} in the files; floating-point "
                    "numbers were expected",
                    where=where,
                    help="fetch the model again, or the config.json that says how it is quantised",
                )
    refuse_missing(missing, where)
    patterns = {_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())}
    unused = [name for name in weights.names if name not in used and not _ignored(patterns, name)]
    if not unused:
        return ()
    message = (
        f"the files hold {len(unused)} tensors that the model of config.json has no place for, "
        f"{printable(unused[0])} the first"
    )
    return (Notice("model.unused-tensors", message, Place(where)),)


def check_loaded(info: dict[str, Any], where: str) -> None:
    """Check transformers' own account of what it loaded.

    Raises:
        BadInput: `model.missing-tensor` or `model.shape-mismatch`.
    """
    refuse_missing(sorted(info["missing_keys"]), where)
    for name, found, expected in sorted(info["mismatched_keys"]):
        _check_shape(name, found, expected, where)


def refuse_missing(names: Collection[str], where: str) -> None:
    """Refuse a model that lacks tensors, which would be drawn at random.

    Raises:
        BadInput: `model.missing-tensor`, when there is a name.
    """
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise BadInput(
            "model.missing-tensor",
            f"{next(iter(names))}{others} missing from the weights",
            where=where,
            help="fetch the model again, or check that config.json belongs to these files",
        )


def check_finite(model: PreTrainedModel, where: str) -> None:
    """Check that no weight is NaN or infinite.

    Raises:
        RunFailed: `model.not-finite`, with the first tensor and its count.
    """
    for name, tensor in model.state_dict().items():
        refuse_not_finite(name, tensor, where)


@torch.no_grad()
def refuse_not_finite(name: str, tensor: Tensor, where: str) -> None:
    """Refuse a tensor with values that are NaN or infinite.

    Raises:
        RunFailed: `model.not-finite`, with their count.
    """
    # The sum is NaN or infinite if any value is, and costs no memory.
    if not tensor.is_floating_point() or tensor.sum(dtype=torch.float32).isfinite():
        return
    if count := int((~tensor.isfinite()).sum()):
        raise RunFailed(
            "model.not-finite",
            f"{name} holds {count:,} values that are NaN or infinite",
            where=where,
            help="fetch the model again; its weights are damaged",
        )


def _check_shape(name: str, found: Iterable[int], expected: Iterable[int], where: str) -> None:
    if tuple(found) != tuple(expected):
        raise BadInput(
            "model.shape-mismatch",
            f"{printable(name)} is {list(found)} in the files, {list(expected)} by config.json",
            where=where,
            help="take config.json and the weights of one model: fetch it again",
        )


def _ignored(patterns: Iterable[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
