"""YAML text as a tree of nodes that know their places.

A small, strict part of YAML: mappings, lists and scalars of one document. Tags, anchors, aliases
and keys that are no text are refused, a key given twice is an error, and only YAML 1.2's null,
true, false, integers and floats are anything but text: `2e-4` is a number, `no`, `010`, `12:30`
and dates are text. PyYAML scans; what its scanner means is decided here.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import yaml

from lorakit.errors import BadInput, Place, RecipeError
from lorakit.storage.redact import printable

MAX_DEPTH = 64
MAX_NODES = 10_000
MAX_DIGITS = 100

Scalar: TypeAlias = bool | int | float | str | None
Path: TypeAlias = tuple[str | int, ...]

_WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(
    r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_NAMED_FLOAT = re.compile(r"\.(inf|nan)", re.IGNORECASE)
_OLD_OCTAL = re.compile(r"[-+]?0[0-9]+")
UNSAFE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Node:
    """A value, where it starts, and where its key starts if it has one.

    A broken node has been reported already: its value is not to be judged again.
    """

    value: "Scalar | list[Node] | dict[str, Node]"
    place: Place
    key: Place | None = None
    broken: bool = False

    @property
    def at(self) -> Place:
        """Where to look for it: a mapping is best found by its key."""
        return self.key if self.key and isinstance(self.value, dict) else self.place

    @property
    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain for node in self.value]
        return self.value

    def walk(self, path: Path = ()) -> "Iterator[tuple[Path, Node]]":
        """Yield this node and all below it with their paths, parents first."""
        yield path, self
        if isinstance(self.value, dict):
            for key, node in self.value.items():
                yield from node.walk((*path, key))
        elif isinstance(self.value, list):
            for index, node in enumerate(self.value):
                yield from node.walk((*path, index))

    def mapped(self, change: "Callable[[Path, Node], Node]", path: Path = ()) -> "Node":
        """Return this tree with every scalar changed; `change` is given its path and node."""
        if isinstance(self.value, dict):
            entries = {key: node.mapped(change, (*path, key)) for key, node in self.value.items()}
            return replace(self, value=entries)
        if isinstance(self.value, list):
            items = [node.mapped(change, (*path, index)) for index, node in enumerate(self.value)]
            return replace(self, value=items)
        return change(path, self)

    def child(self, key: object) -> "Node | None":
        """Return what stands at a key or an index, None where there is nothing."""
        if isinstance(self.value, dict) and isinstance(key, str):
            return self.value.get(key)
        if isinstance(self.value, list) and type(key) is int and 0 <= key < len(self.value):
            return self.value[key]
        return None


def parse(text: str, file: str, *, located: bool = True) -> tuple[Node | None, list[BadInput]]:
    """Read one document: its root (None when it is empty) and the problems that leave a tree.

    Every place names `file`, with line and column when `located`.

    Raises:
        RecipeError: for what leaves no tree: bad syntax, a tag, an anchor, several documents,
            a tree deeper than 64 or of more than 10,000 nodes.
    """
    walk = _Walk(file, located)
    try:
        walk.loader = yaml.SafeLoader(text)
        root = walk.document()
    except yaml.YAMLError as error:
        raise RecipeError([_syntax_problem(error, text, walk.place)]) from None
    except ValueError:
        # PyYAML lets int() and chr() fail on absurd directives and escapes.
        sentence = "an escape or a directive is out of range"
        raise walk.error("syntax", sentence, walk.loader.get_mark()) from None
    return root, walk.problems


def resolve(text: str) -> Scalar:
    """Return what a plain scalar means; text that means nothing else is itself.

    Raises:
        OverflowError: for a number of more than 100 digits.
    """
    if text in _WORDS:
        return _WORDS[text]
    is_integer = _INTEGER.fullmatch(text)
    if not is_integer and (_OLD_OCTAL.fullmatch(text) or not _FLOAT.fullmatch(text)):
        return text
    if len(text) > MAX_DIGITS:
        raise OverflowError(f"a number of {len(text)} characters; at most {MAX_DIGITS} are allowed")
    return int(text) if is_integer else float(_NAMED_FLOAT.sub(r"\1", text))


def dotted(path: Path) -> str:
    """Write a path as users write it: `data.train[0].weight`."""
    shown = ""
    for part in path:
        if isinstance(part, int):
            shown += f"[{part}]"
        else:
            shown += ("." if shown else "") + (printable(part) or "''")
    return shown


def problem(id: str, path: Path, sentence: str, place: Place, help: str | None = None) -> BadInput:
    """Make the error for one key; its name is left out where the place is the key already."""
    name = dotted(path)
    said_already = not name or place.file == f"--set {name}"
    return BadInput(
        f"recipe.{id}", sentence if said_already else f"{name}: {sentence}", where=place, help=help
    )


@dataclass
class _Walk:
    file: str
    located: bool
    problems: list[BadInput] = field(default_factory=list)
    nodes: int = 0
    depth: int = -1  # of keys that are no text, too, which have no path
    loader: Any = None

    def place(self, mark: Any) -> Place:
        """Return the place of PyYAML's mark."""
        if not self.located:
            return Place(self.file)
        return Place(self.file, mark.line + 1, mark.column + 1)

    def error(self, id: str, sentence: str, mark: Any, help: str | None = None) -> RecipeError:
        return RecipeError([BadInput(f"recipe.{id}", sentence, where=self.place(mark), help=help)])

    def document(self) -> Node | None:
        self.loader.get_event()
        if isinstance(self.loader.get_event(), yaml.StreamEndEvent):
            return None
        root = self.node((), None)
        self.loader.get_event()
        event = self.loader.get_event()
        if not isinstance(event, yaml.StreamEndEvent):
            sentence = "a second document starts here; a recipe is one"
            raise self.error("syntax", sentence, event.start_mark)
        return None if root.value is None else root

    def node(self, path: Path, key: Place | None, *, is_key: bool = False) -> Node:
        """Read the value that `path` leads to, or the next key of the mapping there."""
        event = self.loader.get_event()
        deeper = not (is_key and isinstance(event, yaml.ScalarEvent))
        self.depth += deeper
        self.check(event, self.depth)
        place = self.place(event.start_mark)
        if isinstance(event, yaml.ScalarEvent):
            found = self.scalar(event, path, key)
        elif isinstance(event, yaml.SequenceStartEvent):
            entries: list[Node] = []
            while not self.loader.check_event(yaml.SequenceEndEvent):
                entries.append(self.node((*path, len(entries)), None))
            self.loader.get_event()
            found = Node(entries, place, key)
        else:
            found = Node(self.mapping(path), place, key)
        self.depth -= deeper
        return found

    def check(self, event: Any, depth: int) -> None:
        """Refuse what no recipe needs: the price of sharing and typing by YAML is surprise."""
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            kind, sign = ("alias", "*") if isinstance(event, yaml.AliasEvent) else ("anchor", "&")
            help = "write the value out, or share it between recipes with `extends`"
            raise self.error("alias", f"the {kind} {sign}{event.anchor} is refused", mark, help)
        if event.tag is not None:
            tag = repr(event.tag.replace("tag:yaml.org,2002:", "!!"))[1:-1]
            raise self.error("tag", f"the tag {tag} is refused: a recipe is plain YAML", mark)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.error("too-large", f"more than {MAX_NODES:,} values", mark)
        if depth > MAX_DEPTH:
            raise self.error("too-large", f"nested more than {MAX_DEPTH} levels deep", mark)

    def scalar(self, event: yaml.ScalarEvent, path: Path, key: Place | None) -> Node:
        place = self.place(event.start_mark)
        if found := UNSAFE.search(event.value):
            sentence = f"holds the character {found[0]!r}, which is not allowed in text"
            self.problems.append(problem("encoding", path, sentence, place))
            return Node(None, place, key, broken=True)
        try:
            # implicit[0]: the scalar is plain, neither quoted nor a block.
            return Node(resolve(event.value) if event.implicit[0] else event.value, place, key)
        except OverflowError as error:
            self.problems.append(problem("too-large", path, f"is {error}", place))
            return Node(None, place, key, broken=True)

    def mapping(self, path: Path) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not self.loader.check_event(yaml.MappingEndEvent):
            key = self.node(path, None, is_key=True)
            if not isinstance(key.value, str):
                if not key.broken:
                    self.bad_key(path, key)
                self.node(path, None)
                continue
            value = self.node((*path, key.value), key.place)
            if first := entries.get(key.value):
                line = f", first on line {first.key.line}" if first.key and first.key.line else ""
                self.problems.append(
                    problem("duplicate-key", (*path, key.value), f"given twice{line}", key.place)
                )
            else:
                entries[key.value] = value
        self.loader.get_event()
        return entries

    def bad_key(self, path: Path, key: Node) -> None:
        if isinstance(key.value, dict | list):
            sentence = "a key must be text, got a list or a mapping"
            help = "put text that starts with [ or { in quotes"
        else:
            written = json.dumps(key.value)
            sentence, help = f"a key must be text, got {written}", f"put {written} in quotes"
        self.problems.append(problem("bad-key", path, sentence, key.place, help))


# What PyYAML says, and what that means to somebody who has written a recipe.
_SYNTAX = {
    "mapping values are not allowed here": "a ': ' is not allowed here; quote text that holds one, "
    "and check the indentation",
    "could not find expected ':'": "expected 'key: value'",
    "while parsing a block mapping": "wrong indentation, or a bracket or quote too many",
    "while parsing a block collection": "expected a list entry '- …' at this indentation",
    "expected ',' or ']'": "expected ',' or ']'",
    "expected ',' or '}'": "expected ',' or '}'",
    "while scanning a quoted scalar": "this quote is not closed",
    "unknown escape character": "unknown escape in double quotes; in single quotes \\ is just that",
    "expected chomping or indentation": "'>' and '|' open a block of text; put this in quotes",
    "expected the node content": "a value is missing here",
    "expected '<document start>'": "there is more after the end of the document",
    "that cannot start any token": "a value cannot start with this character; put it in quotes",
}


def _syntax_problem(error: yaml.YAMLError, text: str, place_of: Callable[[Any], Place]) -> BadInput:
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        mark = _mark(before.count("\n"), error.position - before.rfind("\n") - 1)
        character = f"U+{ord(text[error.position]):04X}"
        sentence = f"the control character {character} is not allowed in a recipe"
        return BadInput("recipe.encoding", sentence, where=place_of(mark))
    mark = getattr(error, "problem_mark", None) or _mark(0, 0)
    line = [*text.splitlines(), "", ""][mark.line]
    indentation = line[: len(line) - len(line.lstrip())]
    if "\t" in indentation:
        sentence = f"line {mark.line + 1} is indented with a tab; use spaces"
        place = place_of(_mark(mark.line, indentation.index("\t")))
        return BadInput("recipe.syntax", sentence, where=place)
    said = f"{getattr(error, 'context', None) or ''} {getattr(error, 'problem', '')}".strip()
    sentence = next((ours for theirs, ours in _SYNTAX.items() if theirs in said), said)
    opened = getattr(error, "context_mark", None)
    if opened and opened.line != mark.line:
        sentence += f" (it began on line {opened.line + 1})"
    return BadInput("recipe.syntax", sentence, where=place_of(mark))


def _mark(line: int, column: int) -> Any:
    return yaml.Mark("", 0, line, column, None, 0)
