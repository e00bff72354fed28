"""`make faults`: every trial in full, to be gone on with after a stop, and the table of it all."""

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from tests.conftest import pytest_configure

pytest_configure()  # before torch is imported, which reads the environment

from lorakit.storage.disk import append_line  # noqa: E402
from tests.faults.subject import Subject  # noqa: E402
from tests.faults.trials import Missing, Trial, all_trials  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "runs" / "faults.jsonl"
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table -->\n", "<!-- end -->\n"


def main() -> int:
    """Run the cases that have not been run on this code; return 1 when one has ever failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID", help="of trials; else all")
    parser.add_argument("--quick", action="store_true", help="only the cases of the tests")
    parser.add_argument("--case", type=int, help="one case, whatever is known of it")
    options = parser.parse_args()
    trials = [one for one in all_trials() if not options.ids or one.id in options.ids]
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(prefix="faults-", dir=memory if memory.is_dir() else None))
    try:
        subject = Subject.at(place / "subject")
        if options.case is not None:
            return int(any(_failure(trial, subject, options.case, place) for trial in trials))
        return run(trials, subject, place, quick=options.quick)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def run(trials: list[Trial], subject: Subject, place: Path, *, quick: bool) -> int:
    """Run the trials, each case once; write the table where all of them ran in full."""
    RESULTS.parent.mkdir(exist_ok=True)
    code = _digest_of_code()
    known = _known(code)
    counts = {}
    for trial in trials:
        counts[trial.id] = _run(trial, subject, place, known.setdefault(trial.id, {}), code, quick)
    lines = [_row(trial, counts[trial.id], known[trial.id]) for trial in trials]
    table = "| | trial | cases | failures |\n|---|---|---|---|\n" + "".join(lines)
    sys.stdout.write(table)
    if len(trials) == len(all_trials()) and not quick:
        _write_table(table)
    return int(any(failure for found in known.values() for failure in found.values()))


def _run(
    trial: Trial,
    subject: Subject,
    place: Path,
    known: dict[int, str | None],
    code: str,
    quick: bool,
) -> int | str:
    """Run what is not known of a trial; return how many cases it has, or why it cannot run."""
    try:
        cases = trial.sample(subject) if quick else list(range(trial.count(subject)))
        missing = [case for case in cases if case not in known]
        began = time.monotonic()
        for done, case in enumerate(missing, 1):
            known[case] = _failure(trial, subject, case, place)
            row = {"code": code, "trial": trial.id, "case": case, "failure": known[case]}
            append_line(RESULTS, json.dumps(row))
            if done % 20 == 0 or done == len(missing):
                failed = sum(failure is not None for failure in known.values())
                left = (time.monotonic() - began) / done * (len(missing) - done)
                _say(f"{trial.id}  {done}/{len(missing)}  {failed} failed  {left:.0f} s left")
    except Missing as reason:
        return str(reason)
    return len(cases)


def _failure(trial: Trial, subject: Subject, case: int, place: Path) -> str | None:
    """Try one case; return how it failed."""
    folder = place / "case"
    folder.mkdir()
    try:
        trial.body(subject, case, folder)
    except Missing:
        raise
    except Exception as error:
        text = "".join(traceback.format_exception(error))[-3000:]
        _say(f"{trial.id} case {case} failed:\n{text}")
        return text
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _known(code: str) -> dict[str, dict[int, str | None]]:
    """Return what is known of the cases on this code."""
    known: dict[str, dict[int, str | None]] = {}
    if RESULTS.exists():
        for line in RESULTS.read_text().splitlines():
            row = json.loads(line)
            if row["code"] == code:
                known.setdefault(row["trial"], {})[row["case"]] = row["failure"]
    return known


def _row(trial: Trial, count: int | str, known: dict[int, str | None]) -> str:
    if isinstance(count, str):
        return f"| {trial.id} | {trial.what} | not run: {count} | |\n"
    failed = sum(failure is not None for failure in known.values())
    return f"| {trial.id} | {trial.what} | {count:,} | {failed:,} |\n"


def _write_table(table: str) -> None:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    stamp = f"\nOn {datetime.now(UTC):%Y-%m-%d}, code {_digest_of_code()[:12]}.\n"
    README.write_text(before + BEGIN + table + stamp + END + after)


def _digest_of_code() -> str:
    """Return a digest of what is tried and of what tries it."""
    files = [*ROOT.glob("lorakit/**/*.py"), *ROOT.glob("tests/faults/*.py")]
    return sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def _say(text: str) -> None:
    sys.stdout.write(f"{datetime.now(UTC):%H:%M:%S} {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
