"""The table itself: every row of it is tried, but those of a server that is not there yet."""

import importlib

import pytest

from tests.bad_inputs import test_accepted, test_checkpoints
from tests.bad_inputs.cases import EXITS, ROWS, Row

SERVER = {"X03", "X04"}
MODULES = ("recipes", "data", "adapters", "models", "checkpoints", "usage")


def test_every_row_has_a_case() -> None:
    modules = [importlib.import_module(f"tests.bad_inputs.test_{name}") for name in MODULES]
    cases = {case.name.split()[0] for module in modules for case in module.CASES}
    tried = cases | {
        name.split()[0] for name in (*test_accepted.ACCEPTED, *test_checkpoints.SKIPPED)
    }
    assert ROWS.keys() - tried == SERVER


@pytest.mark.parametrize("row", [r for r in ROWS.values() if r.error in EXITS], ids=lambda r: r.id)
def test_the_exit_code_is_that_of_the_error(row: Row) -> None:
    assert row.exit in (EXITS[row.error], 0)  # 0: the id is a warning's as well
