"""The schema and the reference page: complete, fresh, and of one mind with the reader."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from lorakit import adapters
from lorakit.errors import BadInput, RecipeError
from lorakit.recipe import expected, files, reference, schema
from lorakit.recipe.foreign import FOREIGN, NOTES
from tests.recipe.stand_ins import METHODS, read_text
from tests.recipe.written import RECIPES

MADE = schema.json_schema(METHODS)


def blocks(part: Any) -> list[dict[str, Any]]:
    """Return all mappings with properties below a part of the schema."""
    inside = part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    own = [part] if isinstance(part, dict) and isinstance(part.get("properties"), dict) else []
    return own + [block for one in inside for block in blocks(one)]


def test_every_key_has_one_line_that_says_what_it_is() -> None:
    for made in (MADE, schema.shipped()):
        for block in blocks(made):
            for key, field in block["properties"].items():
                if "const" not in field:
                    assert field.get("description"), key
                    assert "\n" not in field["description"], key


def test_every_block_is_closed() -> None:
    for block in blocks(MADE):
        if "if" not in block and block is not MADE["$defs"]["Adapter"]:
            is_condition = set(block["properties"]) == {"method"} and "type" not in block
            assert is_condition or block["additionalProperties"] is False


def test_every_key_that_is_not_required_has_a_default() -> None:
    for block in blocks(MADE):
        for key, field in block["properties"].items():
            optional = key not in block.get("required", ()) and "const" not in field
            if optional and "$ref" not in field and key != "extends":
                assert "default" in field, key


def test_references_lead_somewhere() -> None:
    names = set(re.findall(r'"#/\$defs/([^"]+)"', schema.written(MADE)))
    assert names <= set(MADE["$defs"])


@pytest.mark.slow  # imports the methods, and with them torch
def test_the_shipped_schema_is_fresh() -> None:
    made = schema.json_schema({name: adapters.settings_for(name) for name in adapters.names()})
    assert schema.written(made) == schema.FILE.read_text(), "run scripts/make_schema.py"


def test_the_reference_page_is_fresh() -> None:
    folder = next(iter(files.packaged_recipes().values())).parent
    page = (folder / "REFERENCE.md").read_text()
    assert reference.table(schema.shipped()) in page, "run scripts/make_reference.py"


def test_the_reference_names_every_key_once() -> None:
    rows = reference.table(MADE).splitlines()[2:]
    keys = [row.split("`")[1] for row in rows]
    assert len(keys) == len(set(keys))
    assert {"model.path", "data.train.weight", "train.epochs", "eval.gates.*.min"} <= set(keys)
    assert {"adapter.method", "adapter.rank", "adapter.tokens", "seed", "extends"} <= set(keys)
    assert all(row.count(" | ") == 3 for row in rows)
    (rank,) = [row for row in rows if "adapter.rank`" in row]
    assert rank == "| `adapter.rank` | a positive integer | `16` | size of the update (lora) |"


def test_one_key() -> None:
    assert reference.field(MADE, "train.learning_rate")["default"] == 2e-4
    assert reference.field(MADE, "adapter.tokens")["default"] == 20
    assert reference.field(MADE, "eval.gates.*.min")["description"]
    with pytest.raises(BadInput) as caught:
        reference.field(MADE, "train.learning_rat")
    assert caught.value.help == "did you mean train.learning_rate?"


def test_foreign_names_lead_to_keys_and_are_no_keys() -> None:
    shipped = schema.shipped()
    known = {name.rpartition(".")[2] for name in _keys(shipped)}
    for name, meant in FOREIGN.items():
        key = meant.partition(" ")[0]
        assert key in {*_keys(shipped), "adapter"}, f"{name}: {meant}"
    assert not known & set(FOREIGN)
    assert not known & set(NOTES)


def _keys(made: dict[str, Any]) -> set[str]:
    return {path for path, _, _ in reference._fields(made)}


def test_stand_ins_of_the_shipped_schema() -> None:
    shipped = schema.shipped()
    for name in expected.choices(expected.at(shipped, ("adapter", "method"))):
        settings_of = schema.settings_for(name)
        made = settings_of.model_validate({"method": name})
        assert made.method == name
        assert made.model_dump(exclude_unset=True) == {"method": name}
    with pytest.raises(BadInput) as caught:
        schema.settings_for("lorra")
    assert caught.value.id == "adapter.unknown-method"


@pytest.mark.slow  # a general validator of schemas
def test_what_the_reader_takes_the_schema_takes(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator
    validator.check_schema(MADE)
    validator.check_schema(schema.shipped())

    @settings(
        max_examples=60,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(tree=RECIPES)
    def agree(tree: dict[str, Any]) -> None:
        try:
            read_text(tmp_path, json.dumps(tree), environ={"A": "a"})
        except RecipeError:
            return
        assert validator(MADE).is_valid(tree), list(validator(MADE).iter_errors(tree))

    agree()


@pytest.mark.parametrize(
    "tree",
    [
        {"data": {"train": "a"}},
        {"model": "", "data": {"train": "a"}},
        {"model": "a", "data": {"train": []}},
        {"model": "a", "data": {"train": "a", "eval": 1.5}},
        {"model": "a", "data": {"train": "a"}, "adapter": {"rank": 0}},
        {"model": "a", "data": {"train": "a"}, "adapter": {"tokens": 1}},
        {"model": "a", "data": {"train": "a"}, "adapter": {"method": "virtual", "rank": 1}},
        {"model": "a", "data": {"train": "a"}, "adapter": {"method": "other"}},
        {"model": "a", "data": {"train": "a"}, "eval": {"gates": {"los": {}}}},
        {"model": "a", "data": {"train": "a"}, "trian": {}},
    ],
)
def test_what_both_refuse(tree: dict[str, Any], tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert not jsonschema.Draft202012Validator(MADE).is_valid(tree)
    with pytest.raises(RecipeError):
        read_text(tmp_path, json.dumps(tree))
