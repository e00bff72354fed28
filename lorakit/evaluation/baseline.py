"""The baseline file: the figures of a run that later runs are measured against, for committing."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import BadInput
from lorakit.evaluation.results import Results, finite
from lorakit.storage.publish import publish_file
from lorakit.storage.strict_json import dumps, read_object

SCHEMA = "lorakit.baseline/1"
FAMILY = "eval.baseline-mismatch"
# Figures are comparable only over the same rows, compared in the same way.
ALIKE = ("data_sha256", "normalize")
KEPT = frozenset(
    """
    recipe_sha256 data_sha256 base_model base_revision adapter_sha256 normalize versions device
    created
    """.split()
)
DIGITS = 6


def read(path: Path, facts: Mapping[str, Any]) -> dict[str, float]:
    """Return the value of each metric in a baseline file.

    Raises:
        BadInput: `eval.no-baseline` when there is no file; `eval.baseline-mismatch` when it is no
            baseline, or one over other rows or with other normalisations than `facts` say of this
            evaluation.
    """
    if not os.path.exists(path):
        message, help = "there is no such baseline", "--update-baseline creates it"
        raise BadInput("eval.no-baseline", message, where=str(path), help=help)
    found = read_object(path, FAMILY)
    if found.get("schema") != SCHEMA:
        raise _mismatch(path, f"expected the schema {SCHEMA}, found {found.get('schema')!r}")
    for key in ALIKE:
        if found.get(key) != facts[key]:
            raise _mismatch(path, f"{key} is {found.get(key)!r} there, {facts[key]!r} here")
    try:
        return {str(name): float(one["value"]) for name, one in found["metrics"].items()}
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        raise _mismatch(path, "metrics: expected an object of {value, stderr, n}") from None


def write(path: Path, results: Results, facts: Mapping[str, Any]) -> None:
    """Write the figures of this evaluation as a baseline: small differences, no paths.

    Raises:
        RunFailed: when the disk refuses.
    """
    metrics = {
        name: {"value": _rounded(one.value), "stderr": _rounded(one.stderr), "n": one.n}
        for name, one in results.main.metrics.items()
        if finite(one.value) is not None
    }
    kept = {key: value for key, value in facts.items() if key in KEPT}
    document = {"schema": SCHEMA, **kept, "metrics": metrics}
    publish_file(path, dumps(dict(sorted(document.items()))).encode(), replace=True)


def _rounded(value: float) -> float | None:
    return None if finite(value) is None else round(value, DIGITS)


def _mismatch(path: Path, message: str) -> BadInput:
    return BadInput(
        FAMILY, message, where=str(path), help="write a new baseline with --update-baseline"
    )
