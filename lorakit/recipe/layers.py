"""A recipe's files as one tree: `extends` and `${VAR}`.

Relative paths of the tree are relative to the main recipe's folder: those that an extended file
of another folder gives are rewritten.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from lorakit.errors import BadInput, Place, RecipeError
from lorakit.recipe import files
from lorakit.recipe.yaml_nodes import UNSAFE, Node, parse, problem
from lorakit.recipe.yaml_nodes import Path as Keys
from lorakit.storage.redact import is_secret

MAX_FILES = 32

_VARIABLE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)\}|\$\{")


@dataclass
class Layers:
    """Reads files into one tree and collects the problems that leave one.

    `folder` is the main recipe's.
    """

    folder: Path
    environ: Mapping[str, str]
    problems: list[BadInput] = field(default_factory=list)
    files: int = 0
    texts: dict[str, str] = field(default_factory=dict)

    def load(self, path: Path, data: bytes, above: tuple[Path, ...] = ()) -> Node:
        """Read a recipe and all it extends; `above` are the files that extend it.

        Raises:
            BadInput: when a file leaves no tree.
        """
        self.files += 1
        if self.files > MAX_FILES:
            message = f"a recipe is made of at most {MAX_FILES} files"
            raise BadInput("recipe.too-large", message, where=str(path))
        self.texts[str(path)] = text = files.decode(data, path)
        root, problems = parse(text, str(path))
        self.problems += problems
        place, entries = _mapping(root, path)
        extends = entries.pop("extends", None)
        root = long_model(self.expand(Node(entries, place)))
        if path.parent != self.folder:
            root = files.moved(root, path.parent, self.folder)
        for base in reversed(self._bases(extends, path, above)):
            root = merge(base, root)
        return root

    def expand(self, root: Node, below: Keys = ()) -> Node:
        """Replace `${VAR}` in all text of a tree that stands at `below`; `$${` means `${`."""

        def change(keys: Keys, node: Node) -> Node:
            if not isinstance(node.value, str) or "${" not in node.value:
                return node
            wrong: list[BadInput] = []
            values = partial(self._value, keys=keys, place=node.place, wrong=wrong)
            text = _VARIABLE.sub(values, node.value)
            self.problems += wrong
            return replace(node, value=text, broken=bool(wrong))

        return root.mapped(change, below)

    def _bases(self, extends: Node | None, path: Path, above: tuple[Path, ...]) -> list[Node]:
        """Read what a file extends; an entry that is wrong is a problem at its place."""
        if extends is None:
            return []
        extends = self.expand(extends, ("extends",))
        chain = (*above, path.resolve())
        bases = []
        for entry in extends.value if isinstance(extends.value, list) else [extends]:
            try:
                if not entry.broken:
                    found = self._extended(entry, path.parent, chain)
                    bases.append(self.load(found, files.read_bytes(found), chain))
            except RecipeError:
                raise
            except BadInput as error:
                wrong = BadInput(
                    error.id, f"extends: {error.message}", where=entry.place, help=error.help
                )
                self.problems.append(wrong)
        return bases

    def _extended(self, entry: Node, folder: Path, chain: tuple[Path, ...]) -> Path:
        if not isinstance(entry.value, str) or not entry.value:
            message = "expected a path, the name of a packaged recipe, or a list of them"
            raise BadInput("recipe.wrong-type", message)
        found = files.locate(entry.value, folder)
        if found.resolve() in chain:
            names = " → ".join(path.name for path in (*chain, found))
            raise BadInput("recipe.extends-cycle", f"the recipe extends itself: {names}")
        return found

    def _value(self, found: re.Match[str], keys: Keys, place: Place, wrong: list[BadInput]) -> str:
        """Return what one match of `_VARIABLE` stands for, or add what is wrong with it."""
        name = found[1]
        if found[0] == "$${":
            return "${"
        if not name:
            help = "write $${ for a literal ${"
            wrong.append(
                problem("unset-variable", keys, "this '${' begins no ${NAME}", place, help)
            )
        elif is_secret(name):
            help = "a recipe holds no secrets; lorakit reads HF_TOKEN from the environment itself"
            sentence = f"${{{name}}} is named like a secret: not expanded"
            wrong.append(problem("secret", keys, sentence, place, help))
        elif name not in self.environ:
            help = f"set it, or write $${{{name}}} for this very text"
            wrong.append(problem("unset-variable", keys, f"${{{name}}} is not set", place, help))
        elif UNSAFE.search(self.environ[name]):
            wrong.append(problem("encoding", keys, f"${{{name}}} is not UTF-8 text", place))
        else:
            return self.environ[name]
        return ""


def merge(base: Node, over: Node) -> Node:
    """Lay one tree over another: mappings merge, everything else is replaced."""
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    merged = dict(base.value)
    for key, node in over.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return replace(over, value=merged)


def long_model(root: Node) -> Node:
    """Turn `model: PATH` into `model: {path: PATH}`, so that recipes merge key by key."""
    model = root.child("model")
    if model is None or not isinstance(model.value, str) or not isinstance(root.value, dict):
        return root
    long = replace(model, value={"path": model}, broken=False)
    return replace(root, value={**root.value, "model": long})


def _mapping(root: Node | None, path: Path) -> tuple[Place, dict[str, Node]]:
    if root is None:
        message = "the recipe is empty; it needs the keys model and data"
        raise RecipeError([BadInput("recipe.empty", message, where=str(path))])
    if isinstance(root.value, dict):
        return root.place, dict(root.value)
    kind = {str: "text", bool: "a boolean", list: "a list"}.get(type(root.value), "a number")
    message = f"a recipe is a mapping of keys to values, found {kind}"
    raise RecipeError([BadInput("recipe.not-a-mapping", message, where=root.place)])
