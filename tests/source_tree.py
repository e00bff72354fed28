"""The package as syntax trees, for the tests that read the code instead of running it."""

import ast
import re
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One imported name: `module` is all of it that is known to be a module.

    `function` is the one that it stands in; it never runs below `if TYPE_CHECKING`.
    """

    module: str
    name: str
    place: str
    function: str | None
    runs: bool = True

    @property
    def package(self) -> str:
        return self.module.split(".")[0]


@dataclass(frozen=True, eq=False)
class Module:
    """One file of the package."""

    path: Path

    @cached_property
    def file(self) -> str:
        return self.path.relative_to(ROOT / "lorakit").as_posix()

    @cached_property
    def name(self) -> str:
        return ".".join(("lorakit", *self.file.removesuffix(".py").split("/"))).removesuffix(
            ".__init__"
        )

    @property
    def room(self) -> str:
        return room_of(self.name)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def functions(self) -> list[Function]:
        return [node for node in self.nodes if isinstance(node, Function)]

    def at(self, node: ast.AST) -> str:
        return f"lorakit/{self.file}:{node.lineno}"

    @cached_property
    def imports(self) -> list[Import]:
        inside = {id(n): f.name for f in self.functions for n in ast.walk(f)}
        idle = {
            id(n)
            for branch in self.nodes
            if isinstance(branch, ast.If) and dotted(branch.test) == "TYPE_CHECKING"
            for n in ast.walk(branch)
        }
        return [
            Import(module, name, self.at(node), inside.get(id(node)), id(node) not in idle)
            for node in self.nodes
            for module, name in imported(node)
        ]

    @cached_property
    def texts(self) -> list[ast.Constant]:
        """String constants that are no docstrings."""
        docstrings = {
            id(node.value)
            for node in self.nodes
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        return [
            node
            for node in self.nodes
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ]


def imported(node: ast.AST) -> list[tuple[str, str]]:
    """Return the modules and names that a node imports; `import_module("x")` imports too."""
    match node:
        case ast.Import():
            return [(alias.name, alias.name) for alias in node.names]
        case ast.ImportFrom():
            source = node.module or "."
            full = [(f"{source}.{alias.name}", alias.name) for alias in node.names]
            return [(module if module in MODULES else source, name) for module, name in full]
        case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
            return [(name, "")] if dotted(function).endswith("import_module") else []
    return []


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


MODULES = {module.name: module for module in map(Module, sorted((ROOT / "lorakit").rglob("*.py")))}
METHODS = {path.stem for path in (ROOT / "lorakit/adapters").glob("[a-z]*.py")}


def declared(extra: str | None = None) -> set[str]:
    """Return the import names of the dependencies, or of one extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"][extra] if extra else project["dependencies"]
    names = {re.match(r"[\w.-]+", entry)[0].lower() for entry in wanted}
    special = {"pyyaml": "yaml", "mlflow-skinny": "mlflow"}
    return {special.get(name, name.replace("-", "_")) for name in names}


EXTRAS = {
    name
    for extra in "eval lm-eval gguf kernels tensorboard wandb mlflow sweep".split()
    for name in declared(extra)
}


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` for a name or an attribute of names, else an empty text."""
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return node.id if isinstance(node, ast.Name) else ""
