"""Every data row of the table of bad inputs: id, place, and what the message must name."""

import gzip
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import BadInput
from tests.data.given import MISTRAL, ask, prepared, rows_file, section, sentencepiece_like
from tests.tiny import tiny_tokenizer

GOOD = ask("2 + 2?", "4")
Made = tuple[Path, dict[str, Any]]


def _bytes(content: bytes) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        path = folder / "rows.jsonl"
        path.write_bytes(content)
        return path, {}

    return make


def _rows(*rows: Any, **keys: Any) -> Callable[[Path], Made]:
    return lambda folder: (rows_file(folder, rows), keys)


def _missing(folder: Path) -> Made:
    rows_file(folder, [GOOD], "train.jsonl")
    return folder / "trian.jsonl", {}


def _script(folder: Path) -> Made:
    path = folder / "rows.py"
    path.write_text("raise SystemExit('this ran')")
    return path, {}


def _fifo(folder: Path) -> Made:
    path = folder / "rows.jsonl"
    os.mkfifo(path)
    return path, {}


def _socket(folder: Path) -> Made:
    path = Path("rows.jsonl")  # the names of sockets must be short
    os.chdir(folder)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
    return path, {}


def _line(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "hello"} for role in roles]}


LONG = [ask("word " * 200, "answer") for _ in range(3)]

# id: (builder, error id, line, what the message or its help must contain)
TABLE: dict[str, tuple[Callable[[Path], Made], str, int | None, tuple[str, ...]]] = {
    "D01": (_missing, "data.not-found", None, ("train.jsonl",)),
    "D02": (_bytes(b""), "data.empty", None, ("empty",)),
    "D03": (_bytes(_line(GOOD) + b'{"prompt": "\xff"}\n'), "data.encoding", 2, ("byte offset 12",)),
    "D04": (_bytes(gzip.compress(_line(GOOD))), "data.compressed", None, ("gzip", ".gz")),
    "D05": (_bytes(_line(GOOD) + b'{"prompt": "2'), "data.syntax", 2, ()),
    "D06a": (_bytes(_line(GOOD) + b'{"prompt": "2",}\n'), "data.syntax", 2, ()),
    "D06b": (_bytes(b"{'prompt': '2'}\n"), "data.syntax", 1, ()),
    "D07": (_bytes(_line(GOOD) + b"42\n"), "data.not-an-object", 2, ("object", "number")),
    "D08": (_bytes(_line([GOOD, GOOD])), "data.not-an-object", 1, (".json", "one object per line")),
    "D09a": (
        _bytes(b'{"prompt": "a", "completion": NaN}\n'),
        "data.not-finite",
        1,
        ("completion", "NaN"),
    ),
    "D09b": (_bytes(b'{"prompt": Infinity}\n'), "data.not-finite", 1, ("prompt", "Infinity")),
    "D10": (
        _rows(GOOD, {"prompt": "x"}, {"prompt": "y"}),
        "data.missing-field",
        2,
        ("completion", "1 more"),
    ),
    "D11": (
        _rows({"question": "2 + 2?", "answer": "4"}),
        "data.missing-column",
        None,
        ("answer, question", "prompt", "columns: {prompt: question, completion: answer}"),
    ),
    "D12": (_rows(GOOD, ask("x", None)), "data.null", 2, ("completion", "null")),  # type: ignore[arg-type]
    "D13": (
        _rows(ask("a", ""), ask("b", " ")),
        "data.no-trained-tokens",
        1,
        ("2 rows", "no tokens to learn"),
    ),
    "D14a": (_rows({"messages": "hello"}), "data.bad-messages", 1, ("messages", "list", "text")),
    "D14b": (
        _rows({"messages": {"role": "user"}}),
        "data.bad-messages",
        1,
        ("messages", "list", "object"),
    ),
    "D15": (
        _rows(_chat("user", "robot")),
        "data.bad-role",
        1,
        ("messages[1].role", "robot", "assistant"),
    ),
    "D16": (_rows(_chat("user", "user")), "data.no-assistant", 1, ("assistant",)),
    "D17": (
        _rows(_chat("user", "user", "assistant")),
        "data.template-refused",
        1,
        ("roles must alternate",),
    ),
    "D18": (_bytes(b'{"prompt": "' + b"a" * (65 << 20)), "data.too-large", 1, ("64 MiB",)),
    "D19": (
        _rows(*LONG, max_length=16),
        "data.too-long",
        1,
        ("0 usable rows of 3", "longest", "16"),
    ),
    "D20a": (_script, "data.not-a-file", None, ("not a regular data file",)),
    "D20b": (_fifo, "data.not-a-file", None, ("not a regular data file",)),
    "D20c": (
        lambda folder: (Path("/dev/zero"), {}),
        "data.not-a-file",
        None,
        ("not a regular data file",),
    ),
    "D20d": (_socket, "data.not-a-file", None, ("not a regular data file",)),
    "type": (_rows(GOOD, ask("x", 4)), "data.wrong-type", 2, ("completion", "number")),  # type: ignore[arg-type]
    "turn type": (
        _rows(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 4}]}
        ),
        "data.wrong-type",
        1,
        ("messages[1].content", "number"),
    ),
    "turn null": (
        _rows({"messages": [{"role": "user", "content": None}]}),
        "data.null",
        1,
        ("messages[0].content",),
    ),
    "turn missing": (
        _rows({"messages": [{"role": "user"}]}),
        "data.missing-field",
        1,
        ("messages[0].content",),
    ),
    "turn list": (
        _rows({"messages": [["user", "hi"]]}),
        "data.bad-messages",
        1,
        ("messages[0]", "list"),
    ),
    "no turns": (_rows({"messages": []}), "data.bad-messages", 1, ("empty list",)),
    "sharegpt role": (
        _rows({"conversations": [{"from": "robot", "value": "hi"}]}),
        "data.bad-role",
        1,
        ("conversations[0].from", "robot", "human"),
    ),
    "twice": (_bytes(b'{"prompt": "a", "prompt": "b"}\n'), "data.duplicate-key", 1, ("prompt",)),
    "unknown format": (
        _rows(GOOD, format="mesages"),
        "recipe.bad-choice",
        None,
        ("mesages", "messages"),
    ),
    "format not in file": (
        _rows(GOOD, format="alpaca"),
        "data.missing-column",
        None,
        ("instruction",),
    ),
    "code": (_rows(GOOD, format="os:getcwd"), "security.local-code", None, ("--allow-local-code",)),
}


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build, id, line, parts = TABLE[name]
    path, keys = build(tmp_path)
    before = sorted(tmp_path.iterdir())
    tokenizer = sentencepiece_like(MISTRAL, legacy=False) if name == "D17" else tiny_tokenizer()
    with pytest.raises(BadInput) as caught:
        prepared(section(path, **keys), tokenizer=tokenizer)
    error = caught.value
    assert error.id == id
    assert error.where is not None
    assert error.where.file == str(path)
    assert line is None or error.where.line == line
    said = f"{error.message} {error.help}"
    for part in parts:
        assert part in said
    assert "\n" not in error.message
    assert sorted(tmp_path.iterdir()) == before


ROW = json.dumps(GOOD).encode()
TAKEN = {
    "OK05": b"\xef\xbb\xbf" + ROW + b"\n" + ROW + b"\n",
    "OK06": ROW + b"\r\n" + ROW + b"\r\n",
    "OK07": ROW + b"\n" + ROW,
    "OK08": ROW + b"\n" + ROW + b"\n\n",
    "OK09": (json.dumps({**GOOD, "source": "me"}).encode() + b"\n") * 2,
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str, tmp_path: Path) -> None:
    path, _ = _bytes(TAKEN[name])(tmp_path)
    found = prepared(section(path))
    assert [example.place.line for example in found.train] == [1, 2]
    texts = [tiny_tokenizer().decode(example.ids) for example in found.train]
    assert texts == ["<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"] * 2
    extra = [notice for notice in found.notices if notice.id == "data.extra-fields"]
    assert len(extra) == (name == "OK09")
    assert all("source" in notice.message and "2 rows" in notice.message for notice in extra)
