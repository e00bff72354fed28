"""The command line: one file a command, registered here."""

import sys

import typer
from typer.exceptions import TyperException

from lorakit import __version__
from lorakit.cli import data, doctor, eval, generate, merge, methods, plan, recipes, train
from lorakit.cli.screen import Screen, usage

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
    """Run the command line and leave with its exit code; with `--json` tell wrong usage in it."""
    try:
        code = app(prog_name="lorakit", standalone_mode="--json" not in sys.argv)
    except TyperException as error:
        Screen("usage", json=True).fail(usage(error.format_message(), "lorakit --help"))
        code = error.exit_code
    sys.exit(code)
