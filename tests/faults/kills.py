"""The process ends: before a call, at any moment, by a signal, or with the whole machine."""

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

from lorakit.storage.publish import sweep
from lorakit.training import checkpoint
from tests.faults import syscalls
from tests.faults.forked import Child, Ended, run
from tests.faults.powerloss import Recording
from tests.faults.scenarios import Scenario, resumable, rows_gone, scenarios
from tests.faults.subject import STEPS, Subject, tree
from tests.faults.syscalls import Call
from tests.faults.trials import Missing, Trial, chance


@cache
def every_call(subject: Subject) -> list[tuple[Scenario, Call]]:
    """Return each change to the disk of each scenario."""
    if reason := syscalls.why_not():
        raise Missing(reason)
    return [(scenario, call) for scenario in scenarios(subject) for call in scenario.calls(subject)]


@cache
def after_moves(subject: Subject) -> list[int]:
    """Return the calls of `every_call` that come right after something was moved aside."""
    pairs = enumerate(pairwise(call for _, call in every_call(subject)), start=1)
    aside = re.compile(r"/\.(old|trash)-[^/]*$")
    return [
        number
        for number, (call, _) in pairs
        if call.name.startswith("rename") and aside.search(call.paths[-1])
    ]


def after_a_move(subject: Subject, case: int, folder: Path) -> None:
    scenario, call = every_call(subject)[after_moves(subject)[case]]
    here = killed(scenario, call, folder)
    for place in {path.parent for path in here.rglob(".old-*")}:
        old = place.glob(".old-*")
        aside = {path.name[len(".old-") :].rsplit("-", 2)[0]: tree(path) for path in old}
        there = {name for name in aside if (place / name).exists()}
        sweep(place)
        back = {name: tree(place / name) for name in aside if name not in there}
        assert back == {name: aside[name] for name in back}, f"{call}: not brought back"
    scenario.intact(here)
    scenario.done(here)


def before_a_call(subject: Subject, case: int, folder: Path) -> None:
    scenario, call = every_call(subject)[case]
    here = killed(scenario, call, folder)
    scenario.intact(here)
    scenario.done(here)


def killed(scenario: Scenario, call: Call, folder: Path) -> Path:
    """Carry out a scenario up to a call; return where."""
    # A run may open a source file or two less than the listed one: then its calls come earlier.
    for earlier in range(4):
        here = folder / str(earlier)
        here.mkdir()
        scenario.prepare(here)
        before = replace(call, number=call.number - earlier)
        ended = syscalls.killed_before(before, scenario.action(here))
        if ended.code != 0:
            break
    assert ended.code == -signal.SIGKILL, f"{scenario.name}, {call}: {ended}"
    return here


@cache
def duration(subject: Subject, *, merge: bool) -> float:
    """Return the seconds that a run takes."""
    began = time.monotonic()
    ended = run(subject.train(subject.own(f"timed-{merge}"), merge=merge))
    assert ended.code == 0, ended
    return time.monotonic() - began


class Disturbed:
    """A run to which something happens again and again; one in five merges as well."""

    def __init__(self, subject: Subject, trial: str, case: int, folder: Path) -> None:
        self.subject, self.out = subject, folder / "run"
        self.rng, self.merge = chance(trial, case), case % 5 == 0

    def hit(self, *signals: signal.Signals, pause: float = 0) -> Ended:
        """Run, and send signals at some moment."""
        longest = duration(self.subject, merge=self.merge)
        child = Child(self.subject.train(self.out, merge=self.merge))
        time.sleep(self.rng.uniform(0, longest))
        for number in signals:
            child.send(number)
            time.sleep(pause)
        return child.ended()

    def stop(self, number: signal.Signals) -> None:
        """Stop the run by a signal; the exit code says whether there is something to go on from."""
        ended = self.hit(number)
        found, _ = checkpoint.newest(self.out / "checkpoints")
        assert ended.code in (0, 75, -number), ended
        assert ended.code != 75 or found, f"75 without a checkpoint: {ended}"
        # Before it has begun the process hears no signal: Python itself is still starting.
        heard = bool(ended.said)
        # Once it has printed its result nothing is left to go on with.
        told = "Next " in ended.said
        assert ended.code != -number or told or not (found and heard), f"resumable, but: {ended}"

    def finish(self) -> None:
        """Go on to the end; nothing may tell the run from an uninterrupted one."""
        self.subject.finish(self.out, merge=self.merge)


def at_random(subject: Subject, case: int, folder: Path) -> None:
    disturbed = Disturbed(subject, "a3", case, folder)
    for _ in range(disturbed.rng.choices((1, 2, 5), (0.60, 0.25, 0.15))[0]):
        ended = disturbed.hit(signal.SIGKILL)
        assert ended.code in (0, -signal.SIGKILL), ended
    disturbed.finish()


def power_lost(subject: Subject, case: int, folder: Path) -> None:
    if reason := syscalls.why_not():
        raise Missing(reason)
    rng = chance("a4", case)
    scenario = rng.choice([*scenarios(subject), rows_gone(subject)])
    recording = scenario.recording(subject)
    state = folder / "state"
    length = recording.state(rng, state)
    saved = [
        n for n in range(STEPS + 1) if recording.returned(length, f"run/checkpoints/step-{n:06d}")
    ]
    resumable(state, max([scenario.least_step, *saved]), saved_bytes(recording))
    scenario.intact(state)
    for path in ("run/adapter", "run/merged", "merged"):
        if recording.returned(length, path):
            assert (state / path).is_dir(), f"{path} was published and is gone"
    for said in recording.said(length):
        same = (state / said).is_file() and (state / said).read_bytes() == (
            recording.below / said
        ).read_bytes()
        assert same, f"{said} was written before the command ended and is gone"
    if case % 31 == 0:
        scenario.done(state)


def saved_bytes(recording: Recording) -> dict[int, set[bytes]]:
    """Return what an undisturbed run writes as the optimizer's state, by step."""
    found: dict[int, set[bytes]] = {}
    for path, content in recording.written.items():
        if match := re.search(r"\.tmp-step-0*(\d+)-.*/optimizer.safetensors", path):
            found.setdefault(int(match[1]), set()).add(content)
    for path in recording.before.glob("run/checkpoints/step-*/optimizer.safetensors"):
        found.setdefault(int(path.parent.name[5:]), set()).add(path.read_bytes())
    return found


def stopped(subject: Subject, case: int, folder: Path) -> None:
    disturbed = Disturbed(subject, "c1", case, folder)
    disturbed.stop(disturbed.rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)))
    disturbed.finish()


def stopped_often(subject: Subject, case: int, folder: Path) -> None:
    disturbed = Disturbed(subject, "a5", case, folder)
    for _ in range(5):
        disturbed.stop(signal.SIGTERM)
    disturbed.finish()


def stopped_twice(subject: Subject, case: int, folder: Path) -> None:
    disturbed = Disturbed(subject, "c2", case, folder)
    number = disturbed.rng.choice((signal.SIGTERM, signal.SIGINT))
    ended = disturbed.hit(number, number, pause=0.01)
    finished = "Trained" in ended.said
    assert ended.code in (75, -number) or (ended.code == 0 and finished), ended
    assert "Traceback" not in ended.said, ended
    disturbed.finish()


def unsettled(subject: Subject, case: int, folder: Path) -> None:
    disturbed = Disturbed(subject, "c3", case, folder)
    if case % 3 == 0:
        ended = disturbed.hit(signal.SIGHUP)
        assert ended.code in (0, -signal.SIGHUP), ended
    elif case % 3 == 1:
        ended = disturbed.hit(signal.SIGSTOP, signal.SIGCONT, pause=0.05)
        assert ended.code == 0, ended
    else:
        ended = run(unheard(subject.train(disturbed.out, merge=disturbed.merge)))
        assert ended.code == 0, ended
    disturbed.finish()


def unheard(action: Callable[[], int]) -> Callable[[], int]:
    """Close the reading end of what stdout and stderr go to, as `| head` does."""

    def deaf() -> int:
        reading, writing = os.pipe()
        os.close(reading)
        for descriptor in (1, 2):
            os.dup2(writing, descriptor)
        return action()

    return deaf


TRIALS = [
    Trial(
        "a1",
        "SIGKILL before each change to the disk: first save, pruning, re-save, adapter, merge",
        lambda subject: len(every_call(subject)),
        8,
        before_a_call,
    ),
    Trial(
        "a2",
        "the same where something was just moved aside, among those of a1",
        lambda subject: len(after_moves(subject)),
        1,
        after_a_move,
    ),
    Trial("a3", "SIGKILL at random times, in resumes and in chains of five", 1000, 50, at_random),
    Trial("a4", "power loss: disk states made from recorded runs", 2000, 200, power_lost),
    Trial("a5", "five stops and resumes of one run", 50, 4, stopped_often),
    Trial("c1", "SIGTERM, SIGINT or SIGUSR1 at random times", 150, 4, stopped),
    Trial("c2", "a second signal after 10 ms", 50, 2, stopped_twice),
    Trial("c3", "SIGHUP; SIGSTOP and SIGCONT; nobody reads stdout and stderr", 30, 3, unsettled),
]
