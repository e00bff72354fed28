"""`make faults`: every trial in full, to be gone on with after a stop, and the table of it all."""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from tests.conftest import pytest_configure

pytest_configure()  # before torch is imported, which reads the environment

from lorakit.storage.disk import append_line  # noqa: E402
from tests.faults import results  # noqa: E402
from tests.faults.subject import Subject  # noqa: E402
from tests.faults.trials import Missing, Trial, all_trials  # noqa: E402
from tests.faults.workers import Result, carry_out, tried  # noqa: E402

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table -->\n", "<!-- end -->\n"


def main() -> int:
    """Run the cases that have not been run on this commit; return 1 when one has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID", help="of trials; else all")
    parser.add_argument("--quick", action="store_true", help="only the cases of the tests")
    parser.add_argument("--case", type=int, help="one case, whatever is known of it")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="side by side")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after them")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    options = parser.parse_args()
    trials = [one for one in all_trials() if not options.ids or one.id in options.ids]
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(prefix="faults-", dir=memory if memory.is_dir() else None))
    try:
        if not options.table:
            subject = Subject.at(place / "subject")
            if options.case is not None:
                found = [tried(trial, subject, options.case, place) for trial in trials]
                said = (result.failure or result.missing or "nothing" for result in found)
                sys.stdout.writelines(f"{line}\n" for line in said)
                return int(any(result.failure or result.missing for result in found))
            _run(trials, subject, place, options)
        table = results.table(trials)
        sys.stdout.write(table)
        if len(trials) == len(all_trials()) and not options.quick:
            text = README.read_text()
            README.write_text(text[: text.index(BEGIN)] + BEGIN + table + text[text.index(END) :])
        failed = [] if options.table else results.failed(trials, results.commit())
        sys.stdout.writelines(f"{line}\n" for line in failed)
        return int(bool(failed))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _run(trials: list[Trial], subject: Subject, place: Path, options: argparse.Namespace) -> None:
    """Try the cases that are not known on this commit."""
    commit, everything = results.commit(), results.known()
    missing: list[tuple[Trial, int]] = []
    counts: dict[str, int] = {}
    for trial in trials:
        known = everything.get((trial.id, commit), results.Known()).failures
        try:
            counts[trial.id] = trial.count(subject)
            cases = trial.sample(subject) if options.quick else range(counts[trial.id])
        except Missing as reason:
            _say(f"{trial.id}  cannot run here: {reason}")
            continue
        missing += [(trial, case) for case in cases if case not in known]
        _say(f"{trial.id}  {len(cases)} cases, {len(known)} known")
    began, done = time.monotonic(), 0

    def note(result: Result) -> None:
        nonlocal done
        done += 1
        if result.missing:
            _say(f"{result.trial}  cannot run here: {result.missing}")
            return
        row = {"commit": commit, **asdict(result), "of": counts[result.trial]}
        append_line(results.PLACE, json.dumps(row))
        if result.failure:
            _say(f"{result.trial}  case {result.case} failed:\n{result.failure}")
        if done % 100 == 0:
            _say(f"{result.trial}  {done} cases here in {time.monotonic() - began:.0f} s")

    results.PLACE.parent.mkdir(exist_ok=True)
    seconds = 60 * options.minutes
    begun = carry_out(missing, subject, place, note, processes=options.processes, seconds=seconds)
    _say(f"{len(missing) - begun} cases left")


def _say(text: str) -> None:
    sys.stdout.write(f"{datetime.now(UTC):%H:%M:%S} {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
