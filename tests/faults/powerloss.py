"""What a disk may hold after the power failed: states made from the trace of a real run.

A file's bytes are safe once it was synced after its last write, and an entry of a folder once that
folder was synced after the change. All else may or may not have come to the disk, in any order
(Pillai et al. 2014, "All File Systems Are Not Created Equal", section 2); a rename is one change.
"""

import itertools
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.syscalls import Call, listed

AT_THE_END = 0.1  # share of the states that lack nothing but what was not synced

Action = Callable[[], int | None]


@dataclass(frozen=True)
class Recording:
    """A folder as it was before an action, each change the action made, and the bytes it wrote.

    `written` holds the bytes of each file as it was renamed, alone or in a folder; `synced` the
    bytes at each sync of a file.
    """

    before: Path
    below: Path
    calls: list[Call]
    written: Mapping[str, bytes]
    synced: Mapping[str, list[bytes]]

    def state(self, rng: random.Random, target: Path) -> int:
        """Build in `target` one state that a failure may leave; return the changes before it."""
        everything = len(self.calls)
        length = everything if rng.random() < AT_THE_END else rng.randint(0, everything)
        often = rng.choice((0.1, 0.5, 0.9))
        shutil.copytree(self.before, target, symlinks=True)
        syncs: Counter[str] = Counter()
        lost: dict[Path, Path] = {}  # new names of what still has its old one
        made: set[str] = set()  # names that opening has made, which is done once
        for at, call in enumerate(self.calls[:length]):
            paths = [_by_old_name(Path(path), lost) for path in call.paths]
            here = [target / path.relative_to(self.below) for path in paths]
            if call.name == "fsync":
                self._settle(call.paths[0], syncs[call.paths[0]], here[0])
                syncs[call.paths[0]] += 1
                continue
            if call.name.startswith("open"):
                if call.paths[0] in made:
                    continue
                made.add(call.paths[0])
            elif not call.name.startswith(("write", "pwrite")):
                made -= set(call.paths)
            later = self.calls[at + 1 : length]
            if not _is_synced(paths[-1].parent, later) and rng.random() < often:
                if call.name.startswith("rename"):
                    lost[paths[1]] = paths[0]
                continue
            if call.name.startswith("open") and here[0].parent.is_dir() and not here[0].exists():
                here[0].write_bytes(self._unsynced(call.paths[0], rng))
            _change(call.name, here)
        return length

    def _settle(self, path: str, number: int, here: Path) -> None:
        """Give a file, where it is there, the bytes that it had when it was synced."""
        versions = self.synced.get(path, [])
        if here.is_file() and number < len(versions):
            here.write_bytes(versions[number])

    def _unsynced(self, path: str, rng: random.Random) -> bytes:
        """Return what a file may hold that was never synced."""
        whole = self.written.get(path) or next(iter(self.synced.get(path, [])), b"")
        kept = min(4096, len(whole) // 2)
        return rng.choice((b"", whole[:kept], bytes(len(whole)), whole))

    def said(self, length: int) -> Iterator[Path]:
        """Yield the files, by their place below the folder, that an ended action has renamed.

        None before it has ended. What has been written to since, or is gone, is left out.
        """
        if length < len(self.calls):
            return
        for call in self.calls:
            content = self.written.get(call.paths[0]) if call.name.startswith("rename") else None
            place = Path(call.paths[-1])
            if content is not None and place.is_file() and place.read_bytes() == content:
                yield place.relative_to(self.below)

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


def record(action: Action, below: Path, before: Path) -> Recording:
    """Carry out an action that works below a folder; note what it changes and what it writes."""
    shutil.copytree(below, before, symlinks=True)
    kept = before.with_name(f"{before.name}.bytes")
    for name in ("renamed", "synced"):
        (kept / name).mkdir(parents=True)
    calls = listed(lambda: _keeping(action, kept), below, kept / "trace")
    synced: dict[str, list[bytes]] = {}
    for path, content in _kept(kept / "synced"):
        synced.setdefault(path, []).append(content)
    return Recording(before, below, calls, dict(_kept(kept / "renamed")), synced)


def _keeping(action: Action, kept: Path) -> int | None:
    """Carry out an action; keep the bytes of each file as it is synced or renamed."""
    rename, fsync = os.rename, os.fsync
    numbers = itertools.count()

    def keep(path: Path, kind: str) -> None:
        number = next(numbers)
        shutil.copyfile(path, kept / kind / f"{number:06d}")
        (kept / kind / f"{number:06d}.path").write_text(str(path))

    def keeping_rename(source: Any, target: Any) -> None:
        source = Path(source)
        for path in [source] if source.is_file() else sorted(source.rglob("*")):
            if path.is_file():
                keep(path, "renamed")
        rename(source, target)

    def keeping_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_file():
            keep(path, "synced")
        fsync(descriptor)

    os.rename, os.fsync = keeping_rename, keeping_fsync
    return action()


def _kept(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.glob("*.path")):
        yield path.read_text(), path.with_suffix("").read_bytes()


def _by_old_name(path: Path, lost: Mapping[Path, Path]) -> Path:
    """Return where a file is whose folder, or that itself, was not renamed after all."""
    for new, old in lost.items():
        if path.is_relative_to(new):
            return old / path.relative_to(new)
    return path


def _is_synced(folder: Path, calls: list[Call]) -> bool:
    """Tell whether a folder is synced among these calls."""
    return any(call.name == "fsync" and call.paths[0] == str(folder) for call in calls)


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
