"""Checkpoints: all that a run needs to go on as if it had never stopped.

`checkpoints/step-000200/` holds the adapter as a PEFT folder, the optimizer's moments, and the
counters; the manifest with every digest is written last and the folder is renamed into place.
The schedule, the order of the data and dropout are functions of the step, so they need no state.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lorakit.errors import BadInput, EnvironmentLacks, Notice, Place, RunFailed
from lorakit.storage import strict_json
from lorakit.storage.manifest import check_manifest, write_manifest
from lorakit.storage.publish import publish_folder, remove_folder
from lorakit.storage.tensors import TensorFile, write_tensors

NAME = re.compile(r"step-(\d{6,})")
SCHEMA = 1


@dataclass
class State:
    """Where a run is: steps done, tokens seen, and the best evaluation so far.

    `owes_evaluation`: a signal came before the evaluation of this step had ended.
    """

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    skipped: int = 0
    loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    owes_evaluation: bool = False
    loss_scale: float = 1.0
    method: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every digest was right when it was opened."""

    folder: Path
    state: State
    pinned: Mapping[str, Any]

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """Read the optimizer's moments."""
        with TensorFile(self.folder / "optimizer.safetensors", "checkpoint") as file:
            return {name: file.read(name) for name in file.names}


def save(
    checkpoints: Path,
    state: State,
    pinned: Mapping[str, Any],
    optimizer: Mapping[str, torch.Tensor],
    save_adapter: Callable[[Path], None],
) -> Path:
    """Write one checkpoint beside its place, verify what was written, and rename it.

    Raises:
        RunFailed: when the disk refuses; every older checkpoint is untouched.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    target = checkpoints / f"step-{state.step:06d}"
    with publish_folder(target, replace=True) as folder:
        save_adapter(folder / "adapter")
        write_tensors(folder / "optimizer.safetensors", optimizer, {"format": "pt"})
        written = {"schema": SCHEMA, "state": asdict(state), "pinned": dict(pinned)}
        (folder / "state.json").write_text(strict_json.dumps(written), encoding="utf-8")
        write_manifest(folder)
    if reason := check_manifest(target):
        raise RunFailed("checkpoint.damaged", f"just written, but {reason}", where=str(target))
    return target


def prune(checkpoints: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    steps = _steps(checkpoints)
    for step in steps[:-keep]:
        if step != best:
            remove_folder(checkpoints / f"step-{step:06d}")


def newest(checkpoints: Path) -> tuple[Checkpoint | None, list[Notice]]:
    """Open the newest good checkpoint; each newer one that is not good is named in a notice.

    Raises:
        RunFailed: when there are checkpoints and none is good.
    """
    skipped = []
    for step in reversed(_steps(checkpoints)):
        folder = checkpoints / f"step-{step:06d}"
        if reason := check_manifest(folder):
            skipped.append((step, reason))
            continue
        going_on = f"; resuming from step {step}"
        notices = [
            Notice(
                "checkpoint.skipped",
                f"skipped step {bad}: {why}{going_on}",
                Place(str(checkpoints)),
            )
            for bad, why in skipped
        ]
        return _open(folder), notices
    if skipped:
        reasons = ", ".join(f"step {step}: {reason}" for step, reason in skipped)
        raise RunFailed(
            "checkpoint.damaged",
            f"no checkpoint is good ({reasons})",
            where=str(checkpoints),
            help="start again with --overwrite, or bring back the files",
        )
    return None, []


def check_unchanged(
    checkpoint: Checkpoint, pinned: Mapping[str, Any], *, allow_inexact: bool
) -> dict[str, tuple[Any, Any]]:
    """Return what differs between a checkpoint and the run that wants to go on from it.

    Raises:
        BadInput: when something differs and an inexact resume was not allowed.
    """
    names = sorted({*checkpoint.pinned, *pinned})
    differs = {
        name: (checkpoint.pinned.get(name), pinned.get(name))
        for name in names
        if checkpoint.pinned.get(name) != pinned.get(name)
    }
    if differs and not allow_inexact:
        changes = "; ".join(
            f"{name} was {old!r} and is {new!r}" for name, (old, new) in differs.items()
        )
        raise BadInput(
            "checkpoint.changed",
            f"the run would not go on as it began: {changes}",
            where=str(checkpoint.folder),
            help="put it back as it was, or go on with --allow-inexact",
        )
    return differs


def _steps(checkpoints: Path) -> list[int]:
    if not checkpoints.is_dir():
        return []
    matches = (NAME.fullmatch(entry.name) for entry in checkpoints.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _open(folder: Path) -> Checkpoint:
    written = strict_json.read(folder / "state.json", "checkpoint")
    if written["schema"] > SCHEMA:
        raise EnvironmentLacks(
            "checkpoint.newer",
            f"a newer lorakit wrote this checkpoint (schema {written['schema']}, known {SCHEMA})",
            where=str(folder),
            help="pip install --upgrade lorakit",
        )
    if written["state"].keys() != {one.name for one in fields(State)}:
        raise BadInput(
            "checkpoint.changed",
            f"lorakit {written['pinned'].get('lorakit')} wrote this checkpoint in another form",
            where=str(folder),
            help="finish the run with that version",
        )
    return Checkpoint(folder, State(**written["state"]), written["pinned"])
