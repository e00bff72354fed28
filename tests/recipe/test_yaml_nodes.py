"""The YAML layer: YAML 1.2 scalars, places, and nothing that a recipe does not need."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import Place, RecipeError
from lorakit.recipe.yaml_nodes import Node, dotted, parse, resolve

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**98), 10**98) | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text("abc\n:# é", max_size=8), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


def root_of(text: str) -> Node:
    root, problems = parse(text, "x.yaml")
    assert root
    assert not problems
    return root


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *[("", None), ("~", None), ("null", None), ("true", True), ("FALSE", False), ("0", 0)],
        *[("-17", -17), ("2e-4", 2e-4), ("1.0E-04", 1e-4), (".5", 0.5), ("5.", 5.0), ("1e3", 1e3)],
    ],
)
def test_scalars_that_are_no_text(written: str, value: object) -> None:
    found = resolve(written)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("written", [".inf", "-.Inf", "+.INF", "1e999", "-1e999"])
def test_infinity(written: str) -> None:
    assert resolve(written) == (-math.inf if written.startswith("-") else math.inf)


@pytest.mark.parametrize(
    "written",
    "no yes on off Y nUll tRue 010 -08 00 0x1F 0o17 0b1 12:30 1:2.5 2024-12-31 1_000 1,000 inf nan "
    "+.nan . - + e5 1e 1e+ --1 = << 1.2.3 ½ ٣".split(),
)
def test_all_else_is_text(written: str) -> None:
    assert resolve(written) == written


@given(VALUES)
def test_json_means_what_it_means_in_json(value: object) -> None:
    written = json.dumps({"root": value}, allow_nan=False) if _finite(value) else "{}"
    assert root_of(written.encode().decode()).plain == json.loads(written)


def _finite(value: object) -> bool:
    # json writes a character beyond the basic plane as two surrogates, which YAML text refuses.
    text = json.dumps(value)
    return "Infinity" not in text and "\\ud" not in text.lower() and "NaN" not in text


def test_every_place() -> None:
    root = root_of('a: 1\nb:\n  c: [x, "y"]\n  d:\n  - {e: 2}\n')
    places = {dotted(path): (node.place.line, node.place.column) for path, node in root.walk()}
    assert places == {
        "": (1, 1), "a": (1, 4), "b": (3, 3), "b.c": (3, 6), "b.c[0]": (3, 7), "b.c[1]": (3, 10),
        "b.d": (5, 3), "b.d[0]": (5, 5), "b.d[0].e": (5, 9),
    }  # fmt: skip
    keys = {path[-1]: str(node.key) for path, node in root.walk() if node.key}
    assert keys["c"] == "x.yaml:3:3"
    assert root.child("b").at == Place("x.yaml", 2, 1)  # type: ignore[union-attr]


def test_text_in_all_styles() -> None:
    root = root_of("a: |\n  one\n  two\nb: >-\n  one\n  two\nc: 'no'\nd: one\n  two\n")
    assert root.plain == {"a": "one\ntwo\n", "b": "one two", "c": "no", "d": "one two"}


def test_columns_count_characters() -> None:
    root, _ = parse("é𝄞: {a: 1, 😀: x}", "x.yaml")
    assert root is not None
    (found,) = [node.place.column for path, node in root.walk() if path[-1:] == ("😀",)]
    assert found == 15


def test_an_empty_document_has_no_root() -> None:
    assert parse("# nothing\n", "x.yaml") == (None, [])


def test_duplicates_leave_the_first() -> None:
    root, problems = parse("a: 1\na: 2\na: 3\n", "x.yaml")
    assert root is not None
    assert root.plain == {"a": 1}
    assert [str(problem.where) for problem in problems] == ["x.yaml:2:1", "x.yaml:3:1"]


@pytest.mark.parametrize("text", ["[", "{", "]", "a: b: c", "'", "%YAML 2.0\n---\na", "a: @b"])
def test_syntax_errors_have_places(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "x.yaml")
    assert caught.value.id == "recipe.syntax"
    assert caught.value.where
    assert caught.value.where.line


def test_a_key_that_is_no_text_keeps_the_rest() -> None:
    root, problems = parse("a: 1\n1: {b: 2}\nc: 3\n", "x.yaml")
    assert root is not None
    assert root.plain == {"a": 1, "c": 3}
    assert [problem.id for problem in problems] == ["recipe.bad-key"]
