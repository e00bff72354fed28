"""The quick part of the faults: a few cases of each trial; `make faults` runs them all."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.subject import Subject
from tests.faults.trials import Missing, Trial, all_trials

pytestmark = pytest.mark.slow  # forks a whole run for each case


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    folder = tmp_path_factory.mktemp("faults")
    yield Subject.at(folder / "subject")
    shutil.rmtree(folder)


@pytest.mark.parametrize("trial", all_trials(), ids=lambda trial: trial.id)
def test_nothing_is_lost_and_nothing_hostile_runs(
    trial: Trial, subject: Subject, tmp_path: Path
) -> None:
    try:
        for case in trial.sample(subject):
            folder = tmp_path / "case"
            folder.mkdir()
            trial.body(subject, case, folder)
            shutil.rmtree(folder)
    except Missing as reason:
        pytest.skip(str(reason))
