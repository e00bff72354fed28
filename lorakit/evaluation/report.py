"""The outputs of an evaluation: JSON document, samples, Markdown table and JUnit file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from lorakit import __version__
from lorakit.evaluation.gates import Judgement, shown, verdict
from lorakit.evaluation.results import Results
from lorakit.recipe.sections import GENERATED
from lorakit.storage.redact import printable
from lorakit.storage.strict_json import dumps_line

LONG = 400  # characters of a text in a failure


@dataclass(frozen=True)
class Report:
    """Results with their judgements; `facts` say what was measured with what.

    `compares` shows the baseline's figures beside these, and what has changed since.
    """

    name: str
    results: Results
    judgements: tuple[Judgement, ...]
    baseline: Mapping[str, float]
    facts: Mapping[str, Any]
    compares: bool = False

    @property
    def header(self) -> tuple[str, ...]:
        """The names of the table's columns."""
        compared = ("baseline", "since") if self.compares else ()
        return ("metric", "adapter", "base", "change", *compared, "gate", "limit", "result")

    @property
    def exit(self) -> int:
        error = verdict(self.judgements)
        return error.exit_code if error else 0

    def document(self) -> dict[str, Any]:
        """Return the content of `results.json`."""
        return {
            "schema": "lorakit.eval/1",
            "ok": self.exit == 0,
            "exit": self.exit,
            "lorakit_version": __version__,
            **self.facts,
            "metrics": self.results.facts(self.baseline),
            "gates": [_gate(one) for one in self.judgements],
        }

    def table(self) -> list[tuple[str, ...]]:
        """Return the rows under `header`: one a metric, one more for each further gate on it."""
        lines: list[tuple[str, ...]] = []
        for name, facts in self.results.facts(self.baseline).items():
            adapter, base = facts["adapter"], facts["base"]
            numbers = [_number(adapter), _number(base), _change(adapter, base)]
            if self.compares:
                before, now = facts["baseline"], base if adapter is None else adapter
                numbers += [_number(before), _change(now, before)]
            gates = [_result(one) for one in self.judgements if one.gate.metric == name]
            first, *further = gates or [("", "", "")]
            nothing = ("", *("" for _ in numbers))
            lines += [(name, *numbers, *first), *((*nothing, *more) for more in further)]
        return lines

    def summary(self) -> str:
        """Return what the gates say in one sentence."""
        if not self.judgements:
            return "No gates: nothing decides."
        missed = [one for one in self.judgements if not one.passed]
        return (
            f"{len(missed)} of {len(self.judgements)} gates failed."
            if missed
            else "All gates passed."
        )

    def markdown(self) -> str:
        """Return the table as a Markdown document."""
        header = self.header
        lines = [f"## {self.name}", "", self.summary(), ""]
        lines += map(_cells, [header, ["---"] * len(header), *self.table()])
        return "\n".join(lines) + "\n"

    def junit(self) -> bytes:
        """Return a JUnit file with one test case a gate."""
        failures = sum(not one.passed for one in self.judgements)
        suite = ElementTree.Element(
            "testsuite",
            name=self.name,
            tests=str(len(self.judgements)),
            failures=str(failures),
            errors="0",
            time=f"{self.facts.get('wall_seconds', 0):.3f}",
        )
        for one in self.judgements:
            gate = one.gate
            name = f"{gate.metric} {gate}"
            case = ElementTree.SubElement(suite, "testcase", classname=self.name, name=name)
            if not one.passed:
                failure = ElementTree.SubElement(case, "failure", message=str(one))
                failure.text = "\n".join([str(one), *self._worst(gate.metric)])
        ElementTree.indent(suite)
        text: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
        return text

    def samples(self) -> str:
        """Return one JSON object a line for each generated row."""
        return "".join(f"{dumps_line(sample)}\n" for sample in self.results.samples())

    def _worst(self, metric: str) -> list[str]:
        """Describe the three worst rows; texts from data are escaped."""
        results = self.results
        if metric not in results.main.metrics:
            return []
        if metric not in GENERATED:
            return [f"worst row: {results.rows[row]}" for row in results.worst(metric)]
        return [
            f"{results.prompts[row].place}\n"
            f"  reference: {printable(results.prompts[row].reference, LONG)}\n"
            f"  output:    {printable(results.main.answers[row].text, LONG)}"
            for row in results.worst(metric)
        ]


def _gate(one: Judgement) -> dict[str, Any]:
    gate = one.gate
    return {
        "metric": gate.metric,
        "bound": str(gate),
        "limit": one.limit,
        "value": one.value,
        "margin": one.margin,
        "confidence": gate.confidence,
        "passed": one.passed,
        "file": gate.place.file,
        "line": gate.place.line,
    }


def _result(one: Judgement) -> tuple[str, str, str]:
    limit = "" if one.gate.bound.reference is None else shown(one.limit)
    return str(one.gate), limit, "pass" if one.passed else "FAIL"


def _number(value: object) -> str:
    return shown(value) if isinstance(value, float) else ""


def _change(adapter: object, base: object) -> str:
    if not isinstance(adapter, float) or not isinstance(base, float):
        return ""
    change = adapter - base
    return f"{'+' if change >= 0 else '-'}{shown(abs(change))}"


def _cells(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"
