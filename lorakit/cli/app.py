"""The command line: one file a command, registered here."""

import gc
import sys

import typer
from typer.exceptions import TyperException

from lorakit import __version__
from lorakit.cli import data, doctor, eval, generate, merge, methods, plan, recipes, train
from lorakit.cli.screen import Screen, usage
from lorakit.cli.streams import replace_closed, result_errors, silence, write_result
from lorakit.errors import BadInput, RunFailed
from lorakit.processes import start_again, tunables
from lorakit.storage.redact import printable

app = typer.Typer(
    help="LoRA fine-tuning from a YAML recipe, from plan to verified merge.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode=None,
)

for module in (train, plan, eval, merge, generate):
    app.command()(getattr(module, module.__name__.rpartition(".")[2]))
app.add_typer(data.app, name="data", help="Look at the rows a recipe trains on.")
app.add_typer(recipes.app, name="recipes", help="List, show, copy and check recipes.")
app.command()(methods.methods)
app.command()(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_version, help="Print the version."
    ),
) -> None:
    """LoRA fine-tuning from a YAML recipe, from plan to verified merge."""


def main() -> None:
    """Run the command line and leave with its exit code; wrong usage is told as any other error."""
    if sys.argv[1:2] in (["train"], ["merge"]) or "--measure" in sys.argv:
        start_again(tunables())
    replace_closed()
    code = 0
    try:
        with result_errors():  # of --help and --version: commands catch their own
            code = _run()
        write_result()
    except BrokenPipeError:
        silence(sys.stdout)
    except RunFailed as error:
        Screen("lorakit").fail(error)
        code = error.exit_code
    gc.freeze()  # the process ends: nobody needs the garbage found among a million objects
    sys.exit(code)


def _run() -> int:
    try:
        return int(app(prog_name="lorakit", standalone_mode=False) or 0)
    except TyperException as error:
        # Typer keeps this class to itself. A command that was only named wants to be explained.
        if type(error).__name__ == "NoArgsIsHelpError":
            write_result(f"{error.format_message()}\n")
            return error.exit_code
        Screen("usage", json="--json" in sys.argv).fail(_usage(error))
        return error.exit_code


def _usage(error: TyperException) -> BadInput:
    """Say what is wrong with a command line, and with which word of it."""
    message = error.format_message().removesuffix(".")
    if details := getattr(error.__cause__, "errors", None):  # pydantic's, of a value's type
        message += f", got '{printable(str(details()[0]['input']))}'"
    if "extra argument" in message and "=" in message:
        return usage(message, "a key of the recipe is changed by --set KEY=VALUE")
    context = getattr(error, "ctx", None)
    return usage(message, f"{context.command_path if context else 'lorakit'} --help")
