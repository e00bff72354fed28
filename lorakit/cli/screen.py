"""Where a command writes: the result on stdout; progress, warnings and errors on stderr.

Nothing secret, and nothing that moves the cursor, comes through; `--json` makes one document.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorakit import __version__, environment
from lorakit.cli.streams import write_result
from lorakit.errors import (
    BUG_EXIT_CODE,
    BUG_ID,
    BadInput,
    LorakitError,
    Notice,
    RecipeError,
)
from lorakit.storage.disk import append_line
from lorakit.storage.redact import printable, redact

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lorakit.recipe.sections import Recipe

Color = Literal["auto", "always", "never"]

# Errors about what a key of the recipe names, raised where no recipe is known.
_NAMED = {"model.not-found": ("model", "path")}


class Screen:
    """Where a command writes: the result on stdout, everything else on stderr."""

    def __init__(
        self,
        name: str,
        *,
        json: bool = False,
        quiet: bool = False,
        debug: bool = False,
        strict: bool = False,
        offline: bool = False,
        color: Color = "auto",
    ) -> None:
        from lorakit.cli.console import Console

        self.name, self.json, self.quiet, self.debug, self.strict = name, json, quiet, debug, strict
        self.offline = offline or environment.offline()
        plain = color == "never" or (
            color == "auto" and environment.variable("NO_COLOR") is not None
        )
        forced = color == "always"
        self.out = Console(sys.stdout, plain=plain, forced=forced)
        self.err = Console(sys.stderr, plain=plain, forced=forced)
        self.notices: list[Notice] = []
        self.recipe: Recipe | None = None  # once it is read
        self._log: Path | None = None
        self._unlogged: list[str] = []

    @property
    def live(self) -> bool:
        """Tell whether stderr is a terminal that may be redrawn."""
        return sys.stderr.isatty() and not self.err.is_dumb_terminal and not self.quiet

    @property
    def color(self) -> bool:
        """Tell whether stdout may carry colour."""
        return self.out.color_system is not None

    def log_to(self, path: Path) -> None:
        """Add what stderr has shown, and what it will show, plain to this file as well."""
        self._log = path
        self._note(*self._unlogged)

    def say(self, text: str) -> None:
        """Write one line of progress on stderr."""
        text = self._clean(_visible(text))
        self._note(text)
        if not self.quiet:
            self.err.write_line(text)

    def answer(self, text: str, *, progress: bool = False) -> None:
        """Write one line at once, as the handler of a signal may: past the buffer of the stream.

        A line that is being redrawn gives its place to it, and is drawn again below. `progress` is
        what `--quiet` keeps from stderr.
        """
        text = self._clean(_visible(text))
        line = f"\r\x1b[2K{text}\n" if self.live else f"{text}\n"
        if not (progress and self.quiet):
            with suppress(OSError):
                os.write(sys.stderr.fileno(), line.encode())
        self._note(text)

    def notice(self, *notices: Notice) -> None:
        """Show warnings on stderr, once each, and remember them for the JSON document.

        Raises:
            BadInput: with `--strict`, for the first one.
        """
        for notice in notices:
            if notice in self.notices:
                continue
            self.notices.append(notice)
            text = self._clean(
                _block(f"warning[{notice.id}]", notice.message, notice.where, notice.help)
            )
            self._note(text)
            self.err.write_line(text, "yellow")
            if self.strict:
                raise BadInput(
                    "usage.strict",
                    f"--strict: {notice.message}",
                    where=notice.where,
                    help=notice.help,
                )

    def result(
        self,
        shown: "RenderableType",
        data: dict[str, Any],
        *,
        exit: int = 0,
        exact: bool = False,
    ) -> None:
        """Write the result on stdout: as text, or as one JSON document with `--json`.

        A text is `exact` where it is a file's content and not a message about one.
        """
        if self.json:
            self._document(data, exit)
        elif isinstance(shown, str):
            shown = shown if exact else "\n".join(map(_visible, shown.split("\n")))
            shown = self._clean(shown)
            # Not through rich, which would turn `:smile:` and tabs into something else.
            write_result(f"{shown}\n")
        else:
            with self.out.capture() as drawn:
                self.out.print(shown, soft_wrap=True)
            lines = (line.rstrip() for line in drawn.get().splitlines())
            write_result("".join(f"{line}\n" for line in lines))

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Show how far a long work is; yields a function that takes how many more are done."""
        if not self.live:
            self.say(f"{description} …")
            yield lambda _: None
            return
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=self.err, transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda more: bar.advance(task, more)

    def fail(self, error: LorakitError) -> None:
        """Show an error and, with `--json`, write its document."""
        problems = error.problems if isinstance(error, RecipeError) else (error,)
        for problem in problems:
            if self.recipe and not problem.where:
                found = self.recipe.place_of(problem.message)
                named = _NAMED.get(problem.id)
                problem.where = found or (self.recipe.origin.place(*named) if named else None)
            if isinstance(error, RecipeError):
                text = _visible(f"{problem.where}: {problem.message}")
                text += f"; {_visible(problem.help)}" if problem.help else ""
            else:
                text = _block(f"error[{problem.id}]", problem.message, problem.where, problem.help)
            text = self._clean(text)
            self._note(text)
            self.err.write_line(text, "red")
        if self.json:
            described = [self.described(problem) for problem in problems]
            several = {"errors": described} if isinstance(error, RecipeError) else {}
            self._document({"error": described[0], **several}, error.exit_code)

    def trace(self, error: BaseException) -> None:
        """Show where an error came from, with `--debug`."""
        if self.debug:
            self.err.write_line(self._traceback(error))

    def fail_unforeseen(self, error: BaseException) -> None:
        """Report a bug in one line and write the traceback to a file only the user can read."""
        text = self._traceback(error)
        path = Path(f"lorakit-crash-{os.getpid()}.txt")
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(f"lorakit {__version__}, Python {sys.version}\n{text}")
            where = str(path.resolve())
        except OSError:
            where = "nowhere (the working folder cannot be written)"
        summary = self._clean(f"{type(error).__name__}: {error}".splitlines()[0][:300])
        self.err.write_line(f"error[{BUG_ID}]: {summary}", "red")
        self.err.write_line(f"  help:  this is a bug in lorakit; the traceback is in {where}")
        if self.json:
            self._document({"error": {"id": BUG_ID, "message": summary}}, BUG_EXIT_CODE)

    def _document(self, data: dict[str, Any], exit: int) -> None:
        warnings = [{"id": n.id, "message": n.message} for n in self.notices]
        document = {
            "schema": f"lorakit.{self.name}/1",
            "ok": exit == 0,
            "exit": exit,
            "lorakit_version": __version__,
            "warnings": warnings,
            **data,
        }
        # Text by text: what is hidden in the written document could take a quote along.
        cleaned = _mapped(json.loads(json.dumps(document, default=str)), self._clean)
        write_result(json.dumps(cleaned, indent=2) + "\n")

    def described(self, error: LorakitError) -> dict[str, Any]:
        """Return an error as it stands in the JSON document."""
        where = error.where
        return {
            "id": error.id,
            "message": error.message,
            "hint": error.help,
            "file": where.file if where else None,
            "line": where.line if where else None,
            "column": where.column if where else None,
        }

    def _traceback(self, error: BaseException) -> str:
        return self._clean("".join(traceback.format_exception(error)))

    def _clean(self, text: str) -> str:
        return redact(text, environment.all_variables())

    def _note(self, *texts: str) -> None:
        if self._log is None:
            self._unlogged += texts
            return
        for text in texts:
            # A full disk must not hide what is being said of it.
            with suppress(LorakitError):
                append_line(self._log, text)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with every text and key in it changed."""
    if isinstance(value, dict):
        return {change(key): _mapped(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [_mapped(one, change) for one in value]
    return change(value) if isinstance(value, str) else value


def usage(message: str, help: str | None = None) -> BadInput:
    """Make the error for arguments that do not fit together."""
    return BadInput("usage", message, help=help)


def _block(head: str, message: str, where: object, help: str | None) -> str:
    lines = [f"{head}: {message}"]
    if where:
        lines.append(f"  where: {where}")
    if help:
        lines.append(f"  help:  {help}")
    return "\n".join(map(_visible, lines))


def _visible(text: str) -> str:
    """Return a text that cannot move the cursor or hide: names come from files and strangers."""
    return printable(text, 12 * len(text) + 1)
