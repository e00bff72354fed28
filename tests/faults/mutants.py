"""The code that keeps things safe, with one thing left out: some trial must notice.

A mutant is the code of one function without one sync, rename, check or lock. It takes the
function's place in a child, so that whoever imported it has the mutant as well.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import CodeType
from typing import Any

from tests.faults.forked import run
from tests.faults.subject import Subject
from tests.faults.trials import Trial, all_trials

# What is left out: a call that stands alone, or a condition that holds when something is wrong.
CALLS = frozenset(
    """
    os.fsync sync settle _settle os.rename sweep fcntl.flock supersede write_manifest
    check_sha256 check_shards check_texts _check_tokenizer _check_scales
    """.split()
)
PLACES = (
    ("lorakit.storage.disk", "sync make_folder"),
    ("lorakit.storage.publish", "publish_folder publish_file remove_folder sweep set_aside"),
    ("lorakit.storage.publish", "_prepare _settle _put"),
    ("lorakit.storage.lock", "_take"),
    ("lorakit.storage.manifest", "check_manifest"),
    ("lorakit.storage.hashing", "check_sha256"),
    ("lorakit.training.checkpoint", "newest save"),
    ("lorakit.training.folder", "opened"),
    ("lorakit.training.folder", "RunFolder.begin RunFolder.settle supersede"),
    ("lorakit.model.merged", "_check"),
    ("lorakit.model.base", "find load"),
    ("lorakit.adapters._read", "_read_passport _check_tokenizer read"),
    ("lorakit.adapters._saved", "_check_scales _fitting"),
)
CONDITIONS = frozenset("check_manifest newest save check_sha256 sweep _check_scales".split())
# These only say sooner, or better, what the next line refuses as well.
ONLY_WORDS = ("st_size", "step < state.step")
# Who notices, the likeliest first, and how many cases of each are tried.
NOTICE = {
    "d1": 40,
    "d2": 60,
    "d3": 80,
    "d4": 60,
    "d5": 10,
    "a4": 150,
    "e1": 16,
    "g1": 6,
    "a1": 60,
    "b2": 60,
}


@dataclass(frozen=True)
class Mutant:
    """A function without one of its statements or conditions."""

    module: str
    function: str
    line: int
    what: str

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
    for name, functions in PLACES:
        module = import_module(name)
        tree = ast.parse(inspect.getsource(module))
        for function in functions.split():
            node = _definition(tree, function.split("."))
            found += [Mutant(name, function, line, what) for line, what in _omissible(node)]
    return found


def _omissible(function: ast.FunctionDef) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of what may be left out of a function."""
    for node in ast.walk(function):
        match node:
            case ast.Expr(value=ast.Call(func=called)) if _last(called) in CALLS:
                yield node.lineno, ast.unparse(node)
            case ast.If(test=test) if function.name in CONDITIONS:
                text = ast.unparse(test)
                if not any(words in text for words in ONLY_WORDS):
                    yield node.lineno, f"if {text}"
            case ast.comprehension(ifs=[test]) if function.name == "check_manifest":
                yield test.lineno, f"if {ast.unparse(test)}"


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
    ended = run(lambda: _try_on(mutant, folder))
    assert ended.code == 0, f"nothing notices {mutant}: {ended}"


def _try_on(mutant: Mutant, folder: Path) -> int:
    mutant.take_place()
    trials = {trial.id: trial for trial in all_trials()}
    try:
        subject = Subject.at(folder / "mutated" / "subject")
        for name, count in NOTICE.items():
            _carry_out(trials[name], count, subject, folder)
    except Exception as error:
        print(f"noticed: {str(error)[:200]}")  # noqa: T201
        return 0
    return 1


def _carry_out(trial: Trial, count: int, subject: Subject, folder: Path) -> None:
    everything = trial.count(subject)
    for number in range(min(count, everything)):
        case = number * everything // min(count, everything)
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
