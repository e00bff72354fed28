"""`lorakit recipes`: list, show, copy and check recipes, and print their schema. Without torch.

Only `validate` loads the adapter methods, for their settings; the others know them from the
shipped schema.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit import environment
from lorakit.cli import completing
from lorakit.cli.command import command
from lorakit.cli.screen import Screen
from lorakit.errors import BadInput, RecipeError

if TYPE_CHECKING:
    from lorakit.recipe.reader import Foreign, Settings
    from lorakit.recipe.sections import Recipe, Source

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


Name = Annotated[
    str,
    typer.Argument(help="A packaged recipe, or a recipe file.", autocompletion=completing.recipes),
]


@app.command("list")
@command
def recipes_list(screen: Screen) -> None:
    """List the recipes that come with lorakit."""
    from lorakit.recipe import files, schema

    rows = []
    for name, path in files.packaged_recipes().items():
        recipe = _read(str(path), schema.settings_for)
        row = {
            "name": name,
            "model": recipe.model.path,
            "method": recipe.adapter.method,
            "data": ", ".join(source.path for source in recipe.data.train),
            "description": _description(recipe),
        }
        rows.append({**row, "path": str(path)})
    screen.result("\n".join(_columns(rows)), {"recipes": rows})


@app.command("show")
@command
def recipes_show(
    screen: Screen,
    name: Name,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="What it comes to, with the origin of each value.")
    ] = False,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="The keys that it leaves at their default, too.")
    ] = False,
) -> None:
    """Print a recipe: its file, or what the file comes to."""
    from lorakit.recipe import files, schema
    from lorakit.recipe.dump import dump

    path = files.locate(name)
    if resolved or defaults:
        recipe = _read(str(path), schema.settings_for)
        text = dump(recipe, defaults=defaults, origins=resolved)
    else:
        text = files.decode(files.read_bytes(path), path)
    screen.result(text.removesuffix("\n"), {"path": str(path), "text": text}, exact=True)


@app.command("copy")
@command
def recipes_copy(
    screen: Screen,
    name: Annotated[
        str, typer.Argument(help="A packaged recipe.", autocompletion=completing.names)
    ],
    destination: Annotated[
        str, typer.Argument(help="A file, or a folder (FOLDER/); by default the working folder.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace files.")] = False,
) -> None:
    """Copy a packaged recipe, with the files that it names, to edit it."""
    from lorakit.recipe import files
    from lorakit.storage.publish import publish_file

    path = files.packaged_recipes().get(name) or files.locate(name)
    target = Path(destination)
    if os.path.isdir(target) or destination.endswith("/"):
        target /= path.name
    copies = {target: files.read_bytes(path)}
    for local in _local_files(copies[target], path):
        copies[target.parent / local] = (path.parent / local).read_bytes()
    changed = {to: data for to, data in copies.items() if not _holds(to, data)}
    for to in changed:
        if os.path.exists(to) and not force:
            message = "there is such a file already"
            raise BadInput("output.not-empty", message, where=str(to), help="--force replaces it")
    for to, data in changed.items():
        publish_file(to, data, replace=True)
    shown = [str(to) for to in copies]
    screen.result("\n".join(shown), {"path": str(target), "copied": shown})


@app.command("validate")
@command
def recipes_validate(
    screen: Screen, recipes: Annotated[list[str], typer.Argument(help="Recipe files or names.")]
) -> None:
    """Check recipes and the files that they name, and report every problem of all of them."""
    from lorakit import adapters

    problems: list[BadInput] = []
    for name in recipes:
        try:
            found = list(_absent(_read(name, adapters.settings_for, adapters.foreign)))
        except RecipeError as error:
            found = list(error.problems)
        except BadInput as error:
            found = [error]
        if not found:
            screen.say(f"{name}: valid")
        problems += found
    if problems:
        raise RecipeError(problems)
    screen.result(f"{len(recipes)} valid", {"recipes": recipes})


@app.command("schema")
@command
def recipes_schema(
    screen: Screen,
    key: Annotated[str, typer.Argument(help="One key, such as train.learning_rate.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="Write it to this file.")] = None,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from lorakit.recipe import reference, schema
    from lorakit.storage.publish import publish_file

    found = schema.shipped()
    found = reference.field(found, key) if key else found
    text = schema.written(found)
    if out:
        publish_file(out, text.encode(), replace=True)
        screen.result(str(out), {"path": str(out)})
    else:
        screen.result(text.removesuffix("\n"), {"json_schema": found}, exact=True)


def _read(name: str, settings_for: "Settings", foreign: "Foreign" = dict) -> "Recipe":
    from lorakit.recipe.reader import read

    return read(name, settings_for, environ=environment.all_variables(), foreign=foreign)


def _absent(recipe: "Recipe") -> Iterator[BadInput]:
    """Yield a problem for each file that a recipe names and that is not there, at its line.

    What may be the id of a model or a data set is not looked for on the hub.
    """
    from lorakit.data.source import check_found
    from lorakit.model.local import check
    from lorakit.recipe import files
    from lorakit.recipe.yaml_nodes import Path as Keys
    from lorakit.recipe.yaml_nodes import dotted

    folder, cache = recipe.origin.folder, environment.cache_folder()
    checks: list[tuple[Keys, Callable[[], object]]] = [
        (("model", "path"), partial(check, recipe.model.path, folder, cache))
    ]
    if recipe.data.chat_template.endswith(".jinja"):
        template = partial(files.given, recipe.data.chat_template, folder)
        checks.append((("data", "chat_template"), template))
    held_out = () if isinstance(recipe.data.eval, float) else recipe.data.eval
    sources: dict[Keys, tuple[Source, ...] | None] = {
        ("data", "train"): recipe.data.train,
        ("data", "eval"): held_out,
        ("eval", "data"): recipe.eval.data,
    }
    for key, several in sources.items():
        for at, source in enumerate(several or ()):
            ways = ((*key, at, "path"), (*key, at), (*key, "path"))  # to write a source
            written = next((way for way in ways if way in recipe.origin.places), key)
            checks.append((written, partial(check_found, source, folder)))
    for path, look in checks:
        try:
            look()
        except BadInput as error:
            place = f": {error.where}" if error.where else ""
            message = f"{dotted(path)}: {error.message}{place}"
            where = recipe.origin.place(*path)
            yield BadInput(error.id, message, where=where, help=error.help)


def _columns(rows: list[dict[str, str]]) -> list[str]:
    """Line the rows up; a table that shortens names would be no use to a script."""
    keys = ("name", "model", "method", "data", "description")
    widths = {key: max((len(row[key]) for row in rows), default=0) for key in keys}
    return ["  ".join(row[key].ljust(widths[key]) for key in keys).rstrip() for row in rows]


def _description(recipe: "Recipe") -> str:
    """Return the first comment of a recipe that is no instruction to an editor."""
    lines = recipe.origin.text.decode().splitlines()
    comments = (line.lstrip("# ") for line in lines if line.startswith("#"))
    return next((text for text in comments if text and "yaml-language-server" not in text), "")


def _local_files(data: bytes, path: Path) -> list[str]:
    """Return the relative paths of the files below its own folder that a recipe names."""
    from lorakit.recipe import files
    from lorakit.recipe.layers import long_model
    from lorakit.recipe.yaml_nodes import parse

    root, _ = parse(files.decode(data, path), str(path))
    found: list[str] = []
    for keys, node in long_model(root).walk() if root else ():
        if isinstance(node.value, str) and files.is_path_key(keys):
            inside = not Path(node.value).is_absolute() and ".." not in Path(node.value).parts
            found += [node.value] if inside and (path.parent / node.value).is_file() else []
    return list(dict.fromkeys(found))


def _holds(path: Path, data: bytes) -> bool:
    return os.path.isfile(path) and path.read_bytes() == data
