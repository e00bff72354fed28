"""A run's folder: who may write to it, what it tells of the run, and what a resume starts from."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lorakit.environment import all_variables
from lorakit.errors import BadInput, Interrupted, LorakitError, Notice, Place, RunFailed
from lorakit.processes import Signalled
from lorakit.runtime import Runtime
from lorakit.storage import strict_json
from lorakit.storage.disk import storage_errors, sync
from lorakit.storage.lock import locked, refuse_locked
from lorakit.storage.owners import of_another, open_to_all
from lorakit.storage.paths import open_regular
from lorakit.storage.publish import check_place, is_aside, publish_file, remove_folder, sweep
from lorakit.storage.redact import printable, redact
from lorakit.training import checkpoint
from lorakit.training.checkpoint import Checkpoint, saved_steps

Mode = Literal["start", "resume", "resume-or-start", "overwrite"]
# What a folder may hold before its first run: the lock, and a log that is written from the start.
OURS = {".lock", "log.txt"}
RUN = "run.json"
# What was chosen once and a resume keeps, with the least that it can be.
CHOICES = {"micro_batch_limit": 1, "recomputed_layers": 0}
FOLDERS = ("adapter", "checkpoints")
# What a run writes before its first step: a start may take the place of one that came no further.
BEGUN = OURS | {RUN, "recipe.yaml", "resolved.yaml", "plan.json"}


@dataclass
class RunFolder:
    """The folder of one run; only the main process writes to it."""

    path: Path
    is_main: bool
    pinned: Mapping[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    resume: Checkpoint | None = None
    at_work: bool = False  # from the first step on, when there is something to come back to
    changed: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[Notice, ...] = ()
    allow_inexact: bool = False

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def changes(self) -> list[str]:
        """What is not as it was when the run began, in words."""
        return checkpoint.in_words(self.changed)

    def note(self, **facts: Any) -> None:
        """Add facts to `run.json`."""
        self.facts |= facts | {"updated": _now()}
        self.write(RUN, strict_json.dumps(self.facts))

    def begun(self, fact: str) -> Any:
        """Return what `run.json` says of the run that goes on; None of one that begins."""
        return self.facts.get(fact) if self.resume else None

    def chose(self, **facts: Any) -> None:
        """Note choices that the machine allows: those of the run that goes on, if it does.

        Raises:
            BadInput: `checkpoint.changed`, when they are not and that was not allowed.
        """
        if self.resume:
            pairs = {name: (self.facts.get(name, now), now) for name, now in facts.items()}
            differs = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
            checkpoint.check_allowed(self.resume, differs, allow_inexact=self.allow_inexact)
            self.changed = {**self.changed, **differs}
            if self.is_main:  # which alone has begun to write
                self.facts["resumes"][-1]["changed"] = dict(self.changed)
        self.note(**facts)

    def begin(self) -> None:
        """Note that the run is at work; of a resume from which step, and what is not as it was."""
        began = _now()
        self.facts.pop("ended_by", None)
        self.note(
            status="running", started=began, id=self.facts.get("id", f"{self.path.name}-{began}")
        )
        step = self.resume.state.step if self.resume else 0
        supersede(self.metrics, step)
        if self.resume:
            checkpoint.set_damaged_aside(self.checkpoints, step)
            resumed = {"step": step, "changed": dict(self.changed)}
            self.note(resumes=[*self.facts.get("resumes", []), resumed])

    def settle(self) -> None:
        """Push the rows of `metrics.jsonl` to the disk: a checkpoint is never ahead of them."""
        if self.metrics.exists():
            with storage_errors(self.metrics):
                sync(self.metrics)
                sync(self.path)

    def end(self, status: str, reason: str) -> None:
        """Note what the run was ended by; the disk may be just that."""
        with suppress(LorakitError):
            self.note(status=status, ended_by=redact(reason, all_variables()))

    def write(self, name: str, content: str | bytes) -> None:
        """Write one file of the folder, beside its place and renamed."""
        if self.is_main:
            data = content.encode() if isinstance(content, str) else content
            publish_file(self.path / name, data, replace=True)


@contextmanager
def opened(
    path: Path,
    mode: Mode,
    runtime: Runtime,
    pinned: Mapping[str, Any],
    *,
    allow_inexact: bool = False,
) -> Iterator[RunFolder]:
    """Lock a run's folder and make it ready; `status` in `run.json` follows what happens.

    Args:
        path: the folder.
        mode: what may be done with a run that is there.
        runtime: every process opens the folder, the main one writes.
        pinned: what must be as it was when a run goes on.
        allow_inexact: go on although something is not.

    Raises:
        BadInput: when the folder holds something this mode must not touch, nothing to resume, or
            a run that would not go on as it began. Nothing was written.
        RunFailed: when another run holds it, or it has checkpoints and none is good.
    """
    if not runtime.is_main:
        # It does not ask whether the folder is free: the main process may already have opened it.
        folder = _found(path, mode, runtime, pinned, allow_inexact=allow_inexact)
        runtime.wait()
        with interruptible(path):
            yield folder
        return
    check_free(path, mode)
    made = [one for one in (path, *path.parents) if not os.path.exists(one)]
    with locked(path) as sign:
        for place in (path, path / "checkpoints"):
            if place.is_dir():
                sweep(place)
        _check_contents(path, mode)  # again: another run may have come and gone before the lock
        folder = _found(path, mode, runtime, pinned, allow_inexact=allow_inexact)
        sign()
        if mode in ("start", "overwrite"):
            # What makes it a run goes last: after a kill the rest can still be overwritten.
            for entry in sorted(path.iterdir(), key=lambda entry: entry.name == RUN):
                if entry.name != ".lock":
                    remove_folder(entry) if entry.is_dir() else entry.unlink()
        folder.begin()
        runtime.wait()
        try:
            with interruptible(path):
                yield folder
                folder.note(status="finished")
        except (BadInput, RunFailed) as error:
            if made and not folder.at_work:
                _remove(made)
            else:
                folder.end("failed", str(error))
            raise
        except BaseException as error:
            stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
            folder.end("interrupted" if stopped else "failed", str(error))
            raise


def _remove(made: Sequence[Path]) -> None:
    """Remove the folder of a run that came to nothing, and those above it that were made for it."""
    with suppress(OSError, LorakitError):
        remove_folder(made[0])
        for parent in made[1:]:
            parent.rmdir()  # unless another run has come into it


@contextmanager
def interruptible(path: Path) -> Iterator[None]:
    """Tell of a signal that the run can be gone on with, where it can.

    What the block was at is dropped: to load, to evaluate and to merge is still to come after the
    newest checkpoint.

    Raises:
        Interrupted: in place of `Signalled`, when there is a good checkpoint.
    """
    try:
        yield
    except Signalled as ended:
        found = None
        with suppress(LorakitError):
            found, _ = checkpoint.newest(path / "checkpoints")
        if found is None:
            raise
        step = found.state.step
        raise checkpoint.interrupted(ended.signal, path / "checkpoints", step) from None


def ended(path: Path, runtime: Runtime, pinned: Mapping[str, Any]) -> RunFolder | None:
    """Return the folder of a run that has finished and would go on as it began, else None.

    Nothing is written: where nothing is left to do, its figures stay what they are.

    Raises:
        BadInput: as `opened` does.
        RunFailed: when it has checkpoints and none is good.
    """
    if not os.path.lexists(path / RUN):
        return None
    if strict_json.read_object(path / RUN, "checkpoint").get("status") != "finished":
        return None
    folder = _found(path, "resume-or-start", runtime, pinned, allow_inexact=True)
    return folder if folder.resume and not folder.changed else None


def _found(
    path: Path, mode: Mode, runtime: Runtime, pinned: Mapping[str, Any], *, allow_inexact: bool
) -> RunFolder:
    """Find what a resume goes on from."""
    exposed = open_to_all(path)
    fresh = RunFolder(path, runtime.is_main, pinned, notices=(exposed,) if exposed else ())
    if mode not in ("resume", "resume-or-start"):
        return fresh
    found, notices = checkpoint.newest(path / "checkpoints")
    if found is None:
        if mode == "resume":
            raise _nothing_to_resume(path)
        return fresh
    changed = checkpoint.check_unchanged(found, pinned, allow_inexact=allow_inexact)
    facts = strict_json.read_object(path / RUN, "checkpoint")
    folder = replace(fresh, facts=facts, resume=found, changed=changed, allow_inexact=allow_inexact)
    if changed:
        message = f"the run does not go on as it began: {'; '.join(folder.changes)}"
        notices.append(Notice("checkpoint.inexact", message, Place(str(found.folder))))
    if foreign := of_another(found.folder):
        notices.append(foreign)
    return replace(folder, notices=(*fresh.notices, *notices))


def check_facts(path: Path) -> None:
    """Check that what a resume takes from `run.json`, where there is one, is as a run writes it.

    Raises:
        RunFailed: `checkpoint.damaged`.
    """
    if not os.path.lexists(path / RUN) or not any(_checkpoints(path)):
        return
    facts = strict_json.read_object(path / RUN, "checkpoint")
    wrong = [
        key
        for key, least in CHOICES.items()
        if type(value := facts.get(key)) is not int or value < least
    ]
    if not isinstance(facts.get("resumes", []), list):
        wrong.append("resumes")
    if wrong:
        found = printable(strict_json.dumps_line(facts.get(wrong[0])))
        message = f"{wrong[0]}: no run wrote {found}, and a resume goes by it"
        help = "bring the file back as it was, or start again with --overwrite"
        raise RunFailed("checkpoint.damaged", message, where=str(path / RUN), help=help)


def supersede(metrics: Path, step: int) -> None:
    """Mark the rows after `step`, which a resume takes again; what is no row is left out.

    Raises:
        RunFailed: when the disk refuses.
    """
    if not metrics.exists():
        return
    rows = []
    with open_regular(metrics, "checkpoint") as file, storage_errors(metrics):
        for line in file.read().splitlines():
            with suppress(LorakitError):
                row = strict_json.parse(line, Place(str(metrics)), "checkpoint")
                if isinstance(row, dict) and type(row.get("step")) is int:
                    rows.append(row | {"superseded": True} if row["step"] > step else row)
    text = "".join(f"{strict_json.dumps_line(row)}\n" for row in rows)
    publish_file(metrics, text.encode(), replace=True)


def _nothing_to_resume(path: Path) -> BadInput:
    help = "run without --resume, or with --resume-or-start"
    if os.path.lexists(path / RUN):  # which a run without a mode might have to leave as it is
        help = "run with --overwrite"
    message = "--resume finds no checkpoint here"
    return BadInput("checkpoint.none", message, where=str(path), help=help)


def check_free(path: Path, mode: Mode) -> None:
    """Check that a run may use the folder, before anything is written.

    Raises:
        BadInput: when it holds something that this mode must not touch.
        RunFailed: `run.locked` when a run is at work there.
    """
    for name in (*BEGUN, *FOLDERS, "metrics.jsonl"):
        check_place(path / name)
        _check_kind(path / name, is_folder=name in FOLDERS)
    if not os.path.exists(path):
        if mode == "resume":
            raise _nothing_to_resume(path)
        return
    refuse_locked(path)
    _check_contents(path, mode)


def _check_kind(path: Path, *, is_folder: bool) -> None:
    """Check that what a run keeps in a folder is no file, and the other way around."""
    if path.exists() and path.is_dir() != is_folder:
        kinds = ("a directory", "a file")
        found, kept = kinds if not is_folder else reversed(kinds)
        raise BadInput(
            "output.not-empty",
            f"is {found}, where a run keeps {kept} of that name",
            where=str(path),
            help="move it away, or choose another folder with --out",
        )


def _check_contents(path: Path, mode: Mode) -> None:
    present = {entry.name for entry in path.iterdir() if not is_aside(entry.name)} - OURS
    if not present:
        if mode == "resume":
            raise _nothing_to_resume(path)
        return
    if RUN not in present:
        raise BadInput(
            "output.not-empty",
            f"the folder holds files that are no run ({', '.join(sorted(present)[:3])})",
            where=str(path),
            help="choose another with --out",
        )
    if mode == "start" and (present - BEGUN - {"checkpoints"} or any(_checkpoints(path))):
        goes_on = "--resume goes on with it, " if saved_steps(path / "checkpoints") else ""
        raise BadInput(
            "output.not-empty",
            f"the folder holds a run that {_state_of(path)}",
            where=str(path),
            help=f"{goes_on}--overwrite removes it, --out takes another folder",
        )


def _state_of(path: Path) -> str:
    """Say how far the run of a folder has come; nobody holds the folder's lock."""
    facts = strict_json.read_object(path / RUN, "checkpoint")
    status, started, updated = (
        printable(str(facts.get(key))) for key in ("status", "started", "updated")
    )
    if status == "running":
        return f"was killed; it began {started}"
    return f"is {status} since {updated}"


def _checkpoints(path: Path) -> Iterator[Path]:
    """Yield what stands in the folder of checkpoints, other than what a kill left there."""
    folder = path / "checkpoints"
    entries = folder.iterdir() if folder.is_dir() else ()
    return (entry for entry in entries if not is_aside(entry.name))


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
