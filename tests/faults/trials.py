"""The faults, each with its count: a case is a number, and the same number is the same fault."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.faults.subject import Subject


class Missing(Exception):
    """This machine lacks what a trial needs."""


@dataclass(frozen=True)
class Trial:
    """A fault: what is done, how often in full and in the tests, and what must hold.

    `body` takes the subject, the number of the case and an empty folder. It raises whatever it
    likes when something does not hold, and `Missing` when it cannot be tried here.
    """

    id: str
    what: str
    full: int | Callable[[Subject], int]
    quick: int
    body: Callable[[Subject, int, Path], None]

    def count(self, subject: Subject) -> int:
        """Return how many cases there are."""
        return self.full if isinstance(self.full, int) else self.full(subject)

    def sample(self, subject: Subject) -> list[int]:
        """Return the few cases that the tests try: one somewhere in each of as many equal parts."""
        count = self.count(subject)
        quick = min(self.quick, count)
        bounds = [number * count // quick for number in range(quick + 1)] if quick else []
        return [chance(self.id, part).randrange(*part) for part in pairwise(bounds)]


def chance(trial: str, case: object) -> random.Random:
    """Return the random numbers of one case, or of anything else that has a name."""
    return random.Random(f"{trial} {case}")


def all_trials() -> list[Trial]:
    """Return every trial, in the order of the table."""
    from tests.faults import disk, fuzz, hostile, kills, mutants, numbers_, rotten, together

    modules = (kills, disk, rotten, numbers_, together, fuzz, hostile, mutants)
    return [trial for module in modules for trial in module.TRIALS]
