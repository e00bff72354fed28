"""Bytes that are no longer what was written: found, or without any effect."""

import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import adapters
from lorakit.data.cache import prepared
from lorakit.data.items import Request
from lorakit.errors import LorakitError, RunFailed
from lorakit.model import base as bases
from lorakit.model.sites import find_sites
from lorakit.model.tokenizer import read_tokenizer
from lorakit.recipe.sections import Model
from lorakit.training import checkpoint
from tests.faults.damage import damage
from tests.faults.forked import run
from tests.faults.subject import Subject, copied
from tests.faults.trials import Trial, chance

NOT_REACHED = 98  # exit code of a child whose writes were fewer
PROBE = "the user asks <|im_end|> the system"


def flipped_checkpoint(subject: Subject, case: int, folder: Path) -> None:
    spoilt_checkpoint(subject, "d1", case, folder, flips_only=True)


def torn_checkpoint(subject: Subject, case: int, folder: Path) -> None:
    spoilt_checkpoint(subject, "d2", case, folder, flips_only=False)


def spoilt_checkpoint(
    subject: Subject, trial: str, case: int, folder: Path, *, flips_only: bool
) -> None:
    """Damage the newer of two checkpoints; the older one is taken, and the newer one named."""
    copied(subject.whole / "checkpoints", folder / "checkpoints")
    older, newer = sorted((folder / "checkpoints").iterdir())
    rng = chance(trial, case)
    if not flips_only and rng.random() < 0.1:
        both = [damage(one, rng, flips_only=True) for one in (older, newer)]
        with pytest.raises(RunFailed, match=r"step 4: .*step 3: ") as caught:
            checkpoint.newest(folder / "checkpoints")
        assert caught.value.id == "checkpoint.damaged", both
        return
    if not flips_only and rng.random() < 0.1:
        copied(older, newer.with_name("step-000009"))
        what, bad = "an older one under a newer name", 9
        expected = 4
    else:
        what, bad, expected = damage(newer, rng, flips_only=flips_only), 4, 3
    found, notices = checkpoint.newest(folder / "checkpoints")
    assert found, what
    assert found.state.step == expected, f"{what}: step {found.state.step} was taken"
    assert any(f"skipped step {bad}:" in notice.message for notice in notices), what


def rotten_adapter(subject: Subject, case: int, folder: Path) -> None:
    path = copied(subject.whole / "adapter", folder / "adapter")
    what = damage(path, chance("d3", case), flips_only=case % 2 == 0)
    unharmed(lambda: of_adapter(subject, path), facts_of_adapter(subject), what)


def rotten_merge(subject: Subject, case: int, folder: Path) -> None:
    path = copied(subject.whole / "merged", folder / "merged")
    what = damage(path, chance("d4", case), flips_only=case % 2 == 0)
    unharmed(lambda: of_model(path), facts_of_merge(subject), what)


def rotten_tokens(subject: Subject, case: int, folder: Path) -> None:
    """Damage an entry of the token cache: the rows are as they were, from it or made again."""
    copied(entry_of(subject), folder / "cache")
    what = damage(folder / "cache", chance("d6", case), flips_only=case % 2 == 0)
    assert tokens(subject, folder / "cache") == tokens(subject, entry_of(subject)), what


@cache
def entry_of(subject: Subject) -> Path:
    """Return a cache folder with one entry."""
    tokens(subject, subject.own("cache"))
    return subject.own("cache")


def tokens(subject: Subject, place: Path) -> list[tuple[list[int], list[int]]]:
    """Return the ids and labels of the training rows, with a cache at `place`."""
    recipe = subject.plan.recipe
    request = Request.of(recipe)
    plan = subject.plan
    dataset = prepared(place, request, plan.tokenizer, plan.base.context)
    return [(example.ids.tolist(), example.labels.tolist()) for example in dataset.train]


def lying_disk(subject: Subject, case: int, folder: Path) -> None:
    """Let one write put other bytes on the disk than it was given: a save reads them again."""
    rng = chance("d5", case)
    out, chosen, real = folder / "run", rng.randrange(60), os.pwrite
    number = 0

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal number
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(".safetensors"):
            number += 1
        if path.endswith(".safetensors") and number == chosen + 1:
            changed = bytearray(data)
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            data = bytes(changed)
        return real(descriptor, data, offset)

    def action() -> int:
        os.pwrite = pwrite
        code = subject.train(out, merge=True)()
        return code if number > chosen else NOT_REACHED

    ended = run(action)
    if ended.code == NOT_REACHED:
        return
    assert ended.code in (1, 3), f"write {chosen} of other bytes went unseen: {ended}"
    subject.finish(out, merge=True)


def unharmed(load: Callable[[], Mapping[str, Any]], wanted: Mapping[str, Any], what: str) -> None:
    """Check that loading is refused in lorakit's words, or gives what it always gave."""
    try:
        found = load()
    except LorakitError:
        return
    if found.get("told"):  # in a warning, which --strict makes an error
        return
    for key, value in wanted.items():
        assert found.get(key) == value, f"{what} changed {key}"


@cache
def facts_of_adapter(subject: Subject) -> Mapping[str, Any]:
    return of_adapter(subject, subject.whole / "adapter")


@cache
def facts_of_merge(subject: Subject) -> Mapping[str, Any]:
    return of_model(subject.whole / "merged")


def of_adapter(subject: Subject, path: Path) -> dict[str, Any]:
    """Return what a saved adapter does: its layers on the base, its prompts, its papers."""
    saved = adapters.read(path)
    adapters.check_base(saved, subject.plan.base)
    model = bases.skeleton(subject.plan.base)
    layers = adapters.merge_layers(saved, find_sites(model))
    found: dict[str, Any] = {
        name: (layer.scale, {key: digest(one) for key, one in layer.tensors().items()})
        for name, layer in layers.items()
    }
    passport: Any = saved.passport or {}
    data = passport.get("recipe", {}).get("data", {})
    return found | {
        "told": any(notice.id == "adapter.passport-changed" for notice in saved.notices),
        "method": saved.method().name(),
        "tokenizer": of_tokenizer(path, subject.plan.base.config),
        "system": data.get("system"),
        "format": data.get("format"),
    }


def of_model(path: Path) -> dict[str, Any]:
    """Return what a model folder holds: settings, weights, and what its tokenizer does."""
    base = bases.find(
        Model(path=str(path)), Path(), offline=True, allow_remote_code=False, cache=Path("none")
    )
    model = bases.load(base, device=torch.device("cpu"), dtype=torch.float32)
    settings = base.config.to_dict() | {"name_or_path": None, "_name_or_path": None}
    return {
        "config": json.dumps(settings, sort_keys=True, default=str),
        "generation": base.generation.to_json_string(ignore_metadata=True),
        "tokenizer": of_tokenizer(path, base.config),
        **{name: digest(tensor) for name, tensor in model.state_dict().items()},
    }


def of_tokenizer(path: Path, config: Any) -> tuple[Any, ...]:
    """Return what a tokenizer makes of a text, and its template of a conversation."""
    tokenizer = read_tokenizer(path, config)
    ids = tokenizer(PROBE)["input_ids"]
    return (
        ids,
        tokenizer.decode(range(len(tokenizer))),
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.chat_template,
    )


def digest(tensor: torch.Tensor) -> str:
    return sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


TRIALS = [
    Trial("d1", "one flipped bit anywhere in a checkpoint", 10_000, 300, flipped_checkpoint),
    Trial("d2", "a checkpoint cut, extended, swapped, zeroed, removed", 1000, 60, torn_checkpoint),
    Trial("d6", "an entry of the token cache flipped or torn", 500, 30, rotten_tokens),
    Trial("d5", "a disk that keeps other bytes than it was given", 60, 2, lying_disk),
    Trial("d3", "an adapter flipped or torn", 1000, 100, rotten_adapter),
    Trial("d4", "a merged model flipped or torn", 500, 40, rotten_merge),
]
