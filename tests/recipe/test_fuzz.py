"""Whatever stands in a recipe, the answer is a recipe or lorakit's own errors, soon."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.errors import BadInput, RecipeError
from tests.recipe.stand_ins import read_text
from tests.recipe.written import RECIPES

RELAXED = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

PIECES = st.sampled_from(
    """
    model: data: train: adapter: eval: gates: extends: learning_rate: rank: path: loss base {name}
    - [ ] { } , ' " | > & * ! ? # % @ ` ~ : 1 -1 1e-4 .inf null true no ${A} ${ --- ... << !!map
    &a *a
    """.split()
) | st.sampled_from(["\\", "\t", "é", "\ufeff", "\x00", "\x85", "\ud7ff"])
TEXTS = st.lists(PIECES | st.sampled_from(["\n", "\n  ", "\n    ", " ", "\r\n"]), max_size=40).map(
    "".join
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def refusal(text: str | bytes, folder: Path) -> BadInput | None:
    try:
        read_text(folder, text, environ={"A": "a"})
    except BadInput as error:
        return error
    return None


def check(text: str | bytes, folder: Path) -> None:
    error = refusal(text, folder)
    for problem in error.problems if isinstance(error, RecipeError) else ():
        assert problem.where
        assert problem.message.isprintable()
    assert error is None or isinstance(error, RecipeError)


@RELAXED
@given(data=st.binary(max_size=60))
def test_bytes(data: bytes, tmp_path: Path) -> None:
    check(data, tmp_path)


@pytest.mark.slow  # many short texts
@RELAXED
@given(text=TEXTS)
def test_pieces_of_yaml(text: str, tmp_path: Path) -> None:
    check(text, tmp_path)


def replaced(tree: Any, path: list[int], value: Any) -> Any:
    """Put a value somewhere into a tree; `path` counts the keys or entries on the way."""
    if not path or not isinstance(tree, dict | list) or not tree:
        return value
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = keys[path[0] % len(keys)]
    changed = dict(tree) if isinstance(tree, dict) else list(tree)
    changed[key] = replaced(tree[key], path[1:], value)
    return changed


def renamed(tree: Any, path: list[int], name: str) -> Any:
    """Rename one key somewhere in a tree."""
    if not path or not isinstance(tree, dict) or not tree:
        return tree
    key = list(tree)[path[0] % len(tree)]
    if len(path) == 1:
        return {name if k == key else k: v for k, v in tree.items()}
    return {k: renamed(v, path[1:], name) if k == key else v for k, v in tree.items()}


PATHS = st.lists(st.integers(0, 20), min_size=1, max_size=4)


@pytest.mark.slow  # every refusal makes the schema again
@RELAXED
@given(tree=RECIPES, path=PATHS, value=ANYTHING)
def test_a_wrong_value_anywhere(tree: Any, path: list[int], value: Any, tmp_path: Path) -> None:
    text = json.dumps(replaced(tree, path, value), ensure_ascii=False)
    check(text.encode("utf-8", "surrogatepass"), tmp_path)


@RELAXED
@given(
    tree=RECIPES,
    path=PATHS,
    name=st.text(max_size=8) | st.sampled_from(["lr", "seed", "rank", "trian"]),
)
def test_a_wrong_key_anywhere(tree: Any, path: list[int], name: str, tmp_path: Path) -> None:
    text = json.dumps(renamed(tree, path, name), ensure_ascii=False)
    check(text.encode("utf-8", "surrogatepass"), tmp_path)
