"""The code that keeps things safe, with one thing left out: some trial must notice.

A mutant is the code of one function without one sync, rename, check or lock. It takes the
function's place in a child, so that whoever imported it has the mutant as well.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from tests.faults.forked import Child
from tests.faults.subject import Subject
from tests.faults.trials import Missing, Trial, all_trials

PATIENCE = 900  # seconds for all trials on one mutant
UNTRIED = 97  # exit code of a child in which a trial could not be tried

# What is left out: a call that stands alone, or a condition that holds when something is wrong.
CALLS = frozenset(
    """
    os.fsync sync settle _settle os.rename sweep fcntl.flock supersede write_manifest
    check_sha256 check_shards check_texts _check_tokenizer _check_scales
    check_finite _check_written set_aside set_damaged_aside _is_changed
    """.split()
)
# Where, in which functions (with `?` their conditions as well), and which trials are tried first.
PLACES = (
    ("lorakit.storage.disk", "sync make_folder", "a4"),
    ("lorakit.storage.publish", "publish_folder publish_file", "a4"),
    ("lorakit.storage.publish", "remove_folder", "a4 b5"),
    ("lorakit.storage.publish", "sweep?", "a2 a4"),
    ("lorakit.storage.publish", "set_aside _prepare _settle _put _bring_back", "a4 a2 b5"),
    ("lorakit.storage.lock", "_take", "g1"),
    ("lorakit.storage.manifest", "check_manifest?", "d1 d2"),
    ("lorakit.storage.hashing", "check_sha256?", "d3 d4"),
    ("lorakit.storage.tensors", "TensorWriter.finish?", "d5"),
    ("lorakit.data.cache", "_write _read?", "d6 a4"),
    ("lorakit.training.checkpoint", "newest? save?", "d2 d5 e1"),
    ("lorakit.training.checkpoint", "check_finite?", "e1"),
    ("lorakit.training.checkpoint", "_check_written?", "d5"),
    ("lorakit.training.checkpoint", "set_damaged_aside", "a1"),
    ("lorakit.training.run", "save", "e1 a4"),
    ("lorakit.training.folder", "opened", "a1"),
    ("lorakit.training.folder", "RunFolder.begin RunFolder.settle supersede", "a4 a1"),
    ("lorakit.export.verify", "check_written?", "d5"),
    ("lorakit.model.merged", "_check", "d4"),
    ("lorakit.model.base", "find load", "d4"),
    ("lorakit.adapters._file", "_check?", "d5"),
    ("lorakit.adapters._read", "_read_passport _check_tokenizer read", "d3"),
    ("lorakit.adapters._saved", "_check_scales? _fitting", "d3"),
)
# These only say sooner, or better, what the next line refuses as well; or they judge numbers that
# no fault of a disk or of a process makes: whether training changed anything, a foreign model's.
NO_FAULT = ("st_size", "step < state.step", "row", "in changed", "untouched", "check_finite(model")
# How many cases of each trial are tried; after the likely ones all others, in this order.
NOTICE = {
    "d1": 40,
    "d2": 60,
    "d3": 80,
    "d4": 60,
    "d5": 40,
    "d6": 60,
    "a4": 150,
    "e1": 40,
    "g1": 6,
    "a1": 60,
    "a2": 40,
    "b5": 30,
    "b2": 60,
}


@dataclass(frozen=True)
class Mutant:
    """A function without one of its statements or conditions."""

    module: str
    function: str
    line: int
    what: str
    likely: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.module}.{self.function}, line {self.line}: {self.what}"

    def take_place(self) -> None:
        """Give the function the code that lacks it."""
        module = import_module(self.module)
        tree = ast.parse(inspect.getsource(module))
        tree = ast.fix_missing_locations(_Without(self.line).visit(tree))
        code = compile(tree, module.__file__ or "", "exec")
        function: Any = module
        for name in self.function.split("."):
            code = next(c for c in code.co_consts if _is_code(c, name))
            function = getattr(function, name)
        inspect.unwrap(function).__code__ = code


class _Without(ast.NodeTransformer):
    """Leaves out what stands at a line: a call, or the truth of a condition."""

    def __init__(self, line: int) -> None:
        self.line = line

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Pass() if node.lineno == self.line else node

    def visit_If(self, node: ast.If) -> ast.AST:
        if node.lineno == self.line:
            node.test = ast.Constant(False)
        self.generic_visit(node)
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        if any(test.lineno == self.line for test in node.ifs):
            node.ifs = [ast.Constant(False)]
        return node


@cache
def mutants() -> list[Mutant]:
    """Return every mutant of the places above."""
    found = []
    for name, functions, likely in PLACES:
        module = import_module(name)
        tree = ast.parse(inspect.getsource(module))
        for function in functions.split():
            node = _definition(tree, function.rstrip("?").split("."))
            for line, what in _omissible(node, conditions=function.endswith("?")):
                found.append(Mutant(name, function.rstrip("?"), line, what, tuple(likely.split())))
    return found


def _omissible(function: ast.FunctionDef, *, conditions: bool) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of what may be left out of a function."""
    for node in ast.walk(function):
        match node:
            case ast.Expr(value=ast.Call(func=called)) if _last(called) in CALLS:
                line, what = node.lineno, ast.unparse(node)
            case ast.If(test=test) if conditions or _last(getattr(test, "func", test)) in CALLS:
                line, what = node.lineno, f"if {ast.unparse(test)}"
            case ast.comprehension(ifs=[ast.Compare() as test]) if conditions:
                line, what = test.lineno, f"if {ast.unparse(test)}"
            case _:
                continue
        if not any(words in what for words in NO_FAULT):
            yield line, what


def _last(called: ast.expr) -> str:
    text = ast.unparse(called)
    return text if text in CALLS else text.rpartition(".")[2]


def _definition(tree: ast.AST, path: list[str]) -> ast.FunctionDef:
    for name in path:
        tree = next(node for node in ast.walk(tree) if getattr(node, "name", None) == name)
    assert isinstance(tree, ast.FunctionDef)
    return tree


def _is_code(constant: object, name: str) -> bool:
    return isinstance(constant, CodeType) and constant.co_name == name


def noticed(subject: Subject, case: int, folder: Path) -> None:
    """Try the trials on a mutant until one fails; it is a failure when none does."""
    mutant = mutants()[case]
    ended = Child(lambda: _try_on(mutant, folder)).ended(PATIENCE)
    if ended.code == UNTRIED:  # what it would have noticed is not known
        raise Missing(ended.said.splitlines()[-1])
    assert ended.code == 0, f"nothing notices {mutant}: {ended}"


def _try_on(mutant: Mutant, folder: Path) -> int:
    mutant.take_place()
    trials = {trial.id: trial for trial in all_trials()}
    try:
        subject = Subject.at(folder / "mutated" / "subject")
        for name in dict.fromkeys((*mutant.likely, *NOTICE)):
            print(f"{name} begins")  # noqa: T201
            _carry_out(trials[name], NOTICE[name], subject, folder)
    except Missing as reason:
        print(reason)  # noqa: T201
        return UNTRIED
    except (Exception, pytest.fail.Exception) as error:
        print(f"noticed: {str(error)[:200]}")  # noqa: T201
        return 0
    return 1


def _carry_out(trial: Trial, count: int, subject: Subject, folder: Path) -> None:
    for case in replace(trial, quick=count).sample(subject):
        place = folder / f"{trial.id}-{case}"
        place.mkdir()
        trial.body(subject, case, place)


TRIALS = [
    Trial(
        "l1",
        "one sync, rename, check or lock left out of the code: some trial must fail",
        lambda _: len(mutants()),
        0,
        noticed,
    )
]
