"""What is said of the trials' results: a new failure is never hidden by an older success."""

import json
from pathlib import Path

import pytest

from tests.faults import results
from tests.faults.subject import Subject
from tests.faults.trials import Trial


def nothing(subject: Subject, case: int, folder: Path) -> None:
    pass


TRIAL = Trial("a4", "power loss", 3, 1, nothing)


def test_a_new_failure_shows_beside_a_fuller_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("old", case, None) for case in range(3)] + [("new", 0, None), ("new", 1, "lost")]
    lines = [
        json.dumps({"trial": "a4", "commit": where, "case": case, "failure": failure, "of": 3})
        for where, case, failure in rows
    ]
    place = tmp_path / "faults.jsonl"
    place.write_text("\n".join(lines))
    monkeypatch.setattr(results, "PLACE", place)
    assert results.table([TRIAL]).endswith("| a4 | power loss | 3 | 0 | old |\n")
    assert results.failed([TRIAL], "new") == ["a4: 1 of 2 cases failed on new"]
    assert results.failed([TRIAL], "old") == []
