"""What a disk may hold after the power failed: states made from the trace of a real run.

A file's bytes are safe once it was synced after its last write, and an entry of a folder once that
folder was synced after the change. All else may or may not have come to the disk, in any order
(Pillai et al. 2014, "All File Systems Are Not Created Equal", section 2); a rename is one change.
"""

import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.syscalls import Call, listed

Action = Callable[[], int | None]


@dataclass(frozen=True)
class Recording:
    """A folder as it was before an action, each change the action made, and the bytes it wrote."""

    before: Path
    below: Path
    calls: list[Call]
    contents: Mapping[str, bytes]

    def state(self, rng: random.Random, target: Path) -> int:
        """Build in `target` one state that a failure may leave; return the changes before it."""
        length = rng.randint(0, len(self.calls))
        often = rng.choice((0.1, 0.5, 0.9))
        shutil.copytree(self.before, target, symlinks=True)
        made: dict[str, bool] = {}
        for at, call in enumerate(self.calls[:length]):
            later = self.calls[at + 1 : length]
            paths = [Path(path) for path in call.paths]
            lost = not _synced(paths[-1].parent, later) and rng.random() < often
            here = [target / path.relative_to(self.below) for path in paths]
            if call.name.startswith("open") and call.paths[0] not in made:
                made[call.paths[0]] = True
                if not lost and here[0].parent.is_dir():
                    here[0].write_bytes(self._bytes(paths[0], here[0], later, rng))
            elif not lost:
                _change(call.name, here)
        return length

    def returned(self, length: int, name: str) -> bool:
        """Tell whether what stands at `name` was published for good before so many changes."""
        place = str(self.below / name)
        put = synced = False
        for call in self.calls[:length]:
            if call.name.startswith("rename"):
                if call.paths[-1] == place:
                    put, synced = True, False
                elif call.paths[0] == place:
                    put = False
            elif call.name == "fsync" and call.paths[0] == os.path.dirname(place):
                synced = True
        return put and synced

    def _bytes(self, path: Path, here: Path, later: list[Call], rng: random.Random) -> bytes:
        """Return what a file holds: its bytes where they were synced, else what chance leaves."""
        whole = self.contents.get(str(path), b"")
        if _synced(path, later):
            return whole
        kept = min(4096, len(whole) // 2)
        return rng.choice((b"", whole[:kept], bytes(len(whole)), whole))


def record(action: Action, below: Path, before: Path) -> Recording:
    """Carry out an action that works below a folder; note what it changes and what it writes."""
    shutil.copytree(below, before, symlinks=True)
    kept = before.with_name(f"{before.name}.bytes")
    kept.mkdir()
    calls = listed(lambda: _keeping(action, kept), below, kept / "trace")
    contents = {
        (kept / f"{number}.path").read_text(): (kept / f"{number}").read_bytes()
        for number in range(len(list(kept.glob("*.path"))))
    }
    return Recording(before, below, calls, contents)


def _keeping(action: Action, kept: Path) -> int | None:
    """Carry out an action; keep the bytes of each file as it is renamed, alone or in a folder."""
    real = os.rename
    count = 0

    def rename(source: Any, target: Any) -> None:
        nonlocal count
        source = Path(source)
        for path in [source] if source.is_file() else sorted(source.rglob("*")):
            if path.is_file():
                shutil.copyfile(path, kept / str(count))
                (kept / f"{count}.path").write_text(str(path))
                count += 1
        real(source, target)

    os.rename = rename
    return action()


def _synced(path: Path, calls: list[Call]) -> bool:
    """Tell whether a file or folder is synced among these calls, after the last write to it."""
    for call in reversed(calls):
        if call.paths[0] == str(path):
            if call.name in ("fsync", "fdatasync"):
                return True
            if "write" in call.name or call.name == "ftruncate":
                return False
    return False


def _change(name: str, here: list[Path]) -> None:
    """Make one change of the trace where what it is about is there."""
    first, last = here[0], here[-1]
    if name.startswith("mkdir") and first.parent.is_dir():
        first.mkdir(exist_ok=True)
    elif name.startswith("rename") and first.exists() and last.parent.is_dir():
        if not (last.is_dir() and any(last.iterdir())):
            os.rename(first, last)
    elif name.startswith("unlink") and first.is_file():
        first.unlink()
    elif name in ("unlinkat", "rmdir") and first.is_dir() and not any(first.iterdir()):
        first.rmdir()
