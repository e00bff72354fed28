"""Rows that nobody can learn from: id, file and line, and what the message names."""
# ruff: noqa: E501  # a table: one input a line

import gzip
import json
import os
import socket
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.bad_inputs.cases import Case, World, check_refused
from tests.data.given import MISTRAL, ask

GOOD = ask("2 + 2?", "4")
LONG = [ask("word " * 200, "answer") for _ in range(3)]
FILE = "rows.jsonl"


def line(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


def plan(world: World, path: str = FILE, **keys: Any) -> list[str]:
    """Write a recipe with this `data` section."""
    world.write("recipe.yaml", f"model: model\ndata: {json.dumps({'train': path, **keys})}\n")
    return ["plan", "recipe.yaml"]


def content(data: bytes, name: str = FILE, **keys: Any) -> Callable[[World], list[str]]:
    def build(world: World) -> list[str]:
        world.write(name, data)
        return plan(world, name, **keys)

    return build


def rows(*several: Any, **keys: Any) -> Callable[[World], list[str]]:
    return content(b"".join(map(line, several)), **keys)


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "hello"} for role in roles]}


def missing(world: World) -> list[str]:
    return plan(world, "rwos.jsonl")


def alternating(world: World) -> list[str]:
    world.write("mistral.jinja", MISTRAL)
    return rows(chat("user", "user", "assistant"), chat_template="mistral.jinja")(world)


def script(world: World) -> list[str]:
    world.write("rows.py", "raise SystemExit('this ran')")
    return plan(world, "rows.py")


def fifo(world: World) -> list[str]:
    world.path(FILE).unlink()
    os.mkfifo(world.path(FILE))
    return plan(world)


def a_socket(world: World) -> list[str]:
    world.path(FILE).unlink()
    bound = world.held.enter_context(socket.socket(socket.AF_UNIX))
    bound.bind(FILE)  # by its name alone: names of sockets must be short
    return plan(world)


def link(world: World) -> list[str]:
    world.path("link.jsonl").symlink_to("nowhere")
    return plan(world, "link.jsonl")


def bomb(world: World) -> list[str]:
    """Three million rows in a few thousand bytes."""
    column = pyarrow.repeat("a", 3_000_000).dictionary_encode()
    table = pyarrow.table({"prompt": column, "completion": column})
    pyarrow.parquet.write_table(table, world.path("rows.parquet"))
    return plan(world, "rows.parquet")


def template(text: str) -> Callable[[World], list[str]]:
    def build(world: World) -> list[str]:
        world.write("t.jinja", text)
        return rows(*[chat("user", "assistant")] * 3, chat_template="t.jinja")(world)

    return build


SLOWEST = 6.0  # seconds: the start of the process for templates, and what it may take
LIMIT, UNSAFE, ROW = "template.limit", "template.unsafe", "rows.jsonl:1"
GROW = "{% set ns = namespace(x='a' * 1000000) %}{% for i in range(40) %}"
# A template, parts of the message, its place and its id: loops, and texts that become too large.
TEMPLATES = [
    (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        ("2 seconds",),
        ROW,
        LIMIT,
    ),
    (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        ("2 seconds",),
        ROW,
        LIMIT,
    ),
    (GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}", ("memory",), ROW, LIMIT),
    (
        GROW + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
        ("memory",),
        ROW,
        LIMIT,
    ),
    ("{{ 'a'.ljust(10**10) | length }}", ("memory",), ROW, LIMIT),
    ("{{ ('a' * 1000000) | replace('a', 'b' * 1000000) | length }}", ("memory",), ROW, LIMIT),
    ("{{ (['b'] * 1000000) | join('a' * 1000000) | length }}", ("memory",), ROW, LIMIT),
    ("{{ 1.5 | round(10**9, 'floor') }}", ("round",), ROW, LIMIT),
    ("{% include 'other' %}", ("another template",), "t.jinja", UNSAFE),
    (
        "".join("{% for i in [1] %}" for _ in range(30)) + "{% endfor %}" * 30,
        ("nested",),
        "t.jinja",
        "template.syntax",
    ),
    ("{{ '\\ud800' }}", ("surrogate",), ROW, "data.template-refused"),
    ("{{ messages[0].content }}", ("leaves the answers out",), ROW, "data.no-trained-tokens"),
]
CASES = [
    Case("D01", missing, ("rows.jsonl",), "rwos.jsonl"),
    Case("D02", content(b""), (), FILE),
    Case("D03", content(line(GOOD) + b'{"prompt": "\xff"}\n'), ("byte offset 12",), f"{FILE}:2:13"),
    Case("D04", content(gzip.compress(line(GOOD))), (), f"{FILE}:1"),
    Case("D05", content(line(GOOD) + b'{"prompt": "2'), ("not JSON",), f"{FILE}:2:12"),
    Case("D06 comma", content(line(GOOD) + b'{"prompt": "2",}\n'), (), f"{FILE}:2:16"),
    Case("D06 quotes", content(b"{'prompt': '2'}\n"), (), f"{FILE}:1:2"),
    Case("D07", content(line(GOOD) + b"42\n"), ("a number",), f"{FILE}:2"),
    Case("D08", content(line([GOOD, GOOD])), (), f"{FILE}:1"),
    Case("D09 NaN", content(b'{"prompt": "a", "completion": NaN}\n'), ("completion: NaN",), ":1:31"),
    Case("D09 Infinity", content(b'{"prompt": -Infinity}\n'), ("prompt: -Infinity",), ":1:12"),
    Case("D10", rows(GOOD, {"prompt": "x"}, {"prompt": "y"}), ("`completion`", "1 more"), ":2"),
    Case(
        "D11",
        rows({"question": "2 + 2?", "answer": "4"}),
        (
            "columns found: answer, question",
            "columns expected: messages (messages); ",
            "`columns: {prompt: question, completion: answer}`",
        ),
        FILE,
    ),
    Case("D12", rows(GOOD, {"prompt": "x", "completion": None}), ("`completion`",), ":2"),
    Case("D13", rows(ask("a", ""), ask("b", " ")), ("any of 2 rows",), ":1"),
    Case("D14 text", rows({"messages": "hello"}), ("`messages` is text",), ":1"),
    Case("D14 mapping", rows({"messages": {"role": "user"}}), ("`messages` is an object",), ":1"),
    Case("D15", rows(chat("user", "robot")), ("messages[1].role", "robot", "assistant"), ":1"),
    Case("D16", rows(chat("user", "user")), (), ":1"),
    Case("D17", alternating, ("roles must alternate",), ":1"),
    Case("D18", content(b'{"prompt": "' + b"a" * (65 << 20)), (), f"{FILE}:1"),
    Case("D19", rows(*LONG, max_length=16), ("0 usable rows of 3", "longest", "max_length 16"), ":1"),
    Case("D20 script", script, (), "rows.py"),
    Case("D20 FIFO", fifo, ("FIFO",), FILE),
    Case("D20 device", lambda world: plan(world, "/dev/zero"), ("character device",), "/dev/zero"),
    Case("D20 socket", a_socket, ("socket",), FILE),
    Case("number for text", rows(GOOD, {**GOOD, "completion": 4}), ("completion", "number"), ":2",
         "data.wrong-type"),
    Case("turn of a number", rows({"messages": [{"role": "user", "content": "a"},
         {"role": "assistant", "content": 4}]}), ("messages[1].content", "number"), ":1",
         "data.wrong-type"),
    Case("turn of null", rows({"messages": [{"role": "user", "content": None}]}),
         ("messages[0].content",), ":1", "data.null"),
    Case("turn without content", rows({"messages": [{"role": "user"}]}),
         ("messages[0].content",), ":1", "data.missing-field"),
    Case("turn that is a list", rows({"messages": [["user", "hi"]]}), ("messages[0]", "list"),
         ":1", "data.bad-messages"),
    Case("no turns", rows({"messages": []}), ("empty list",), ":1", "data.bad-messages"),
    Case("role of sharegpt", rows({"conversations": [{"from": "robot", "value": "hi"}]}),
         ("conversations[0].from", "robot", "human"), ":1", "data.bad-role"),
    Case("a key twice", content(b'{"prompt": "a", "prompt": "b"}\n'), ("prompt",), ":1:17",
         "data.duplicate-key"),
    Case("unknown format", rows(GOOD, format="mesages"), ("mesages", "did you mean 'messages'"),
         "recipe.yaml:2:41", "recipe.bad-choice"),
    Case("columns of another format", rows(GOOD, format="alpaca"), ("instruction",), FILE,
         "data.missing-column"),
    Case("code without leave", rows(GOOD, format="os:getcwd"), ("--allow-local-code",), "recipe.yaml:2:41",
         "security.local-code"),
    Case("a line of a BOM", content(line(GOOD) + b"\xef\xbb\xbf" + line(GOOD)), (), ":2:1", "data.syntax"),
    Case("half a surrogate pair", content(b'{"prompt": "\\ud800", "completion": "b"}\n'), ("prompt",), ":1:12", "data.encoding"),
    Case("a NUL", content(b'{"prompt": "a\0"}\n'), (), ":1:14", "data.syntax"),
    Case("NUL in CSV", content(b"prompt,completion\na\0,b\n", "rows.csv"), ("NUL",), "rows.csv:2", "data.syntax"),
    Case("nested without end", content(b'{"x":' + b"[" * 1_000_000), ("64",), ":1:69", "data.syntax"),
    Case("a number without end", content(b'{"prompt": ' + b"9" * 5000 + b"}\n"), ("5,000 digits",), ":1:12", "data.syntax"),
    Case("a link to nowhere", link, ("link leads nowhere",), "link.jsonl", "data.not-found"),
    Case("a parquet of very much", bomb, ("3,000,000 rows",), "rows.parquet", "data.too-large"),
    Case("a parquet that is none", content(b"PAR1" + b"\0" * 100 + b"PAR1", "rows.parquet"), ("not parquet",), "rows.parquet", "data.syntax"),
    *(Case(f"template: {text[:40]}", template(text), says, place, error, SLOWEST) for text, says, place, error in TEMPLATES),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.name))
def test_refused(case: Case, world: World) -> None:
    check_refused(case, world)
