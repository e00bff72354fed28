"""The disk refuses: full, broken, too small a file, no more files, read only, somebody else's."""

import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from lorakit.storage.manifest import check_manifest
from lorakit.storage.publish import is_aside
from tests.faults import syscalls
from tests.faults.forked import Ended, run
from tests.faults.kills import after_moves, every_call
from tests.faults.scenarios import Scenario
from tests.faults.subject import Subject, copied, tree
from tests.faults.syscalls import Call
from tests.faults.trials import Missing, Trial

FULL = ("ENOSPC", "EDQUOT")  # alike, so each call gets one of them
REFUSED = re.compile(
    r"open(at)?|mkdir(at)?|writev?|pwrite64|pwritev|copy_file_range|sendfile|f(data)?sync|rename\w*"
)
NOBODY = 65534


@cache
def every_write(subject: Subject) -> list[tuple[Scenario, Call, str]]:
    """Return each call that a disk may refuse, with each of the errors it may give."""
    calls = [(one, call) for one, call in every_call(subject) if REFUSED.fullmatch(call.name)]
    return [
        (scenario, call, error)
        for number, (scenario, call) in enumerate(calls)
        for error in (FULL[number % 2], "EIO", "EFBIG")
    ]


@cache
def refused_moves(subject: Subject) -> list[int]:
    """Return the cases of `refused` in which something has just been moved aside."""
    calls = every_call(subject)
    moved = {(calls[number][0].name, calls[number][1]) for number in after_moves(subject)}
    writes = enumerate(every_write(subject))
    return [case for case, (scenario, call, _) in writes if (scenario.name, call) in moved]


def not_moved(subject: Subject, case: int, folder: Path) -> None:
    refused(subject, refused_moves(subject)[case], folder)


def refused(subject: Subject, case: int, folder: Path) -> None:
    scenario, call, error = every_write(subject)[case]
    scenario.prepare(folder)
    before = good_steps(folder)
    ended, failed = syscalls.refused_at(call, scenario.action(folder), error)
    refusal(ended, f"{scenario.name}, {call}, {error}")
    scenario.intact(folder)
    # A step that was good is lost to pruning alone, which comes after a newer one was read again.
    assert ended.code == 0 or max(good_steps(folder), default=0) >= max(before, default=0)
    # What cannot be moved back or deleted now is swept another time.
    if not failed.startswith(("rename", "unlink")) and "/.trash-" not in failed:
        left = [path.name for path in folder.rglob(".*") if is_aside(path.name)]
        assert not left, f"{failed}, {error}: left behind: {left}"
    scenario.done(folder)


def refusal(ended: Ended, what: str) -> None:
    """Check that a refusing disk ended a command in one plain message, or harmed nothing."""
    assert ended.code in (0, 3), f"{what}: {ended}"
    assert "Traceback" not in ended.said, f"{what}: {ended}"
    assert ended.code == 0 or "error[storage." in ended.said, f"{what}: {ended}"


def good_steps(folder: Path) -> set[int]:
    """Return the steps whose checkpoint is whole."""
    found = folder.glob("run/checkpoints/step-*")
    return {int(path.name[5:]) for path in found if check_manifest(path) is None}


@contextmanager
def small_disk(options: str) -> Iterator[Path]:
    """Mount a small file system."""
    place = Path(tempfile.mkdtemp(prefix="disk-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        place.rmdir()
        raise Missing("a file system may not be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


def full(subject: Subject, case: int, folder: Path) -> None:
    size = 40 + 8 * case  # KiB: from a fraction of a checkpoint to more than the run needs
    fills_up(subject, f"size={size}k", folder)


def no_more_files(subject: Subject, case: int, folder: Path) -> None:
    fills_up(subject, f"size=64m,nr_inodes={4 + 4 * case}", folder)


def fills_up(subject: Subject, options: str, folder: Path) -> None:
    """Run on a small disk; what it says when it is full is enough to go on elsewhere."""
    with small_disk(options) as disk:
        ended = run(subject.train(disk / "run", merge=True))
        refusal(ended, options)
        steps = good_steps(disk)
        if ended.code:
            assert "available" in ended.said, ended
            assert str(disk) in ended.said, ended
        assert not [path for path in disk.rglob(".*") if is_aside(path.name)]
        if (disk / "run").exists():
            copied(disk / "run", folder / "run")
    if ended.code and steps:
        assert re.search(rf"step {max(steps)} is saved|adapter|merged", ended.said), ended
    subject.finish(folder / "run", merge=True)


def small_files(subject: Subject, case: int, folder: Path) -> None:
    limit = 4096 + 256 * case  # what the child prints is a file as well

    def action() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return subject.train(folder / "run", merge=True)()

    ended = run(action)
    refusal(ended, f"files of at most {limit} bytes")
    subject.finish(folder / "run", merge=True)


def of_somebody_else(subject: Subject, case: int, folder: Path) -> None:
    """Run as another account in a folder that it may read and not write."""
    if os.geteuid():
        raise Missing("only root can become somebody else")
    kind = case % 6
    out = folder / "run"
    for path in (folder, *folder.parents[:-2]):
        path.chmod(path.stat().st_mode | 0o055)
    if kind in (1, 5):
        copied(subject.whole, out)
        if kind == 1:
            facts = json.loads((out / "run.json").read_text())
            (out / "run.json").write_text(json.dumps(facts | {"status": "interrupted"}))
    elif kind == 2:
        out.mkdir()
        out.chmod(0o555)
    elif kind == 3:
        copied(subject.whole, out)
        given(out)
        for path in (out / "checkpoints", *out.glob("checkpoints/**/")):
            os.chown(path, 0, 0)
        shutil.rmtree(out / "adapter")
        corrupt = out / "checkpoints" / "step-000004" / "state.json"
        corrupt.write_text("{}")
    elif kind == 4:
        folder.chmod(0o555)
        os.chown(folder, NOBODY, NOBODY)
    before = tree(folder)
    ended = run(as_nobody(subject.train(out)))
    if kind == 5:  # it has nothing to write: the run is finished
        assert ended.code == 0, ended
        assert "already finished" in ended.said, ended
        assert "warning[checkpoint.of-another]" in ended.said, ended
    else:
        assert ended.code == 3, ended
        assert "error[storage.denied]" in ended.said, ended
    assert "step 1/" not in ended.said, f"a step was taken first: {ended}"
    if kind != 3:
        assert tree(folder) == before


def inputs_read_only(subject: Subject, case: int, folder: Path) -> None:
    """Run as another account that may not write beside the model and the rows."""
    if os.geteuid():
        raise Missing("only root can become somebody else")
    for path in (folder, *folder.parents[:-2]):
        path.chmod(path.stat().st_mode | 0o055)
    os.chown(folder, NOBODY, NOBODY)
    inputs = ("model", "rows.jsonl", "recipe.yaml")
    before = {name: tree(subject.folder / name) for name in inputs}
    ended = run(as_nobody(subject.train(folder / "run", merge=case % 2 == 0)))
    assert ended.code == 0, ended
    assert before == {name: tree(subject.folder / name) for name in inputs}
    subject.check(folder / "run", merge=case % 2 == 0)


def as_nobody(action: Callable[[], int]) -> Callable[[], int]:
    def become() -> int:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        return action()

    return become


def given(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)


TRIALS = [
    Trial("b1", "a full disk, of many sizes", 60, 2, full),
    Trial(
        "b2",
        "ENOSPC or EDQUOT, EIO and EFBIG at each open, write, copy, sync, rename",
        lambda subject: len(every_write(subject)),
        6,
        refused,
    ),
    Trial("b3", "EFBIG: a limit on the size of files", 25, 1, small_files),
    Trial("b4", "no more files on the disk", 12, 1, no_more_files),
    Trial(
        "b5",
        "the same where something was just moved aside, among those of b2",
        lambda subject: len(refused_moves(subject)),
        1,
        not_moved,
    ),
    Trial("h1", "folders that are read only or somebody else's", 20, 6, of_somebody_else),
    Trial("h2", "inputs that are read only and somebody else's", 10, 1, inputs_read_only),
]
