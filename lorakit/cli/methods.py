"""`lorakit methods`: the adapter methods, read from their files."""

from typing import Annotated, Any

import typer

from lorakit import adapters
from lorakit.cli.command import command
from lorakit.cli.screen import Screen


@command
def methods(
    screen: Screen, name: Annotated[str, typer.Argument(help="One method, with its settings.")] = ""
) -> None:
    """List the adapter methods, or show one with its settings."""
    from rich.table import Table

    if name:
        _one(screen, name)
        return
    rows: list[dict[str, Any]] = [
        {
            "name": one,
            "summary": adapters.summary(one),
            "paper": adapters.paper(one),
            "servable": adapters.servable(one),
        }
        for one in adapters.names()
    ]
    table = Table("method", "arXiv", "servable by", "what it does", box=None, pad_edge=False)
    for row in rows:
        readers = ", ".join(r for r, said in row["servable"].items() if said == "yes")
        table.add_row(row["name"], row["paper"], readers, row["summary"])
    screen.result(table, {"methods": rows})


def _one(screen: Screen, name: str) -> None:
    from rich.table import Table

    from lorakit.recipe.expected import describe, variants

    method = adapters.get(name)
    schema = method.Settings.model_json_schema()
    settings: list[dict[str, Any]] = [
        {
            "key": key,
            "value": describe(variants(schema["properties"][key], schema)),
            "default": field.get_default(call_default_factory=True),
            "description": field.description,
        }
        for key, field in method.Settings.model_fields.items()
        if key != "method"
    ]
    table = Table("key", "value", "default", "description", box=None, pad_edge=False)
    for row in settings:
        table.add_row(row["key"], row["value"], _shown(row["default"]), row["description"])
    facts: dict[str, Any] = {
        "name": name,
        "summary": adapters.summary(name),
        "paper": adapters.paper(name),
        "mergeable": method.mergeable,
        "packs": method.packs,
        "servable": adapters.servable(name),
    }
    lines = [
        f"{name}: {facts['summary']}",
        f"arXiv {facts['paper']}   merges into the base: {'yes' if method.mergeable else 'no'}   "
        f"trains on packed rows: {'yes' if method.packs else 'no'}",
        "servable by   " + " · ".join(" ".join(one) for one in facts["servable"].items()),
    ]
    if not screen.json:
        for line in lines:
            screen.out.write_line(line)
    screen.result(table, {"methods": [{**facts, "settings": settings}]})


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value)
