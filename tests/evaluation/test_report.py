import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lorakit.data.tokens import Prompt
from lorakit.errors import BadInput, Place
from lorakit.evaluation import baseline
from lorakit.evaluation.gates import judge, limits
from lorakit.evaluation.generation import Generation
from lorakit.evaluation.metrics import from_marks, from_scores
from lorakit.evaluation.report import Report
from lorakit.evaluation.results import Measured, Results
from lorakit.recipe.origin import Origin
from lorakit.recipe.sections import Eval, Gate
from lorakit.scoring import RowScore

ODD = "bell \x07 escape \x1b[31m and </failure>"
FACTS = {"data_sha256": "d1", "normalize": ["strip"], "base_model": "tiny"}


def measured(nlls: list[float], marks: list[bool]) -> Measured:
    scores = [RowScore(row, nll, 2, 0) for row, nll in enumerate(nlls)]
    metrics = {"loss": from_scores("loss", scores), "exact_match": from_marks(marks)}
    return Measured(metrics, [Generation(f"{ODD} {row}", (5,), True) for row in range(len(marks))])


def results(*, base_only: bool = False) -> Results:
    places = [Place("eval.jsonl", line) for line in range(1, 5)]
    prompts = [Prompt((1,), f"prompt {ODD}", f"reference {place.line}", place) for place in places]
    ours = measured([1, 2, 3, 6], [True, False, False, True])
    return Results(
        None if base_only else ours, measured([2, 4, 6, 8], [False] * 4), places, prompts
    )


def report(**gates: Gate) -> Report:
    section = Eval(metrics=("loss", "exact_match"), gates=gates)
    places = {("eval", "gates", name): Place("r.yaml", 9) for name in gates}
    found = results()
    assert found.adapter is not None
    parsed = limits(section, Origin(Path("r.yaml"), b"", places))
    judged = judge(parsed, found.adapter.metrics, found.base.metrics, {"loss": 1.4})
    return Report("support", found, judged, {"loss": 1.4}, {"wall_seconds": 1.5})


def test_the_document_has_the_keys_that_programs_read():
    document = report(loss=Gate(max="baseline + 10%"), exact_match=Gate(min=0.9)).document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert (document["schema"], document["ok"], document["exit"]) == ("lorakit.eval/1", False, 1)
    loss = document["metrics"]["loss"]
    assert loss["adapter"] == 12 / 8
    assert loss["base"] == 20 / 8
    assert loss["baseline"] == 1.4
    assert loss["n"] == 4
    assert loss["higher_is_better"] is False
    low, high = loss["diff_ci95"]
    assert low <= loss["adapter"] - loss["base"] <= high
    missed = document["gates"][1]
    assert {key: missed[key] for key in ("metric", "bound", "limit", "value", "passed")} == {
        "metric": "exact_match",
        "bound": "min 0.9",
        "limit": 0.9,
        "value": 0.5,
        "passed": False,
    }
    assert (missed["file"], missed["line"]) == ("r.yaml", 9)


def test_the_table_has_a_line_for_each_metric_and_each_gate():
    found = report(loss=Gate(max="base - 5%", min=0.1))
    table = found.table()
    assert table == [
        ("loss", "1.500", "2.500", "-1.000", "min 0.1", "", "pass"),
        ("", "", "", "", "max base - 5%", "2.375", "pass"),
        ("exact_match", "0.500", "0.000", "+0.500", "", "", ""),
    ]
    assert all(len(row) == len(found.header) for row in table)


def test_base_only_leaves_the_adapter_out():
    alone = Report("support", results(base_only=True), (), {}, {})
    facts = alone.document()["metrics"]["loss"]
    assert (facts["adapter"], facts["base"], facts["diff_ci95"]) == (None, 2.5, None)
    assert alone.results.samples()[0]["output"] is None
    assert alone.exit == 0


def test_junit_parses_and_holds_the_worst_rows():
    text = report(loss=Gate(max=1.0), exact_match=Gate(min=0.3, max=0.4)).junit()
    suite = ElementTree.fromstring(text)
    assert suite.attrib["name"] == "support"
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("3", "2")
    loss, match, too_high = suite.findall("testcase")
    assert match.find("failure") is None
    failure = loss.find("failure")
    assert failure is not None
    assert failure.text is not None
    assert failure.attrib["message"] == "loss is 1.500, its gate is max 1"
    assert failure.text.splitlines()[1:] == [f"worst row: eval.jsonl:{n}" for n in (4, 3, 2)]
    failure = too_high.find("failure")
    assert failure is not None
    assert failure.text is not None
    assert "eval.jsonl:2\n  reference: reference 2\n" in failure.text
    assert "\x07" not in failure.text


def test_markdown_is_a_table():
    found = report(loss=Gate(max=1.0))
    lines = found.markdown().splitlines()
    assert lines[2] == "1 of 1 gates failed."
    assert all(line.count("|") == len(found.header) + 1 for line in lines[4:])


def test_samples_are_one_object_a_line():
    rows = [json.loads(line) for line in report().samples().splitlines()]
    assert [row["id"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["scores"] == {"exact_match": True}
    assert rows[0]["base_scores"] == {"exact_match": False}
    assert rows[0]["place"] == "eval.jsonl:1"


def test_a_baseline_comes_back_rounded(tmp_path: Path):
    path = tmp_path / "baseline.json"
    baseline.write(path, results(), FACTS)
    assert baseline.read(path, FACTS) == {"loss": 1.5, "exact_match": 0.5}
    assert list(json.loads(path.read_text())) == sorted(json.loads(path.read_text()))
    baseline.write(path, results(base_only=True), FACTS)
    assert baseline.read(path, FACTS)["loss"] == 2.5


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"schema": "lorakit.baseline/1", "data_sha256": "other", "normalize": ["strip"]}',
        '{"schema": "lorakit.baseline/1", "data_sha256": "d1", "normalize": ["number"]}',
        '{"schema": "lorakit.baseline/1", "data_sha256": "d1", "normalize": ["strip"]}',
        '{"schema": "lorakit.baseline/1", "data_sha256": "d1", "normalize": ["strip"], '
        '"metrics": {"loss": 1}}',
        '{"schema": "lorakit.baseline/1", "data_sha256": "d1", "normalize": ["strip"], '
        f'"metrics": {{"loss": {{"value": {10**400}}}}}}}',
    ],
)
def test_a_baseline_of_unlike_things_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        baseline.read(path, FACTS)
    assert caught.value.id == "eval.baseline-mismatch"


def test_a_missing_baseline_is_refused_with_the_option_that_makes_it(tmp_path: Path):
    (tmp_path / "nones.json").write_text("{}")  # a near name, which has nothing to do with it
    with pytest.raises(BadInput) as caught:
        baseline.read(tmp_path / "none.json", FACTS)
    assert caught.value.id == "eval.no-baseline"
    assert caught.value.help == "--update-baseline creates it"


def test_a_baseline_is_compared_in_columns_of_its_own():
    given = report(loss=Gate(max="base - 5%"))
    compared = replace(given, compares=True)
    assert "baseline" not in given.header
    assert compared.header[1:6] == ("adapter", "base", "change", "baseline", "since")
    loss, exact_match = compared.table()
    assert loss[1:6] == ("1.500", "2.500", "-1.000", "1.400", "+0.100")
    assert exact_match[4:6] == ("", ""), "the baseline may be older than a metric"
    assert all(len(row) == len(compared.header) for row in (loss, exact_match))
    assert "| 1.400 | +0.100 |" in compared.markdown()
