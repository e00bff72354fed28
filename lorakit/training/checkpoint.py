"""Checkpoints: all that a run needs to go on as if it had never stopped.

`checkpoints/step-000200/` holds the adapter as a PEFT folder, the optimizer's moments, and the
counters; the manifest with every digest is written last and the folder is renamed into place.
The schedule, the order of the data and dropout are functions of the step, so they need no state.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any, get_origin, get_type_hints

import torch

from lorakit.errors import BadInput, EnvironmentLacks, Interrupted, Notice, Place, RunFailed
from lorakit.storage import strict_json
from lorakit.storage.disk import require_space
from lorakit.storage.manifest import check_manifest, write_manifest
from lorakit.storage.publish import publish_folder, remove_folder, set_aside
from lorakit.storage.redact import printable
from lorakit.storage.tensors import TensorFile, write_tensors
from lorakit.training import loss_scale

NAME = re.compile(r"step-(\d{6,})")
OPTIMIZER = "optimizer.safetensors"
SCHEMA = 1
_HELD = re.compile(r"recipe\.(adapter\.|train\.optimizer$)")  # keys whose tensors it holds
NOT_FINITE = "lower train.learning_rate, or set model.dtype to bf16 or fp32"


@dataclass
class State:
    """Where a run is: steps done, tokens seen, and the best evaluation so far.

    `inexact`: what was not as it had been when the run went on.
    `owes_evaluation`: a signal came before the evaluation of this step had ended.
    `finite_steps`: in a row, since the loss scale last changed.
    `seconds`: of all sessions; those of `training_seconds` are without evaluating and saving.
    `untimed_tokens`: of steps whose time a checkpoint did not hold yet.
    `peak_bytes`: the most memory of any session.
    """

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    skipped: int = 0
    loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    inexact: list[str] = field(default_factory=list)
    owes_evaluation: bool = False
    loss_scale: float = 1.0
    finite_steps: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    untimed_tokens: int = 0
    peak_bytes: int = 0
    method: dict[str, Any] = field(default_factory=dict)

    def rate(self, tokens: int) -> float:
        """Return the tokens a second of training, when so many had been seen."""
        seconds = self.training_seconds
        return (tokens - self.untimed_tokens) / seconds if seconds else 0.0


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
        with TensorFile(self.folder / OPTIMIZER, "checkpoint") as file:
            return {name: file.read(name) for name in file.names}


def save(
    checkpoints: Path,
    state: State,
    pinned: Mapping[str, Any],
    optimizer: Mapping[str, torch.Tensor],
    save_adapter: Callable[[Path], None],
) -> Path:
    """Write one checkpoint beside its place, rename it, and read it again.

    Raises:
        RunFailed: when the disk refuses or is too small, or a value is not finite; every older
            checkpoint is untouched.
    """
    check_finite(optimizer, state.step, checkpoints)
    target = checkpoints / step_name(state.step)
    try:
        with publish_folder(target, replace=True, needed=_size(checkpoints, optimizer)) as folder:
            save_adapter(folder / "adapter")
            write_tensors(folder / OPTIMIZER, optimizer, {"format": "pt"})
            _check_written(folder / OPTIMIZER, optimizer)
            written = {"schema": SCHEMA, "state": asdict(state), "pinned": dict(pinned)}
            (folder / "state.json").write_text(strict_json.dumps(written), encoding="utf-8")
            write_manifest(folder)
    except RunFailed as error:
        if last := [step for step in saved_steps(checkpoints) if step < state.step][-1:]:
            saved = f"step {last[0]} is saved, go on from there with --resume"
            error.help = f"{saved}; {error.help}" if error.help else saved
        raise
    if reason := check_manifest(target):
        raise RunFailed("checkpoint.damaged", f"just written, but {reason}", where=str(target))
    return target


def check_finite(tensors: Mapping[str, torch.Tensor], step: int, checkpoints: Path) -> None:
    """Check that every value of what a checkpoint would hold is finite.

    Raises:
        RunFailed: `run.not-finite`, with the first tensor that is not.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            message = f"{name} is not finite after step {step}: no checkpoint is written"
            raise RunFailed("run.not-finite", message, where=str(checkpoints), help=NOT_FINITE)


def check_space(checkpoints: Path, size: int, keep: int) -> None:
    """Check that the checkpoints of a run will fit: those it keeps, and one more while it saves.

    Each takes `size` bytes.

    Raises:
        RunFailed: `storage.full`, with the bytes needed and available.
    """
    missing = max(1, keep + 1 - len(saved_steps(checkpoints)))
    try:
        require_space(checkpoints, missing * size)
    except RunFailed as error:
        error.help = "lower train.keep_checkpoints, or move output_dir to another disk"
        raise


def prune(checkpoints: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    steps = saved_steps(checkpoints)
    for step in steps[:-keep]:
        if step != best:
            remove_folder(checkpoints / step_name(step))


def newest(checkpoints: Path) -> tuple[Checkpoint | None, list[Notice]]:
    """Open the newest good checkpoint; each newer one that is not good is named in a notice.

    Raises:
        RunFailed: when there are checkpoints and none is good.
    """
    skipped = []
    for step in reversed(saved_steps(checkpoints)):
        folder = checkpoints / step_name(step)
        if reason := _damage(folder):
            skipped.append((step, reason))
            continue
        found = _open(folder)
        if found.state.step != step:
            skipped.append((step, f"it holds step {found.state.step}"))
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
        return found, notices
    if skipped:
        reasons = ", ".join(f"step {step}: {reason}" for step, reason in skipped)
        raise RunFailed(
            "checkpoint.damaged",
            f"no checkpoint is good ({reasons})",
            where=str(checkpoints),
            help="start again with --overwrite, or bring back the files",
        )
    return None, []


def set_damaged_aside(checkpoints: Path, good: int) -> None:
    """Rename what stands after the newest good step, so that pruning never counts on it.

    Raises:
        RunFailed: when the disk refuses.
    """
    for step in saved_steps(checkpoints):
        if step > good:
            set_aside(checkpoints / step_name(step), f".bad-{step_name(step)}")


def check_unchanged(
    checkpoint: Checkpoint, pinned: Mapping[str, Any], *, allow_inexact: bool
) -> dict[str, tuple[Any, Any]]:
    """Return what differs between a checkpoint and the run that wants to go on from it.

    Raises:
        BadInput: when something differs and an inexact resume was not allowed, or it is what the
            checkpoint holds the tensors of.
    """
    names = sorted({*checkpoint.pinned, *pinned})
    differs = {
        name: (checkpoint.pinned.get(name), pinned.get(name))
        for name in names
        if checkpoint.pinned.get(name) != pinned.get(name)
    }
    check_allowed(checkpoint, differs, allow_inexact=allow_inexact)
    return differs


def check_allowed(
    checkpoint: Checkpoint, differs: Mapping[str, tuple[Any, Any]], *, allow_inexact: bool
) -> None:
    """Check that a run may go on from a checkpoint although something differs.

    Raises:
        BadInput: when an inexact resume was not allowed, or it is what the checkpoint holds the
            tensors of.
    """
    kept = {name: pair for name, pair in differs.items() if _HELD.match(name)}
    if kept or (differs and not allow_inexact):
        way = "go on with --allow-inexact"
        if kept:  # the checkpoint's own tensors
            way = "begin a run of its own, for --allow-inexact cannot change what is saved"
        raise BadInput(
            "checkpoint.changed",
            f"the run would not go on as it began: {'; '.join(in_words(kept or differs))}",
            where=str(checkpoint.folder),
            help=f"put it back as it was, or {way}",
        )


def in_words(differs: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Say what is not as it was."""
    return [
        f"{printable(name)} was {printable(repr(old))} and is {printable(repr(new))}"
        for name, (old, new) in differs.items()
    ]


def interrupted(signal: Signals | None, checkpoints: Path, step: int) -> Interrupted:
    """Return the error of a run that was stopped and whose checkpoint of a step is written."""
    return Interrupted(
        "run.interrupted",
        f"stopped by {signal.name if signal else 'a signal'} after step {step}; "
        "its checkpoint is written",
        where=str(checkpoints),
        help="run the same command with --resume",
    )


def step_name(step: int) -> str:
    """Return the name of a step's folder."""
    return f"step-{step:06d}"


def saved_steps(checkpoints: Path) -> list[int]:
    """Return the steps of the checkpoints that are there, good or not, from the first on."""
    if not checkpoints.is_dir():
        return []
    matches = (NAME.fullmatch(entry.name) for entry in checkpoints.iterdir())
    # A number has other names: with more zeros, or with the digits of another script.
    return sorted(int(m[1]) for m in matches if m and m[0] == step_name(int(m[1])))


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint; bytes that cannot be read are damaged bytes."""
    try:
        return check_manifest(folder)
    except RunFailed as error:
        if error.id != "storage.io":
            raise
        return f"it cannot be read: {error.message}"


def _check_written(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Read a file of tensors again and compare it with what it was made of.

    Raises:
        RunFailed: `checkpoint.damaged` when the disk holds something else.
    """
    with TensorFile(path, "checkpoint") as file:
        for name, tensor in tensors.items():
            if name not in file.names or not torch.equal(file.read(name), tensor.cpu()):
                message = f"just written, but {name} is not in the file as it is in memory"
                raise RunFailed("checkpoint.damaged", message, where=str(path))


def _size(checkpoints: Path, optimizer: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes that a checkpoint takes: as many as the last one, else what is known."""
    for step in saved_steps(checkpoints)[-1:]:
        files = (checkpoints / step_name(step)).rglob("*")
        return sum(path.stat().st_size for path in files)
    # Two moments of AdamW, and the adapter of the same size.
    return sum(tensor.nbytes for tensor in optimizer.values()) * 3 // 2


def _open(folder: Path) -> Checkpoint:
    written = strict_json.read_object(folder / "state.json", "checkpoint")
    schema, state, pinned = (written.get(key) for key in ("schema", "state", "pinned"))
    if type(schema) is int and schema > SCHEMA:
        raise EnvironmentLacks(
            "checkpoint.newer",
            f"a newer lorakit wrote this checkpoint (schema {schema}, known {SCHEMA})",
            where=str(folder),
            help="pip install --upgrade lorakit",
        )
    known = get_type_hints(State)
    if schema != SCHEMA or not isinstance(state, dict) or not isinstance(pinned, dict):
        raise _not_ours(folder, "state.json has no schema, state and pinned")
    if "seconds" not in state:  # as it was written before a run's time was counted
        figures = {"seconds": 0.0, "training_seconds": 0.0, "peak_bytes": 0}
        state |= figures | {"untimed_tokens": state.get("tokens")}
    if state.keys() != known.keys():
        raise BadInput(
            "checkpoint.changed",
            f"another lorakit ({printable(str(pinned.get('lorakit')))}) wrote this checkpoint in "
            "another form",
            where=str(folder),
            help="finish the run with that version",
        )
    for key, kind in known.items():
        if not isinstance(
            state[key], get_origin(kind) if get_origin(kind) in (dict, list) else kind
        ):
            raise _not_ours(folder, f"state.{key} is {printable(repr(state[key]))}")
    if not 0 < state["loss_scale"] <= loss_scale.LARGEST:
        raise _not_ours(folder, f"state.loss_scale is {state['loss_scale']}")
    if not 0 <= state["finite_steps"] < loss_scale.DOUBLES_AFTER:
        raise _not_ours(folder, f"state.finite_steps is {state['finite_steps']}")
    for key, most in (("training_seconds", "seconds"), ("untimed_tokens", "tokens")):
        if not 0 <= state[key] <= state[most]:
            raise _not_ours(folder, f"state.{key} is {state[key]}")
    return Checkpoint(folder, State(**state), pinned)


def _not_ours(folder: Path, what: str) -> RunFailed:
    message, help = f"no run wrote this: {what}", "start again with --overwrite"
    return RunFailed("checkpoint.damaged", message, where=str(folder), help=help)
