"""The quick part of the faults: a few cases of each trial; `make faults` runs them all."""

import json
import os
from dataclasses import asdict

import pytest

from lorakit.storage.disk import append_line
from tests.faults.subject import Subject
from tests.faults.trials import Missing, Trial, all_trials
from tests.faults.workers import Result, carry_out

pytestmark = pytest.mark.slow  # forks a whole run for each case
SAMPLED = [trial for trial in all_trials() if trial.quick]


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Result]:
    """What came of the sample of each trial that is asked for, tried side by side."""
    place = tmp_path_factory.mktemp("faults")
    subject, found = Subject.at(place / "subject"), place / "results.jsonl"
    cases = []
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.module is request.module:
            trial = item.callspec.params["trial"]
            try:
                cases += [(trial, case) for case in trial.sample(subject)]
            except Missing as reason:
                append_line(found, json.dumps(asdict(Result(trial.id, 0, missing=str(reason)))))

    def note(result: Result) -> None:
        append_line(found, json.dumps(asdict(result)))

    carry_out(cases, subject, place, note, processes=os.cpu_count() or 1)
    return [Result(**json.loads(line)) for line in found.read_text().splitlines()]


@pytest.mark.parametrize("trial", SAMPLED, ids=lambda trial: trial.id)
def test_nothing_is_lost_and_nothing_hostile_runs(trial: Trial, results: list[Result]) -> None:
    found = [result for result in results if result.trial == trial.id]
    assert found, "nothing was tried"
    failed = [f"case {result.case}: {result.failure}" for result in found if result.failure]
    assert not failed, "\n".join(failed)
    if missing := next((result.missing for result in found if result.missing), None):
        pytest.skip(missing)
