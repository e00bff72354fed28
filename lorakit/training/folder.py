"""A run's folder: who may write to it, what it tells of the run, and what a resume starts from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import BadInput, LorakitError, Notice
from lorakit.runtime import Runtime
from lorakit.storage import strict_json
from lorakit.storage.lock import locked
from lorakit.storage.publish import publish_file, remove_folder
from lorakit.training import checkpoint
from lorakit.training.checkpoint import Checkpoint

Mode = Literal["start", "resume", "resume-or-start", "overwrite"]
# What a folder may hold before its first run: the lock, and a log that is written from the start.
OURS = {".lock", "log.txt"}


@dataclass
class RunFolder:
    """The folder of one run; only the main process writes to it."""

    path: Path
    is_main: bool
    facts: dict[str, Any]
    resume: Checkpoint | None = None
    notices: tuple[Notice, ...] = ()

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def note(self, **facts: Any) -> None:
        """Add facts to `run.json`."""
        self.facts |= facts | {"updated": _now()}
        self.write("run.json", strict_json.dumps(self.facts))

    def note_resume(self, changed: Mapping[str, Any]) -> None:
        """Add to `run.json` from which step the run goes on, and what is not as it was."""
        step = self.resume.state.step if self.resume else 0
        resumes = [*self.facts.get("resumes", []), {"step": step, "changed": dict(changed)}]
        self.note(resumes=resumes)

    def write(self, name: str, content: str | bytes) -> None:
        """Write one file of the folder, beside its place and renamed."""
        if self.is_main:
            data = content.encode() if isinstance(content, str) else content
            publish_file(self.path / name, data, replace=True)


@contextmanager
def opened(path: Path, mode: Mode, runtime: Runtime) -> Iterator[RunFolder]:
    """Lock a run's folder and make it ready; `status` in `run.json` follows what happens.

    Raises:
        BadInput: when the folder holds something this mode must not touch, or nothing to resume.
        RunFailed: when another run holds it, or it has checkpoints and none is good.
    """
    if not runtime.is_main:
        runtime.wait()
        yield _found(path, mode, runtime)
        return
    check_free(path, mode)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if mode == "overwrite":
            for entry in path.iterdir():
                if entry.name != ".lock":
                    remove_folder(entry) if entry.is_dir() else entry.unlink()
        folder = _found(path, mode, runtime)
        runtime.wait()
        begun = folder.facts.get("id") or f"{path.name}-{_now()}"
        folder.note(status="running", id=begun, started=_now())
        try:
            yield folder
        except BaseException as error:
            stopped = isinstance(error, LorakitError) and error.exit_code == 75
            folder.note(status="interrupted" if stopped else "failed", ended_by=str(error))
            raise
        folder.note(status="finished")


def _found(path: Path, mode: Mode, runtime: Runtime) -> RunFolder:
    """Find what a resume goes on from."""
    if mode not in ("resume", "resume-or-start"):
        return RunFolder(path, runtime.is_main, {})
    found, notices = checkpoint.newest(path / "checkpoints")
    if found is None and mode == "resume":
        raise BadInput(
            "checkpoint.none",
            "--resume finds no checkpoint here",
            where=str(path),
            help="run without --resume, or with --resume-or-start",
        )
    facts = strict_json.read(path / "run.json", "checkpoint") if found else {}
    return RunFolder(path, runtime.is_main, facts, found, tuple(notices))


def check_free(path: Path, mode: Mode) -> None:
    """Check that a run may use the folder, before anything is written.

    Raises:
        BadInput: when it holds something that this mode must not touch.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise BadInput(
            "output.not-empty", "the run's folder is a file", where=str(path), help="use --out"
        )
    present = {entry.name for entry in path.iterdir()} - OURS
    if not present or mode in ("resume", "resume-or-start"):
        return
    if "run.json" not in present:
        raise BadInput(
            "output.not-empty",
            f"the folder holds files that are no run ({', '.join(sorted(present)[:3])})",
            where=str(path),
            help="choose another with --out",
        )
    if mode == "start":
        facts = strict_json.read(path / "run.json", "checkpoint")
        raise BadInput(
            "output.not-empty",
            f"the folder holds a run that is {facts.get('status')} since {facts.get('updated')}",
            where=str(path),
            help="--resume goes on with it, --overwrite removes it, --out takes another folder",
        )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
