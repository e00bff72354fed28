"""`lorakit methods` says of every file what the reference promises."""

import json

import pytest
from typer.testing import CliRunner

from lorakit import adapters
from lorakit.cli.app import app

runner = CliRunner()


def test_every_method_is_listed_with_its_paper() -> None:
    listed = json.loads(runner.invoke(app, ["methods", "--json"]).stdout)["methods"]
    assert [row["name"] for row in listed] == list(adapters.names())
    assert all(row["summary"] and row["paper"] for row in listed)
    readers = {tuple(row["servable"]) for row in listed}
    assert readers == {("PEFT", "vLLM", "llama.cpp")}
    for row in listed:
        assert all(said == "yes" or said.startswith("no: ") for said in row["servable"].values())


def test_a_row_is_a_line_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = runner.invoke(app, ["methods"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["method", *adapters.names()]
    for line, name in zip(lines[1:], adapters.names(), strict=True):
        assert line.endswith(adapters.summary(name))


@pytest.mark.parametrize("name", adapters.names())
def test_every_setting_says_its_values_its_default_and_what_it_does(name: str) -> None:
    (method,) = json.loads(runner.invoke(app, ["methods", name, "--json"]).stdout)["methods"]
    assert isinstance(method["mergeable"], bool)
    keys = adapters.get(name).Settings.model_fields.keys() - {"method"}
    assert {row["key"] for row in method["settings"]} == keys
    assert all(row["value"] and row["description"] for row in method["settings"])
    shown = runner.invoke(app, ["methods", name]).stdout
    assert f"arXiv {method['paper']}" in shown
    assert all(f"{reader} {said}" in shown for reader, said in method["servable"].items())


def test_a_table_prints_brackets_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "summary", lambda name: f"one [of] [bold]{name}[/bold]")
    for line in runner.invoke(app, ["methods"]).stdout.splitlines()[1:]:
        assert line.endswith(f"one [of] [bold]{line.split()[0]}[/bold]")
