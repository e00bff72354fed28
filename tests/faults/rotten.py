"""Bytes that are no longer what was written: found, or without any effect."""

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import adapters
from lorakit.data.cache import entries, prepared
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
from tests.faults.syscalls import in_one_thread
from tests.faults.trials import Trial, chance

NOT_REACHED = 98  # exit code of a child whose writes were fewer
# What a disk spoils: a write of any file of tensors, one of a merge, what a header says beside its
# tensors; and once it was synced, the name of a tensor of a merge, or a file of a checkpoint that
# is not the first. Each up to a case, and which of them.
LIES = {
    "tensors": (60, range(48)),
    "merged": (80, range(22)),
    "header": (90, range(8)),
    "name": (100, range(1)),
    "checkpoint": (110, range(2, 6)),
}
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
    if case % 10 == 1:
        what = "another system prompt in the passport"
        passport = json.loads((path / "lorakit.json").read_text())
        passport["recipe"]["data"]["system"] = "other"
        (path / "lorakit.json").write_text(json.dumps(passport))
    elif case % 10 == 3:
        what = "another lora_alpha"
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3}))
    else:
        what = damage(path, chance("d3", case), flips_only=case % 2 == 0)
    unharmed(lambda: of_adapter(subject, path), facts_of_adapter(subject), what)


def rotten_merge(subject: Subject, case: int, folder: Path) -> None:
    path = copied(subject.whole / "merged", folder / "merged")
    what = damage(path, chance("d4", case), flips_only=case % 2 == 0)
    unharmed(lambda: of_model(path), facts_of_merge(subject), what)


def rotten_tokens(subject: Subject, case: int, folder: Path) -> None:
    """Damage an entry of the token cache: the rows are as they were, from it or made again."""
    copied(entry_of(subject), folder / "cache")
    rng = chance("d6", case)
    if case % 10 == 1:
        what = "another entry under its name"
        (entry,) = entries(folder / "cache")
        shutil.rmtree(entry)
        (other,) = entries(entry_of(subject, seed=1))
        copied(other, entry)
    else:
        what = damage(folder / "cache", rng, flips_only=case % 2 == 0)
    assert tokens(subject, folder / "cache") == tokens(subject, entry_of(subject)), what


@cache
def entry_of(subject: Subject, seed: int = 0) -> Path:
    """Return a cache folder with one entry; with another seed it holds other rows."""
    place = subject.own(f"cache-{seed}")
    tokens(subject, place, seed)
    return place


def tokens(subject: Subject, place: Path, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Return the ids and labels of the training rows, with a cache at `place`."""
    request = replace(Request.of(subject.plan.recipe), seed=seed)
    plan = subject.plan
    dataset = prepared(place, request, plan.tokenizer, plan.base.context)
    return [(example.ids.tolist(), example.labels.tolist()) for example in dataset.train]


class Liar:
    """A disk that spoils one bit of one write of a kind, or of one sync, after it was asked to."""

    def __init__(self, kind: str, which: range, rng: random.Random) -> None:
        self.kind, self.rng, self.lied = kind, rng, False
        self.before = rng.choice(which)

    def take_place(self) -> None:
        """Answer for the disk in this process."""
        pwrite, copy, sync = os.pwrite, os.copy_file_range, os.fsync

        def lying_pwrite(descriptor: int, data: bytes, offset: int) -> int:
            count = pwrite(descriptor, data, offset)
            self.hear(descriptor, offset, count)
            return count

        def lying_copy(source: int, target: int, count: int, start: int, offset: int) -> int:
            count = copy(source, target, count, start, offset)
            self.hear(target, offset, count)
            return count

        def lying_sync(descriptor: int) -> None:
            sync(descriptor)
            self.hear(descriptor, None, 0)

        os.pwrite, os.copy_file_range, os.fsync = lying_pwrite, lying_copy, lying_sync

    def hear(self, descriptor: int, offset: int | None, count: int) -> None:
        """Spoil what was written, or a file that was synced, if its turn has come."""
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        meant = {
            "tensors": offset is not None,
            "merged": offset is not None and "merged" in str(path),
            "header": offset == 0,
            "name": offset is None and "merged" in str(path),
            "checkpoint": offset is None and ".tmp-step" in str(path),
        }
        if self.lied or path.suffix != ".safetensors" or not meant[self.kind]:
            return
        self.lied, self.before = self.before == 0, self.before - 1
        if not self.lied:
            return
        content = bytearray(path.read_bytes())
        start, length = offset or 0, count or len(content)
        if first := {"header": b"pt", "name": b"model."}.get(self.kind):
            start, length = content.index(first), len(first)
        at = start + self.rng.randrange(length)
        content[at] ^= 1 << self.rng.randrange(8)
        with path.open("r+b") as file:
            file.write(content)


def lying_disk(subject: Subject, case: int, folder: Path) -> None:
    """Let the disk keep other bytes than it was given: who wrote them reads them again."""
    kind, which = next((kind, which) for kind, (end, which) in LIES.items() if case < end)
    liar, out = Liar(kind, which, chance("d5", case)), folder / "run"

    def action() -> int | None:
        liar.take_place()
        code = in_one_thread(subject.train(out, merge=True))
        return code if liar.lied else NOT_REACHED

    ended = run(action)
    if ended.code == NOT_REACHED:
        return
    assert ended.code in (1, 3), f"what the disk made of {kind} went unseen: {ended}"
    assert "None" not in ended.said, ended
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
    Trial("d5", "a disk that keeps other bytes than it was given", 110, 4, lying_disk),
    Trial("d3", "an adapter flipped or torn", 1000, 100, rotten_adapter),
    Trial("d4", "a merged model flipped or torn", 500, 40, rotten_merge),
]
