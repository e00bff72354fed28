"""Rows of every kind of file, with the line each stands on."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from lorakit.data import source
from lorakit.data.source import Loaded, digest, load
from lorakit.errors import BadInput, EnvironmentLacks
from lorakit.recipe.sections import Source
from lorakit.storage.hashing import sha256_file
from tests.data.given import rows_file

ROWS = [{"prompt": f"p {k}\nline", "completion": f'"{k}", é'} for k in range(10)]


def _load(folder: Path, path: str, **keys: Any) -> Loaded:
    return load(Source(path=path, **keys), 0, folder=folder, offline=True)


def _write(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".jsonl"):
        rows_file(folder, ROWS, name)
    elif name == "object.json":
        text = json.dumps({"version": [1, {"data": []}], "data": ROWS, "more": 1}, indent=1)
        path.write_text(text, encoding="utf-8")
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8-sig")
    elif name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "object.json", "a.csv", "a.parquet"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path, name)
    loaded = _load(tmp_path, name)
    assert [row.value for row in loaded.rows] == ROWS
    found = digest(Source(path=path.name), folder=tmp_path, offline=True)
    assert found == (path.name, sha256_file(path))
    assert {row.place.file for row in loaded.rows} == {str(path)}
    lines = path.read_bytes().split(b"\n")
    if name.endswith(".parquet"):
        assert [row.place.line for row in loaded.rows] == list(range(1, len(ROWS) + 1))
        return
    for k, row in enumerate(loaded.rows):
        if row.place.line is not None:
            written = b"\n".join(lines[row.place.line - 1 : row.place.line + 1])
            assert f"p {k}".encode() in written


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, range(10)),
        ({"max_samples": 3}, range(3)),
        ({"split": "train"}, range(10)),
        ({"split": "train[:4]"}, range(4)),
        ({"split": "[-2:]"}, range(8, 10)),
        ({"split": "train[20%:50%]"}, range(2, 5)),
        ({"split": "train[2:]", "max_samples": 2}, range(2, 4)),
    ],
)
def test_shares_of_a_file(tmp_path: Path, keys: dict[str, Any], expected: range) -> None:
    rows_file(tmp_path, ROWS, "a.jsonl")
    loaded = _load(tmp_path, "a.jsonl", **keys)
    assert [row.value for row in loaded.rows] == [ROWS[k] for k in expected]


@pytest.mark.parametrize(
    ("name", "content", "id", "line"),
    [
        ("a.csv", b"prompt,completion\na,b\nc\n", "data.syntax", 3),
        ("a.csv", b'prompt,completion\na,"b\n', "data.syntax", 2),
        ("a.csv", b"prompt,prompt\na,b\n", "data.duplicate-key", 1),
        ("a.csv", b"prompt,completion\na,b\n\xff,b\n", "data.encoding", 3),
        ("a.csv", b"\x1f\x8b\x08", "data.compressed", None),
        ("a.csv", b"prompt,completion\n", "data.empty", None),
        ("a.csv", b"", "data.empty", None),
        ("a.json", b"[]", "data.empty", None),
        ("a.json", b'[\n{"a": 1},\n2]', "data.not-an-object", 3),
        ("a.json", b'{"rows": []}', "data.not-an-object", None),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', "data.syntax", 2),
        ("a.parquet", b"PAR1 and no more", "data.syntax", None),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "data.compressed", None),
        ("a.txt", b"text", "data.not-a-file", None),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, id: str, line: int | None) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        _load(tmp_path, name)
    assert caught.value.id == id
    assert caught.value.where is not None
    assert (caught.value.where.file, caught.value.where.line) == (str(path), line)


def test_a_file_has_one_split(tmp_path: Path) -> None:
    rows_file(tmp_path, ROWS, "a.jsonl")
    with pytest.raises(BadInput, match="train alone") as caught:
        _load(tmp_path, "a.jsonl", split="test")
    assert caught.value.id == "recipe.bad-choice"
    with pytest.raises(BadInput, match="'main' is for hub data sets") as caught:
        _load(tmp_path, "a.jsonl", subset="main")
    assert caught.value.id == "recipe.conflict"


class _Hub:
    """Stands for the `datasets` package: data sets of ten rows, and what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, str]] = []
        self.rows = ROWS

    def load_dataset(self, path: str, name: str | None, *, split: str) -> Any:
        self.asked.append((path, name, split))
        if path == "nobody/nothing":
            raise FileNotFoundError("no such data set")
        if path == "far/away":
            raise ConnectionError("no route")
        return Dataset.from_list(self.rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Hub]:
    """Put a hub in the place of the real one."""
    hub = _Hub()
    monkeypatch.setattr(source, "import_module", {"datasets": hub}.__getitem__)
    source._hub_table.cache_clear()
    yield hub
    source._hub_table.cache_clear()


def test_hub(tmp_path: Path, hub: _Hub) -> None:
    wanted = Source(path="some/set", subset="main", split="test[:5]", max_samples=2)
    loaded = load(wanted, 0, folder=tmp_path, offline=False)
    assert [row.value for row in loaded.rows] == ROWS[:2]
    name, _ = digest(wanted, folder=tmp_path, offline=False)
    assert name == "some/set main test[:5]"
    assert hub.asked == [("some/set", "main", "test[:5]")]
    assert loaded.rows[0].place.file == "some/set"
    with pytest.raises(BadInput) as missing:
        load(Source(path="nobody/nothing"), 0, folder=tmp_path, offline=False)
    assert missing.value.id == "data.not-found"
    with pytest.raises(EnvironmentLacks) as unreachable:
        load(Source(path="far/away"), 0, folder=tmp_path, offline=False)
    assert unreachable.value.id == "env.offline"


def test_the_digest_of_the_hub_is_of_the_rows_asked_for(tmp_path: Path, hub: _Hub) -> None:
    def digest_of(rows: list[Any], **more: Any) -> str:
        source._hub_table.cache_clear()
        hub.rows = rows
        return digest(Source(path="some/set", **more), folder=tmp_path, offline=False)[1]

    first = digest_of(ROWS)
    assert digest_of(list(ROWS)) == first
    other = {**ROWS[0], "completion": "?"}
    assert digest_of([*ROWS[:9], other]) != first
    two = digest_of(ROWS, max_samples=2)
    assert digest_of(list(ROWS), max_samples=2) == two != first
    assert digest_of([other, *ROWS[1:]], max_samples=2) != two


def test_offline_never_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "import_module", {}.__getitem__)
    with pytest.raises(EnvironmentLacks) as caught:
        _load(tmp_path, "some/set")
    assert caught.value.id == "env.offline"


@pytest.mark.parametrize("path", ["data/train", "gone.jsonl", "../some/set", "script.py"])
def test_what_looks_like_a_path_is_no_hub_id(tmp_path: Path, path: str) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(BadInput) as caught:
        _load(tmp_path, path)
    assert caught.value.id == "data.not-found"


def test_a_path_is_relative_to_the_recipe_and_the_help_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gives one with `--set` has it in the working folder."""
    recipes, working = tmp_path / "recipes", tmp_path / "working"
    recipes.mkdir()
    working.mkdir()
    monkeypatch.chdir(working)
    rule = "paths are relative to the folder of the recipe"
    with pytest.raises(BadInput) as caught:
        _load(recipes, "a.jsonl")
    assert caught.value.id == "data.not-found"
    assert caught.value.help == f"{rule}; put the file there, or name another in the recipe"
    _write(working, "a.jsonl")
    with pytest.raises(BadInput) as caught:
        _load(recipes, "./a.jsonl")
    assert caught.value.help == f"{rule}: for the one in the working folder write $PWD/a.jsonl"
    with pytest.raises(BadInput) as caught:
        _load(recipes, str(working / "b.jsonl"))
    assert rule not in str(caught.value.help)


@pytest.mark.parametrize(
    ("content", "help"),
    [
        ("", "write rows into it"),
        ('{"prompt": 1,}\n', "correct this place, or take the row out"),
        ('{"a": 1}\n\n{"a": 2}\n', "take the line out"),
    ],
)
def test_a_fault_of_a_file_comes_with_what_to_do(tmp_path: Path, content: str, help: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(BadInput) as caught:
        _load(tmp_path, "a.jsonl")
    assert str(caught.value.help).startswith(help)
