"""Cases tried side by side: processes forked from one that has imported and planned it all."""

import math
import multiprocessing
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.subject import Subject
from tests.faults.trials import Missing, Trial

Cases = Sequence[tuple[Trial, int]]


@dataclass(frozen=True)
class Result:
    """What came of one case: how it failed, or why it cannot be tried on this machine."""

    trial: str
    case: int
    failure: str | None = None
    missing: str | None = None


def carry_out(
    cases: Cases,
    subject: Subject,
    place: Path,
    note: Callable[[Result], None],
    *,
    processes: int,
    seconds: float = math.inf,
) -> int:
    """Try cases, each process the next one that nobody has begun; return how many were tried.

    Args:
        cases: trials and the numbers of their cases.
        subject: what the faults happen to.
        place: a folder, in which each process makes its own.
        note: is called in these processes with each result.
        processes: how many work side by side.
        seconds: after which no more cases are begun.
    """
    deadline = time.monotonic() + seconds
    subject.whole  # noqa: B018  # made before the fork, as the plan is
    context = multiprocessing.get_context("fork")
    begun = context.Value("i", 0)

    def work(folder: Path) -> None:
        while time.monotonic() < deadline:
            with begun.get_lock():
                number, begun.value = begun.value, begun.value + 1
            if number >= len(cases):
                return
            trial, case = cases[number]
            note(tried(trial, subject, case, folder))

    workers = [
        context.Process(target=work, args=(place / f"worker-{number}",), daemon=True)
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for worker in workers:
            worker.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not any(worker.exitcode for worker in workers), "a worker came to an end of its own"
    return min(begun.value, len(cases))


def tried(trial: Trial, subject: Subject, case: int, place: Path) -> Result:
    """Try one case in a new folder below `place`."""
    place.mkdir(parents=True, exist_ok=True)
    # Of its own name: what a killed case has left running may still write into the last one.
    folder = Path(tempfile.mkdtemp(prefix="case-", dir=place))
    try:
        trial.body(subject, case, folder)
    except Missing as reason:
        return Result(trial.id, case, missing=str(reason))
    except Exception as error:
        return Result(trial.id, case, "".join(traceback.format_exception(error))[-3000:])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Result(trial.id, case)
