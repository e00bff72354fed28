"""A mutant is noticed by what fails, and by nothing else."""

from pathlib import Path

import pytest

from tests.faults import mutants
from tests.faults.subject import Subject
from tests.faults.trials import Missing, Trial


def lacking(subject: Subject, case: int, folder: Path) -> None:
    raise Missing("strace is not installed")


@pytest.mark.slow  # writes the tiny model
def test_a_mutant_is_not_noticed_by_what_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cannot = Trial("a4", "power loss", 3, 1, lacking)
    monkeypatch.setattr(mutants, "all_trials", lambda: [cannot])
    monkeypatch.setattr(mutants, "NOTICE", {"a4": 1})
    with pytest.raises(Missing, match="strace is not installed"):
        mutants.noticed(Subject(tmp_path), 0, tmp_path)
