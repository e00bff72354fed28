"""Bad inputs through the command line, in one process.

`table.tsv` says of each input which error it gets, what the message contains and the exit code; a
row of it has one or more cases, and cases of no row are its neighbours. Every case is given a
working folder with a recipe, rows, a model, and a run with its adapter and checkpoints, spoils what
it is about, and gets: one error, one JSON document and no traceback, its exit code, within two
seconds, and nothing written anywhere.
"""

import csv
import io
import json
import re
import resource
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from lorakit import errors
from lorakit.cli.app import main

SECONDS = 2.0  # of processor time
MINIMAL = "model: model\ndata:\n  train: rows.jsonl\n"
RUN = "runs/recipe"
ADAPTER = f"{RUN}/adapter"


@dataclass(frozen=True)
class Row:
    """A row of the table; `parts` are alternatives, of each of which one must be said."""

    id: str
    error: str
    parts: tuple[tuple[str, ...], ...]
    exit: int | None


def _rows() -> dict[str, Row]:
    found = {}
    with Path(__file__).with_name("table.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            parts = []
            for part in row["message_must_contain"].split(";"):
                quoted = tuple(re.findall('"([^"]*)"', part))
                # What is not in quotes describes a value: the case knows which.
                if re.sub('"[^"]*"|,| or |\\s', "", part) == "":
                    parts += [quoted] if " or " in part else [(one,) for one in quoted]
            exit = int(row["exit"]) if row["exit"].isdigit() else None
            found[row["id"]] = Row(row["id"], row["error_id"], tuple(parts), exit)
    return found


ROWS = _rows()
EXITS = {id: kind.exit_code for kind in errors.LorakitError.__subclasses__() for id in kind.ids}


@dataclass
class World:
    """The working folder of one case."""

    folder: Path
    held: ExitStack = field(default_factory=ExitStack)

    def path(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def change(self, name: str, **changes: Any) -> None:
        """Change keys of a JSON file; `...` takes one out."""
        values = json.loads(self.path(name).read_text()) | changes
        values = {key: value for key, value in values.items() if value is not ...}
        self.write(name, json.dumps(values))


Build = Callable[[World], Sequence[str]]


@dataclass(frozen=True)
class Case:
    """One input: a row's id and what is special about it, or the name of a neighbour.

    `build` spoils the world and returns the command line. `says` are parts of the message, and
    `place` is how the place that it names ends, empty where it names none. `error` is the row's
    where it is not given.
    """

    name: str
    build: Build
    says: tuple[str, ...] = ()
    place: str = ""
    error: str = ""
    seconds: float = SECONDS
    prepares: bool = False  # it comes as far as the rows, which are kept in the cache

    @property
    def row(self) -> Row | None:
        return ROWS.get(self.name.split()[0])


@dataclass(frozen=True)
class Ended:
    """What a command line has come to."""

    exit: int
    document: dict[str, Any]
    stderr: str
    seconds: float

    @property
    def problems(self) -> list[dict[str, Any]]:
        return self.document.get("errors") or [self.document["error"]]


def run(arguments: Sequence[str]) -> Ended:
    """Run a command line with `--json` in the working folder of the process."""
    command, out, err = [*arguments], io.StringIO(), io.StringIO()
    command.insert(command.index("--") if "--" in command else len(command), "--json")
    began = _seconds()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["lorakit", *command])
        with pytest.raises(SystemExit) as ended:
            main()
    seconds = _seconds() - began
    return Ended(int(ended.value.code or 0), json.loads(out.getvalue()), err.getvalue(), seconds)


def shown_without_json(arguments: Sequence[str]) -> tuple[str, str]:
    """Run a command line as a person does; return what stdout and stderr have come to show."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["lorakit", *arguments])
        with pytest.raises(SystemExit):
            main()
    return out.getvalue(), err.getvalue()


def check_refused(case: Case, world: World) -> None:
    """Run a case and check all that its row promises, and what every row does."""
    arguments = case.build(world)
    cache = "cache" if case.prepares else ""
    before = tree(world.folder, cache)
    with world.held:
        ended = run(arguments)
        stdout, stderr = shown_without_json(arguments)
    shown = json.dumps(ended.document, indent=1, ensure_ascii=False)
    id = case.error or (case.row.error if case.row else "")
    first = ended.problems[0] if "error" in ended.document else {}
    assert first.get("id") == id, shown
    assert ended.exit == ended.document["exit"] == EXITS[id], shown
    assert len(ended.problems) == 1, shown
    if case.row:
        assert ended.exit == case.row.exit
    place = ":".join(str(first[key]) for key in ("file", "line", "column") if first[key])
    assert place.endswith(case.place), shown
    assert bool(place) == bool(case.place), shown
    said = f"{place}: {first['message']}; {first['hint']}"
    parts = case.row.parts if case.row else ()
    for part in (*parts, *((one,) for one in case.says)):
        assert any(is_said(one, said) for one in part), (part, said)
    assert first["message"].isprintable(), said
    assert "Traceback" not in ended.stderr
    assert not stdout
    *progress, block = stderr.rpartition(block_of(first, place, several="errors" in ended.document))
    assert (block, "error[" in "".join(progress[:1])) == ("", False), stderr
    assert tree(world.folder, cache) == before
    assert ended.seconds < case.seconds


def block_of(problem: Mapping[str, Any], place: str, *, several: bool) -> str:
    """Return how a problem is shown without `--json`: that of a recipe in one line."""
    message, hint = problem["message"], problem["hint"]
    if several:
        return f"{place}: {message}{f'; {hint}' if hint else ''}\n"
    lines = [f"error[{problem['id']}]: {message}", f"  where: {place}", f"  help:  {hint}"]
    return "".join(f"{line}\n" for line, has in zip(lines, (True, place, hint), strict=True) if has)


def is_said(part: str, said: str) -> bool:
    """Tell whether a text has a part; the table's N and M stand for any number."""
    pattern = re.sub(r"\b[NM]\b", r"[\\d,]+", re.escape(part))
    return re.search(pattern, said) is not None


def tree(folder: Path, without: str = "") -> dict[str, tuple[object, ...]]:
    """Return what is below a folder: names, kinds, modes, and the bytes of files up to 1 MiB."""
    found: dict[str, tuple[object, ...]] = {}
    left_out = set(folder.glob(f"{without}/**/*")) if without else set()
    for path in sorted(set(folder.rglob("*")) - left_out):
        seen = path.lstat()
        found[str(path)] = (seen.st_mode,)
        if stat.S_ISREG(seen.st_mode):
            small = seen.st_size <= 1 << 20
            content = sha256(path.read_bytes()).hexdigest() if small else seen.st_mtime_ns
            found[str(path)] = (seen.st_mode, seen.st_size, content)
    return found


def _seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
