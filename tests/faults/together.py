"""More than one process: two of one run, of which one dies or hangs, and two runs of one folder."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lorakit import runtime
from lorakit.storage.lock import locked
from lorakit.training import checkpoint, loop
from tests.faults.forked import Child, Ended, run
from tests.faults.kills import duration
from tests.faults.numbers_ import spoil
from tests.faults.scenarios import whole
from tests.faults.subject import Subject, copied, result, tree
from tests.faults.trials import Trial, chance

PATIENCE = 3  # seconds that one process waits for the other


def started(
    subject: Subject, out: Path, *more: str, before: Callable[[int], None] = lambda _: None
) -> list[Child]:
    """Start a run in two processes, as the launcher does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank(number: int) -> Callable[[], int]:
        def action() -> int:
            places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in places.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            runtime.PATIENCE = timedelta(seconds=PATIENCE)
            before(number)
            words = ("train", "recipe.yaml", "--out", str(out), "--resume-or-start", *more)
            return subject.lorakit(*words)

        return action

    return [Child(rank(number)) for number in range(2)]


@cache
def both(subject: Subject) -> tuple[dict[str, str], float]:
    """Return what two undisturbed processes leave behind, and how long they take."""
    began = time.monotonic()
    out = subject.own("both")
    for child in started(subject, out):
        ended = child.ended()
        assert ended.code == 0, ended
    return result(out), time.monotonic() - began


def one_killed(subject: Subject, case: int, folder: Path) -> None:
    rng = chance("f1", case)
    wanted, longest = both(subject)
    out = folder / "run"
    children = started(subject, out)
    victim = case % 2
    time.sleep(rng.uniform(0, longest))
    children[victim].send(signal.SIGKILL)
    began = time.monotonic()
    other = children[1 - victim].ended(30)
    assert children[victim].ended().code in (-signal.SIGKILL, 0)
    assert time.monotonic() - began < 30
    check_survivor(other)
    finish_both(subject, out, wanted)


def one_hangs(subject: Subject, case: int, folder: Path) -> None:
    rng = chance("f2", case)
    wanted, longest = both(subject)
    out = folder / "run"
    children = started(subject, out)
    victim = case % 2
    time.sleep(rng.uniform(0.3, 0.9) * longest)
    children[victim].send(signal.SIGSTOP)
    other = children[1 - victim].ended(30)
    check_survivor(other)
    children[victim].send(signal.SIGKILL)
    children[victim].send(signal.SIGCONT)
    children[victim].ended()
    finish_both(subject, out, wanted)


def check_survivor(other: Ended) -> None:
    """Check that the other process ended well or said whom it lost."""
    assert other.code in (0, 3), other
    assert other.code == 0 or "error[run.worker-died]: process" in other.said, other


def finish_both(subject: Subject, out: Path, wanted: dict[str, str]) -> None:
    """Go on in two processes; the end is that of two undisturbed ones."""
    if out.exists():
        checkpoint.newest(out / "checkpoints")
    for child in started(subject, out):
        ended = child.ended()
        assert ended.code == 0, ended
    assert result(out) == wanted


def one_not_finite(subject: Subject, case: int, folder: Path) -> None:
    rng = chance("e2", case)
    step = rng.randint(1, 4)
    out = folder / "run"

    def before(number: int) -> None:
        if number == case % 2:
            spoil("loss", float("nan"), step, rng)

    ends = [child.ended(60) for child in started(subject, out, before=before)]
    for ended in ends:
        assert ended.code == 3, ended
        assert f"run.not-finite]: step {step}:" in ended.said, ended


def one_in_haste(subject: Subject, case: int, folder: Path) -> None:
    """Send SIGTERM to one of two processes in a micro-batch, with no time left: both drop it."""
    rng = chance("c4", case)
    wanted, _ = both(subject)
    out, real, chosen = folder / "run", loop.token_loss, rng.randrange(4)
    number = 0

    def token_loss(*arguments: Any) -> torch.Tensor:
        nonlocal number
        number += 1
        if number == chosen + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    def before(process: int) -> None:
        if process == case % 2:
            loop.token_loss = token_loss

    ends = [child.ended() for child in started(subject, out, "--grace", "0", before=before)]
    found, _ = checkpoint.newest(out / "checkpoints")
    assert found
    for ended in ends:
        assert ended.code == 75, ended
        assert f"after step {found.state.step}" in ended.said, ended
    finish_both(subject, out, wanted)


def two_runs(subject: Subject, case: int, folder: Path) -> None:
    rng = chance("g1", case)
    out = folder / "run"
    first = Child(subject.train(out))
    time.sleep(rng.uniform(0, duration(subject, merge=False)))
    second = Child(subject.train(out)).ended()
    one = first.ended()
    # Who comes after the other has ended finds nothing left to do.
    assert {one.code, second.code} <= {0, 3}, f"{one} | {second}"
    assert 0 in (one.code, second.code), f"{one} | {second}"
    for ended in (one, second):
        assert ended.code == 0 or "error[run.locked]: another run holds" in ended.said, ended
    subject.check(out)


def run_and_merge(subject: Subject, case: int, folder: Path) -> None:
    """Merge a run's adapter while the run goes on, in every third case to where the run merges.

    A merge is whole or is not there; who comes second to the same place may be refused.
    """
    rng = chance("g3", case)
    out, merged = folder / "run", folder / "merged"
    if case % 3:  # the adapter is there, and the run has nothing left to do but merge
        copied(subject.whole, out)
    if case % 3 == 2:
        merged = out / "merged"
        shutil.rmtree(merged)
    first = Child(subject.train(out, merge=True))
    time.sleep(rng.uniform(0, 1.2 * duration(subject, merge=True)))
    words = ("merge", str(out / "adapter"), "--out", str(merged), "--no-verify")
    second = Child(lambda: subject.lorakit(*words)).ended()
    one = first.ended()
    assert 0 in (one.code, second.code), f"{one} | {second}"
    assert one.code == 0 or merged.parent == out, one
    for ended in (one, second):
        refusals = ("error[adapter.not-found]", "error[output.not-empty]")
        assert ended.code == 0 or any(text in ended.said for text in refusals), ended
    assert second.code == 0 or merged.parent == out or not merged.exists(), second
    if merged.exists():
        assert whole(merged)
        found = result(merged.parent)
        assert {found[key] for key in found if "merged" in key} == {
            subject.wanted[key] for key in subject.wanted if "merged" in key
        }
    subject.finish(out, merge=True)


def refused_by_a_lock(subject: Subject, case: int, folder: Path) -> None:
    out = folder / "run"
    with locked(out) as sign:
        sign()
        before = tree(out)
        began = time.monotonic()
        ended = run(subject.train(out))
        took = time.monotonic() - began
        assert ended.code == 3, ended
        assert f"pid {os.getpid()} on {socket.gethostname()}" in ended.said, ended
        assert tree(out) == before
        assert took < 2 + duration(subject, merge=False), f"{took:.1f} s"


def holder_killed(subject: Subject, case: int, folder: Path) -> None:
    out = folder / "run"
    holder = Child(subject.train(out))
    time.sleep(chance("g2", case).uniform(0, duration(subject, merge=False)))
    holder.send(signal.SIGKILL)
    holder.ended()
    subject.finish(out)


def contended(subject: Subject, case: int, folder: Path) -> None:
    (two_runs, refused_by_a_lock, holder_killed, run_and_merge)[case // 30](subject, case, folder)


TRIALS = [
    Trial("e2", "NaN in one of two processes", 12, 1, one_not_finite),
    Trial("c4", "SIGTERM and no time left in one of two processes", 12, 2, one_in_haste),
    Trial("f1", "SIGKILL of one of two processes", 30, 1, one_killed),
    Trial("f2", "SIGSTOP of one of two processes", 10, 1, one_hangs),
    Trial(
        "g1",
        "two runs of one folder; a live and a dead holder of the lock; a run and a merge of it",
        120,
        4,
        contended,
    ),
]
