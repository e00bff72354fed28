"""The two streams of the process: they may be closed, full, or read by nobody."""

import os
import sys
from pathlib import Path
from typing import IO

from lorakit.errors import LorakitError
from lorakit.storage.disk import storage_error


def replace_closed() -> None:
    """Put the null device in the place of a stream that was closed before the start."""
    if sys.stdout is None or sys.stderr is None:
        nothing = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
        sys.stdout, sys.stderr = sys.stdout or nothing, sys.stderr or nothing


def refused(error: OSError) -> LorakitError | None:
    """Write nothing more to stdout; return the error when it would not take the result."""
    silence(sys.stdout)
    # The reader of a pipe that has gone has read all that it wanted.
    return None if isinstance(error, BrokenPipeError) else storage_error(error, Path("stdout"))


def silence(stream: IO[str]) -> None:
    """Let nothing more come of a stream, not even an error of what is still to be written."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)
