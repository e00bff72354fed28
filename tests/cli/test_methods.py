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


@pytest.mark.parametrize("name", adapters.names())
def test_every_setting_says_its_values_its_default_and_what_it_does(name: str) -> None:
    (method,) = json.loads(runner.invoke(app, ["methods", name, "--json"]).stdout)["methods"]
    assert isinstance(method["mergeable"], bool)
    keys = adapters.get(name).Settings.model_fields.keys() - {"method"}
    assert {row["key"] for row in method["settings"]} == keys
    assert all(row["value"] and row["description"] for row in method["settings"])
    shown = runner.invoke(app, ["methods", name]).stdout
    assert f"arXiv {method['paper']}" in shown
