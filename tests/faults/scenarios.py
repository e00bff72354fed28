"""What a fault interrupts: a start, two kinds of resume, a run done again, and merges."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from lorakit import adapters
from lorakit.data.cache import entries
from lorakit.export.merge import REPORT
from lorakit.storage.manifest import check_manifest
from lorakit.storage.publish import sweep
from lorakit.training import checkpoint, loop
from tests.faults.forked import run
from tests.faults.powerloss import Recording, record
from tests.faults.subject import Subject, copied, result, rows
from tests.faults.syscalls import Call, listed

SHARDS = "40KB"  # makes three files of the tiny model


@dataclass(frozen=True)
class Scenario:
    """What is there before, what is done, what must hold right after a fault, and at the end.

    Each takes the folder in which it happens. `done` runs the same command again.
    """

    name: str
    prepare: Callable[[Path], object]
    action: Callable[[Path], Callable[[], int]]
    intact: Callable[[Path], None]
    done: Callable[[Path], None]
    least_step: int = 0

    def calls(self, subject: Subject) -> list[Call]:
        """Return the changes that it makes to the disk without a fault."""
        return _listed(self, subject)

    def recording(self, subject: Subject) -> Recording:
        """Return those changes with the bytes that were written."""
        return _recorded(self, subject)


@cache
def scenarios(subject: Subject) -> list[Scenario]:
    """Return all scenarios."""

    def train(folder: Path) -> Callable[[], int]:
        return subject.train(folder / "run", merge=True)

    def intact(folder: Path) -> None:
        out = folder / "run"
        for name in ("adapter", "merged"):
            if (out / name).exists():
                assert whole(out / name), f"half of {name}"
                found = result(out)
                assert all(subject.wanted[key] == found[key] for key in found)

    def done(folder: Path) -> None:
        subject.finish(folder / "run", merge=True)

    def merged(*more: str) -> Callable[[Path], Callable[[], int]]:
        arguments = ("merge", str(subject.whole / "adapter"), "--max-shard-size", SHARDS, *more)
        return lambda folder: (
            lambda: subject.lorakit(*arguments, "--out", str(folder / "merged"), "--no-verify")
        )

    def old_or_new(folder: Path) -> None:
        if (folder / "merged").exists():
            assert whole(folder / "merged"), "half of a merge"

    def merged_at_last(folder: Path) -> None:
        # What stands there is believed only when it is whole; --overwrite replaces it.
        ended = run(merged("--overwrite")(folder))
        assert ended.code == 0, ended
        assert whole(folder / "merged")
        assert [path.name for path in folder.iterdir()] == ["merged"]

    def merge_before(folder: Path) -> None:
        assert run(merged("--scale", "0.5")(folder)).code == 0

    def tokenised(folder: Path) -> Callable[[], int]:
        def action() -> int:
            os.environ["LORAKIT_CACHE"] = str(folder / "cache")
            return subject.lorakit("plan", "recipe.yaml")

        return action

    def believed(folder: Path) -> None:
        for entry in entries(folder / "cache"):
            assert check_manifest(entry) is None, "half of an entry"

    def kept(folder: Path) -> None:
        ended = run(tokenised(folder))
        assert ended.code == 0, ended
        assert len(entries(folder / "cache")) == 1
        believed(folder)

    return [
        Scenario("start", lambda _: None, train, intact, done),
        Scenario("newest damaged", lambda f: newest_damaged(subject, f), train, intact, done, 1),
        Scenario("saved again", lambda f: evaluation_owed(subject, f), train, intact, done, 3),
        Scenario("finished", lambda f: copied(subject.whole, f / "run"), train, intact, done, 4),
        Scenario("merge", lambda _: None, merged(), old_or_new, merged_at_last),
        Scenario("merge over", merge_before, merged("--overwrite"), old_or_new, merged_at_last),
        Scenario("tokens", lambda _: None, tokenised, believed, kept),
    ]


@cache
def rows_gone(subject: Subject) -> Scenario:
    """Return a resume that finds no `metrics.jsonl` and makes a new one, for power loss.

    A checkpoint is never ahead of the rows, and the folder's entry of their file is no exception.
    """
    often = ("--resume-or-start", "--set", "train.save_every=1")

    def prepare(folder: Path) -> None:
        out = copied(_saved_often(subject), folder / "run")
        for step in (3, 4):
            shutil.rmtree(out / "checkpoints" / f"step-00000{step}")
        (out / "metrics.jsonl").unlink()

    def intact(folder: Path) -> None:
        found, _ = checkpoint.newest(folder / "run" / "checkpoints")
        if found and found.state.step > 2:
            there = (folder / "run" / "metrics.jsonl").exists()
            steps = [row["step"] for row in rows(folder / "run") if "loss" in row] if there else []
            assert steps[:1] == [3], f"step {found.state.step} is saved, rows are of {steps}"

    def done(folder: Path) -> None:
        ended = run(subject.train(folder / "run", *often))
        assert ended.code == 0, ended
        assert result(folder / "run").items() <= subject.wanted.items()

    def train(folder: Path) -> Callable[[], int]:
        return subject.train(folder / "run", *often)

    return Scenario("rows gone", prepare, train, intact, done, 2)


def newest_damaged(subject: Subject, folder: Path) -> None:
    """Make a run whose last two checkpoints lost a bit: it goes on from the first.

    They are as many as are kept: were they counted, the first save would leave none that is good.
    """
    out = copied(_saved_often(subject), folder / "run")
    shutil.rmtree(out / "checkpoints" / "step-000002")
    for step in (3, 4):
        path = out / "checkpoints" / f"step-00000{step}" / "optimizer.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


@cache
def _saved_often(subject: Subject) -> Path:
    """Return a run that kept a checkpoint of each step."""
    out = subject.own("often")
    often = ("--set", "train.save_every=1", "--set", "train.keep_checkpoints=4")
    ended = run(subject.train(out, "--resume-or-start", *often))
    assert ended.code == 0, ended
    return out


def evaluation_owed(subject: Subject, folder: Path) -> None:
    """Make a run that was stopped in an evaluation: the step is saved again after it."""

    def action() -> int:
        loop.score = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or []
        return subject.train(folder / "run")()

    ended = run(action)
    assert ended.code == 75, ended


def whole(folder: Path) -> bool:
    """Tell whether an adapter, or a merge, is complete by its own digests."""
    if folder.name == "adapter":
        adapters.read(folder)
        return True
    report = json.loads((folder / REPORT).read_text())
    return all(
        sha256((folder / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
        for shard in report["shards"]
    )


def resumable(folder: Path, least: int, written: dict[int, set[bytes]]) -> None:
    """Check that what a resume would find is good, and no older than step `least`."""
    checkpoints = folder / "run" / "checkpoints"
    if checkpoints.is_dir():
        sweep(checkpoints)
    found, _ = checkpoint.newest(checkpoints)
    for path in checkpoints.glob("step-*"):  # half a deletion never looks like a checkpoint
        reason = check_manifest(path)
        assert reason in (None, "checksum optimizer.safetensors"), f"{path.name}: {reason}"
    step = found.state.step if found else 0
    assert step >= least, f"step {step} is found, {least} was saved"
    if found:
        content = (found.folder / "optimizer.safetensors").read_bytes()
        assert content in written[step], f"step {step} is not what the run saved"


@cache
def _listed(scenario: Scenario, subject: Subject) -> list[Call]:
    place = _place(scenario, subject, "listed")
    return listed(scenario.action(place), place, place.with_suffix(".trace"))


@cache
def _recorded(scenario: Scenario, subject: Subject) -> Recording:
    place = _place(scenario, subject, "recorded")
    return record(scenario.action(place), place, place.with_suffix(".before"))


def _place(scenario: Scenario, subject: Subject, use: str) -> Path:
    subject.whole  # noqa: B018  # made first: it warms this process up
    place = subject.own(use) / scenario.name.replace(" ", "-")
    place.mkdir(parents=True)
    scenario.prepare(place)
    return place
