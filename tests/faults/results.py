"""What is known of the cases that were tried, by trial and commit, and the table of it."""

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.trials import Trial

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "runs" / "faults.jsonl"


@dataclass
class Known:
    """How the cases of a trial failed that were tried on one commit, and how many there are."""

    of: int = 0
    failures: dict[int, str | None] = field(default_factory=dict)

    @property
    def wrong(self) -> int:
        return sum(failure is not None for failure in self.failures.values())


def known() -> dict[tuple[str, str], Known]:
    """Return what is known, by trial and commit; the latest commit comes last."""
    found: dict[tuple[str, str], Known] = {}
    for line in filter(None, PLACE.read_text().splitlines() if PLACE.exists() else ()):
        row = json.loads(line)
        one = found.setdefault((row["trial"], row["commit"]), Known())
        one.of = row["of"]
        one.failures[row["case"]] = row["failure"]
    return found


def table(trials: list[Trial]) -> str:
    """Return a row for each trial, of the commit where most was tried."""
    lines = ["| | trial | cases | failures | commit |\n|---|---|---|---|---|\n"]
    found = known()
    for trial in trials:
        fullest, where = max(
            ((one, where) for (id, where), one in reversed(found.items()) if id == trial.id),
            key=lambda pair: len(pair[0].failures),
            default=(Known(), ""),
        )
        tried = len(fullest.failures)
        cases = f"{tried:,}" if tried == fullest.of else f"{tried:,} of {fullest.of:,}"
        lines.append(f"| {trial.id} | {trial.what} | {cases} | {fullest.wrong:,} | {where} |\n")
    return "".join(lines)


def failed(trials: list[Trial], where: str) -> list[str]:
    """Say of each trial that has failed on a commit how often; the table may show another one."""
    found = known()
    ones = ((trial.id, found.get((trial.id, where), Known())) for trial in trials)
    return [
        f"{id}: {one.wrong:,} of {len(one.failures):,} cases failed on {where}"
        for id, one in ones
        if one.wrong
    ]


def commit() -> str:
    """Return the commit that is tried, with a mark when files are not as in it."""
    said = [
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno"))
    ]
    return said[0] + ("+" if said[1] else "")
