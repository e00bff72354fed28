"""What every command shares: its options, its signals, and one message and exit code an error.

`@command` adds the common options to a function, hands it a `Screen` as its first argument and
turns what it raises into one message.
"""

import gc
import inspect
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit import environment
from lorakit.cli import completing
from lorakit.cli.screen import Color, Screen
from lorakit.cli.streams import silence
from lorakit.errors import BUG_EXIT_CODE, LorakitError
from lorakit.processes import Signalled, end_by, raising_on_signals
from lorakit.storage.disk import storage_error

RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="A recipe file, the name of a packaged one, or the folder of a run.",
        autocompletion=completing.recipes,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Change one key of the recipe; repeatable.",
        autocompletion=completing.keys,
    ),
]
AdapterArgument = Annotated[
    Path,
    typer.Argument(
        help="An adapter's folder, or a run's.",
        autocompletion=completing.adapters,
    ),
]
AllowRemoteCode = Annotated[
    bool, typer.Option("--allow-remote-code", help="Let the model's own code run.")
]
AllowLocalCode = Annotated[
    bool, typer.Option("--allow-local-code", help="Let a module:function named by the recipe run.")
]

# Imports make a million objects that stay. Python's own pace, a look for garbage every 700 new
# objects, takes a fifth of a start.
COLLECT_EVERY = 20_000


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a Typer command of a function whose first parameter is the `Screen`."""

    def run(
        *,
        json: Annotated[
            bool, typer.Option("--json", help="Print one JSON document on stdout.")
        ] = False,
        quiet: Annotated[
            bool, typer.Option("--quiet", "-q", help="No progress on stderr.")
        ] = False,
        debug: Annotated[
            bool, typer.Option("--debug", help="Show the traceback of an error.")
        ] = False,
        strict: Annotated[bool, typer.Option("--strict", help="Treat warnings as errors.")] = False,
        offline: Annotated[
            bool, typer.Option("--offline", help="Never reach the network.")
        ] = False,
        color: Annotated[Color, typer.Option("--color", help="Colour of the output.")] = "auto",
        **arguments: Any,
    ) -> None:
        screen = Screen(
            function.__name__,
            json=json,
            quiet=quiet,
            debug=debug,
            strict=strict,
            offline=offline,
            color=color,
        )
        environment.quiet_libraries(offline=screen.offline)
        gc.set_threshold(COLLECT_EVERY)
        try:
            with raising_on_signals(), _libraries_silent(debug=debug):
                function(screen, **arguments)
        except LorakitError as error:
            screen.trace(error)
            screen.fail(error)
            raise typer.Exit(error.exit_code) from None
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as error:
            # What was begun is cleaned up; the parent sees the signal, as of any program.
            end_by(error.signal if isinstance(error, Signalled) else signal.SIGINT)
        except BrokenPipeError:
            # The reader of stdout has gone; nobody is left to tell.
            silence(sys.stdout)
            raise typer.Exit(0) from None
        except OSError as error:
            # The file system's answer to what somebody gave: no bug, wherever it came up.
            told = storage_error(error, Path(os.fsdecode(error.filename or ".")))
            screen.trace(error)
            screen.fail(told)
            raise typer.Exit(told.exit_code) from None
        except SystemExit:
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            screen.trace(error)
            screen.fail_unforeseen(error)
            raise typer.Exit(BUG_EXIT_CODE) from None

    own = list(inspect.signature(function).parameters.values())[1:]
    common = [p for p in inspect.signature(run).parameters.values() if p.kind is p.KEYWORD_ONLY]
    signature = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *common)])
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = signature  # type: ignore[attr-defined]  # what Typer reads
    run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return run


@contextmanager
def _libraries_silent(*, debug: bool) -> Iterator[None]:
    """Keep the warnings of libraries off the terminal; lorakit's own are notices."""
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
        yield
