import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import BadInput, LorakitError, Place, RunFailed
from lorakit.storage import strict_json
from lorakit.storage.strict_json import dumps, dumps_line, parse, read, read_lines, read_object

HERE = Place("x.json")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
ROWS = st.lists(st.dictionaries(st.text(), st.text() | st.integers()), min_size=1, max_size=4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json") / "rows.jsonl"


def refused(content: bytes | str, place: Place = HERE, family: str = "data") -> LorakitError:
    with pytest.raises(LorakitError) as caught:
        parse(content, place, family)
    return caught.value


def refused_lines(path: Path, content: bytes) -> BadInput:
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        list(read_lines(path))
    assert caught.value.where.file == str(path)
    return caught.value


# What is written is read again, and what is read is what the library would read.


@given(JSON)
def test_what_is_written_is_read_again(value: Any) -> None:
    for text in (dumps(value), dumps_line(value), json.dumps(value)):
        assert parse(text, HERE, "data") == value
        assert parse(text.encode(), HERE, "data") == value
    assert "\n" not in dumps_line(value)


def test_what_is_not_json_is_not_written() -> None:
    for write in (dumps, dumps_line):
        for value in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match="JSON"):
                write({"x": value})


def accepted(content: bytes) -> None:
    """Check that what we do not refuse in our own words is what the library reads."""
    try:
        value = parse(content, HERE, "data")
    except BadInput:
        return
    assert value == json.loads(content)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    accepted(content)


@given(st.text(st.sampled_from('{}[]",:\\u dD8eE+-.0123456789NaInftyrulsé\n'), max_size=60))
def test_anything_like_json_is_read_or_refused(text: str) -> None:
    accepted(text.encode())


@given(JSON, st.data())
def test_a_changed_document_is_read_or_refused(value: Any, data: st.DataObject) -> None:
    content = bytearray(dumps(value).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(at, min(at + 4, len(content))))
        content[at:end] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"NaN", b"1e999", b'"a":1,'])
        )
    accepted(bytes(content))


# Each fault has its id, its place and its word.


@pytest.mark.parametrize(
    ("text", "id", "line", "column", "word"),
    [
        ('{"a": 1,\n "b": [1, 2,, 3]}', "data.syntax", 2, 13, "found , 3]}"),
        ('{"a": 1,}', "data.syntax", 1, None, "not JSON"),
        ("{'a': 1}", "data.syntax", 1, 2, "double quotes"),
        ('{"a": 1', "data.syntax", 1, 8, "the end"),
        ('{"a": "x', "data.syntax", 1, 7, "unterminated"),
        ('{"a": "x\ty"}', "data.syntax", 1, 9, "control character"),
        ("", "data.syntax", 1, 1, "the end"),
        ("{} {}", "data.syntax", 1, 4, "extra data"),
        ("\ufeff{}", "data.syntax", 1, 1, "\\ufeff"),
        ('{"é": 1,\n  "é": 2}', "data.duplicate-key", 2, 3, "é: given twice"),
        (
            '{"a": {"b": 1}, "c": {"b": 1, "\\u0062": 2}}',
            "data.duplicate-key",
            1,
            31,
            "c.b: given twice",
        ),
        ('[{"a": 1}, {"a": {"x": 1, "x": 1}}]', "data.duplicate-key", 1, 27, "[1].a.x"),
        ('{"a": NaN}', "data.not-finite", 1, 7, "a: NaN"),
        ('{"a": [0, {"b": -Infinity}]}', "data.not-finite", 1, 17, "a[1].b: -Infinity"),
        ('{"a": "NaN",\n"b": 1e999}', "data.not-finite", 2, 6, "b: 1e999"),
        ("Infinity", "data.not-finite", 1, 1, "Infinity"),
        ('{"a": "\\ud800"}', "data.encoding", 1, 7, "surrogate"),
        ('{"\\udc00x": 1}', "data.encoding", 1, 2, "surrogate"),
        ('{"a": "\ud800"}', "data.encoding", 1, 8, "surrogate"),
        ('{"a": ' + "7" * 5000 + "}", "data.syntax", 1, 7, "5,000 digits"),
    ],
)
def test_a_fault_has_its_place(
    text: str, id: str, line: int, column: int | None, word: str
) -> None:
    error = refused(text)
    assert error.id == id
    assert error.where.file == "x.json"
    assert error.where.line == line
    assert column in (None, error.where.column)
    assert word in error.message


def test_a_document_within_a_file_counts_from_its_place() -> None:
    assert refused('{"a": NaN}', Place("rows.jsonl", 7)).where == Place("rows.jsonl", 7, 7)
    assert refused(b'{\n"a": \xff}', Place("rows.jsonl", 7)).where == Place("rows.jsonl", 8, 6)


def test_pairs_of_surrogates_and_escaped_backslashes_are_text() -> None:
    assert parse('"\\ud83d\\ude00 \\\\ud800"', HERE, "data") == "😀 \\ud800"


@pytest.mark.parametrize("opened", ["[", '{"a":'])
def test_depth_is_bounded(opened: str) -> None:
    closed = "]" if opened == "[" else "}"
    deepest = opened * 64 + "1" + closed * 64
    assert parse(deepest, HERE, "data")
    error = refused(opened * 65 + "1" + closed * 65)
    assert error.id == "data.syntax"
    assert "64" in error.message
    assert error.where.column == 64 * len(opened) + 1
    assert refused(opened * 1_000_000).id == "data.syntax"
    assert parse(json.dumps(["[{" * 100, '\\"[' * 100]), HERE, "data")  # brackets in text are text
    assert parse("[" + "[]," * 100 + "[]]", HERE, "data")  # side by side is not deep


def test_a_long_text_costs_no_more_than_its_length() -> None:
    text = json.dumps({"a": "\\x" * 500_000, "b": ["["] * 70})
    tracemalloc.start()
    try:
        assert refused(text[:-1] + ', "a": 1}').id == "data.duplicate-key"
        assert tracemalloc.get_traced_memory()[1] < 12 * len(text)
    finally:
        tracemalloc.stop()


def test_ids_are_those_of_the_family() -> None:
    assert refused("{", family="adapter").id == "adapter.bad-config"
    assert refused("{", family="model").id == "model.bad-config"
    assert refused("{", family="model.bad-index").id == "model.bad-index"
    damaged = refused("{", family="checkpoint")
    assert damaged.id == "checkpoint.damaged"
    assert isinstance(damaged, RunFailed)


# Whole files.


def test_a_file_with_a_bom_is_read(path: Path) -> None:
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    assert read(path, "adapter") == {"a": 1}
    assert read_object(path, "adapter") == {"a": 1}


def test_a_file_that_is_no_document_is_refused(path: Path) -> None:
    for content, id in (
        (b"", "data.empty"),
        (b"\xef\xbb\xbf \n", "data.empty"),
        (gzip.compress(b"{}"), "data.compressed"),
        ("{}".encode("utf-16"), "data.encoding"),
        (b"[1, 2, 3]", "data.too-large"),
    ):
        path.write_bytes(content)
        with pytest.raises(BadInput) as caught:
            read(path, "data", max_bytes=8)
        assert caught.value.id == id
        assert caught.value.where.file == str(path)
    with pytest.raises(BadInput, match="no such file") as caught:
        read(path.parent / "none.json", "data")
    assert caught.value.id == "data.not-found"


def test_an_object_is_asked_for(path: Path) -> None:
    for value, word in (
        ([1], "a list"),
        ("x", "text"),
        (1.5, "a number"),
        (None, "null"),
        (True, "true"),
    ):
        path.write_text(dumps(value))
        with pytest.raises(BadInput, match=f"object.*{word}"):
            read_object(path, "adapter")


# JSONL (rows of bad_inputs.tsv by their ids).


@given(ROWS, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans(), st.integers(0, 3))
def test_rows_are_read_with_their_lines(
    scratch: Path, rows: list[dict[str, Any]], end: str, bom: bool, ended: bool, blank: int
) -> None:
    """OK05 to OK08: a BOM, CRLF, no final newline, blank lines at the end."""
    text = end.join(map(dumps_line, rows)) + (end + f" {end}" * blank if ended else "")
    scratch.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    assert list(read_lines(scratch)) == list(enumerate(rows, start=1))


FAULTS = [
    b"{",
    b'{"a": NaN}',
    b"3",
    b"null",
    b'"x"',
    b'{"a": 1, "a": 2}',
    b"\xff",
    b"{}{}",
    b"[" * 99,
    b"\0",
]


@given(ROWS, st.sampled_from(FAULTS), st.data())
def test_a_fault_names_the_line_it_stands_on(
    scratch: Path, rows: list[dict[str, Any]], fault: bytes, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(rows)))
    lines = [dumps_line(row).encode() for row in rows]
    lines.insert(at, fault)
    error = refused_lines(scratch, b"\n".join(lines))
    assert error.where.line == at + 1


def test_d02_an_empty_file(path: Path) -> None:
    for content in (b"", b"\n\n", b"\xef\xbb\xbf"):
        error = refused_lines(path, content)
        assert error.id == "data.empty"
        assert "empty" in error.message


def test_d03_invalid_utf8_names_line_and_byte(path: Path) -> None:
    error = refused_lines(path, b'{}\n{"a": "\xc3\xa9\xe9"}\n')
    assert error.id == "data.encoding"
    assert (error.where.line, error.where.column) == (2, 9)
    assert "byte offset 9 " in error.message
    assert "0xe9" in error.message


def test_d04_packed_bytes(path: Path) -> None:
    error = refused_lines(path, gzip.compress(b"{}\n"))
    assert error.id == "data.compressed"
    assert "gzip" in error.message
    assert ".gz" in error.message


def test_d05_a_truncated_last_line(path: Path) -> None:
    error = refused_lines(path, b'{"a": 1}\n{"a": 1}\n{"a": "on')
    assert error.id == "data.syntax"
    assert (error.where.line, error.where.column) == (3, 7)


def test_d06_a_trailing_comma_and_single_quotes(path: Path) -> None:
    for content in (b'{}\n{"a": 1,}\n', b"{}\n{'a': 1}\n"):
        error = refused_lines(path, content)
        assert error.id == "data.syntax"
        assert error.where.line == 2
        assert error.where.column > 1


def test_d07_a_scalar(path: Path) -> None:
    for scalar, word in (
        (b"3", "a number"),
        (b'"x"', "text"),
        (b"null", "null"),
        (b"[1]", "a list"),
    ):
        error = refused_lines(path, b"{}\n" + scalar + b"\n")
        assert error.id == "data.not-an-object"
        assert error.where.line == 2
        assert "object" in error.message
        assert word in error.message


@pytest.mark.parametrize(
    "content", [b'[{"a": 1}, {"a": 2}]', b'[\n{"a": 1}\n]\n', b"\xef\xbb\xbf ["]
)
def test_d08_one_list_in_a_jsonl_file(path: Path, content: bytes) -> None:
    error = refused_lines(path, content)
    assert error.id == "data.not-an-object"
    assert "one object per line" in error.message
    assert ".json" in error.help


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_d09_what_is_not_finite(path: Path, word: str) -> None:
    error = refused_lines(path, b'{}\n{"score": {"mean": %s}}\n' % word.encode())
    assert error.id == "data.not-finite"
    assert error.where.line == 2
    assert "score.mean" in error.message
    assert word in error.message


def test_d18_a_line_of_more_than_64_mib(path: Path) -> None:
    limit = strict_json.MAX_BYTES
    with path.open("wb") as file:
        file.write(b"{}\n")
        file.truncate(3 * limit)  # a hole: no disk is used
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="64 MiB") as caught:
            list(read_lines(path))
        assert tracemalloc.get_traced_memory()[1] < 2 * limit
    finally:
        tracemalloc.stop()
    assert caught.value.id == "data.too-large"
    assert caught.value.where == Place(str(path), 2)


def test_a_line_at_the_limit_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_BYTES", 20)
    monkeypatch.setattr(strict_json, "_BLOCK", 7)
    row = dumps_line({"a": "x" * 11})
    assert len(row) == 20
    path.write_text(f"{row}\n{row}\n{{}}\n")
    assert [number for number, _ in read_lines(path)] == [1, 2, 3]
    path.write_text(f"{row}\n{row} \n{{}}\n")
    with pytest.raises(BadInput) as caught:
        list(read_lines(path))
    assert caught.value.where.line == 2


def test_a_blank_line_among_the_rows_is_refused_where_it_stands(path: Path) -> None:
    error = refused_lines(path, b"{}\n\n  \n{}\n")
    assert error.id == "data.syntax"
    assert error.where.line == 2
    assert "empty" in error.message


def test_only_line_feeds_end_a_line(path: Path) -> None:
    row = {"a": "\u2028\u2029\x85\x0b\x0c"}
    path.write_text(
        json.dumps(row, ensure_ascii=False).replace("\\u000b", "").replace("\\f", "") + "\n{}"
    )
    assert [number for number, _ in read_lines(path)] == [1, 2]


def test_rows_before_a_fault_are_read_without_the_rest(path: Path) -> None:
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{')
    rows = read_lines(path)
    assert next(rows) == (1, {"a": 1})
    rows.close()
