"""How the command line writes to a stream: rich, which only a command that runs waits for."""

from typing import TextIO

import rich.console
from rich.text import Text

from lorakit.cli.streams import silence

WIDE = 10_000  # columns off a terminal: who reads a pipe wants a row on a line


class Console(rich.console.Console):
    """A stream that text goes to as it is, wrapped by the terminal alone."""

    def __init__(self, stream: TextIO, *, plain: bool, forced: bool) -> None:
        """Take a stream; `plain` is without colour, `forced` with colour wherever it leads."""
        super().__init__(
            file=stream,
            no_color=plain,
            force_terminal=True if forced else None,
            color_system=None if plain else "auto",
            markup=False,  # `lorakit[eval]` is text, not a style
            emoji=False,
            highlight=False,
            width=None if stream.isatty() else WIDE,
        )

    def write_line(self, text: str, color: str | None = None) -> None:
        """Write a text; with a colour, what stands before its first colon has that."""
        line = Text(text)
        if color:
            line.stylize(color, 0, len(text.partition(":")[0]))
        try:
            self.print(line, soft_wrap=True)
        except OSError:  # a full disk, or a terminal that is gone
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Go on in silence: nobody reads the lines, but the work is still wanted."""
        silence(self.file)
