"""The two streams of the process: they may be closed, full, or read by nobody."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from lorakit.errors import RunFailed


def replace_closed() -> None:
    """Put the null device in the place of a stream that was closed before the start."""
    if sys.stdout is None or sys.stderr is None:
        nothing = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
        sys.stdout, sys.stderr = sys.stdout or nothing, sys.stderr or nothing


@contextmanager
def result_errors() -> Iterator[None]:
    """Say of an OSError in the block that stdout does not take the result.

    Raises:
        BrokenPipeError: when its reader has gone, who has read all that it wanted.
        RunFailed: `storage.io`.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(sys.stdout)
        message = f"the result could not be written: {error.strerror}"
        raise RunFailed(
            "storage.io", message, where="stdout", help="let it go elsewhere"
        ) from error


def write_result(text: str = "") -> None:
    """Write to stdout, all that it still holds as well.

    Raises:
        BrokenPipeError: when its reader has gone.
        RunFailed: when stdout does not take it.
    """
    with result_errors():
        sys.stdout.write(text)
        sys.stdout.flush()


def silence(stream: IO[str]) -> None:
    """Let nothing more come of a stream, not even an error of what is still to be written."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)
