import errno
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorakit.errors import BadInput, RunFailed
from lorakit.storage import header
from lorakit.storage.header import layout, read_header
from lorakit.storage.tensors import DTYPES, TensorFile, TensorWriter, laid_out, write_tensors
from tests.storage.kills import refusals

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
    lambda n: n != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return a tensor of random bytes: NaNs of every kind, infinities and denormals among them."""
    count = math.prod(shape) * dtype.itemsize
    data = torch.randint(
        0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return (data > 127).reshape(shape) if dtype == torch.bool else data.view(dtype).reshape(shape)


def equal(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are the same to the bit."""
    as_bytes = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def read_all(path: Path, family: str = "model") -> dict[str, Tensor]:
    with TensorFile(path, family) as file:
        return {name: file.read(name) for name in file.names}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the name of a file that each example writes anew."""
    return tmp_path_factory.mktemp("tensors") / "x.safetensors"


@st.composite
def files(draw: st.DrawFn) -> dict[str, Tensor]:
    kinds = st.tuples(st.sampled_from(list(DTYPES.values())), SHAPES)
    drawn = draw(st.dictionaries(NAMES, kinds, max_size=5))
    return {name: tensor(*kind, seed) for seed, (name, kind) in enumerate(drawn.items())}


# The library reads what we write, and we read what it writes.


@given(files(), st.dictionaries(NAMES, st.text(), max_size=2))
def test_the_library_reads_our_files(
    scratch: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    scratch.unlink(missing_ok=True)
    write_tensors(scratch, tensors, metadata)
    theirs, ours = safetensors.torch.load_file(scratch), read_all(scratch)
    assert theirs.keys() == ours.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert equal(theirs[name], expected)
        assert equal(ours[name], expected)
    with safetensors.safe_open(scratch, "pt") as file, TensorFile(scratch, "model") as own:
        assert file.metadata() == own.metadata == {"format": "pt", **metadata}


@given(files())
def test_we_read_the_files_of_the_library(scratch: Path, tensors: dict[str, Tensor]) -> None:
    scratch.unlink(missing_ok=True)
    safetensors.torch.save_file(tensors, scratch)
    ours = read_all(scratch)
    assert ours.keys() == tensors.keys()
    assert all(equal(ours[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (3, 2)])
def test_every_dtype_and_odd_shape_both_ways(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    expected = tensor(DTYPES[name], shape)
    write_tensors(tmp_path / "ours", {"x": expected})
    safetensors.torch.save_file({"x": expected}, tmp_path / "theirs")
    assert equal(safetensors.torch.load_file(tmp_path / "ours")["x"], expected)
    with TensorFile(tmp_path / "theirs", "model") as file:
        assert (file.names, file.shape("x"), file.dtype("x")) == (("x",), shape, DTYPES[name])
        assert equal(file.read("x"), expected)


@given(files())
def test_each_tensor_begins_at_a_multiple_of_its_width(
    scratch: Path, tensors: dict[str, Tensor]
) -> None:
    scratch.unlink(missing_ok=True)
    write_tensors(scratch, tensors)
    text = scratch.read_bytes()
    (length,) = struct.unpack("<Q", text[:8])
    assert (8 + length) % 8 == 0
    for name, entry in json.loads(text[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % header.WIDTHS[entry["dtype"]] == 0


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    tensors = {name: tensor(torch.float32, (2, 3), seed) for seed, name in enumerate("cab")}
    turned = {name: value.T.contiguous().T for name, value in reversed(tensors.items())}
    write_tensors(tmp_path / "a", tensors)
    write_tensors(tmp_path / "b", turned)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_without_tensors_is_a_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {})
    assert read_all(tmp_path / "x") == {}
    assert safetensors.torch.load_file(tmp_path / "x") == {}


def test_gradients_views_and_expanded_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "parameter": torch.nn.Parameter(base),
        "transposed": base.T,
        "strided": base[:, ::2],
        "expanded": base[:1].expand(5, 4),
        "shared": base,
    }
    write_tensors(tmp_path / "x", tensors)
    for name, value in read_all(tmp_path / "x").items():
        assert torch.equal(value, tensors[name])


# Rows: only what is asked for is read.


@given(SHAPES.filter(len), st.sampled_from(list(DTYPES.values())), st.data())
def test_rows_are_those_of_the_tensor(
    scratch: Path, shape: tuple[int, ...], dtype: torch.dtype, data: st.DataObject
) -> None:
    scratch.unlink(missing_ok=True)
    expected = tensor(dtype, shape)
    write_tensors(scratch, {"before": tensor(torch.uint8, (3,)), "x": expected, "y": expected})
    bound = st.none() | st.integers(-6, 6)
    rows = slice(data.draw(bound), data.draw(bound))
    with TensorFile(scratch, "model") as file:
        assert equal(file.read("x", rows), expected[rows])


def test_only_the_bytes_of_the_rows_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tensor(torch.bfloat16, (1000, 64))
    write_tensors(tmp_path / "x", {"x": expected})
    with TensorFile(tmp_path / "x", "model") as file:
        counts = []
        real = os.preadv

        def preadv(descriptor: int, buffers: list[Any], offset: int) -> int:
            counts.append(real(descriptor, [buffers[0][:100]], offset))  # short reads go on
            return counts[-1]

        monkeypatch.setattr(os, "preadv", preadv)
        assert equal(file.read("x", slice(10, 13)), expected[10:13])
    assert sum(counts) == 3 * 64 * 2


def test_what_is_read_is_the_callers(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"x": torch.ones(4)})
    with TensorFile(tmp_path / "x", "model") as file:
        file.read("x").zero_()
        assert torch.equal(file.read("x"), torch.ones(4))
        with pytest.raises(ValueError, match="rows"):
            file.read("x", slice(None, None, 2))


def test_a_bool_of_an_odd_byte_is_true(tmp_path: Path) -> None:
    raw = build({"x": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}, b"\x00\x02\xff")
    (tmp_path / "x").write_bytes(raw)
    assert read_all(tmp_path / "x")["x"].view(torch.uint8).tolist() == [0, 1, 1]


# Damage.


def build(entries: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(
    dtype: str = "U8", shape: Any = (2,), offsets: Any = (0, 2), **more: Any
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def damage(path: Path, content: bytes, family: str = "adapter") -> RunFailed:
    path.write_bytes(content)
    with pytest.raises(RunFailed) as caught:
        TensorFile(path, family)
    assert caught.value.id == f"{family}.damaged"
    assert caught.value.where.file == str(path)
    assert caught.value.message.isprintable()
    return caught.value


@pytest.mark.parametrize("family", ["model", "adapter", "checkpoint"])
def test_a_file_of_the_wrong_size_names_both_sizes(tmp_path: Path, family: str) -> None:
    path = tmp_path / "whole"
    write_tensors(path, {"x": tensor(torch.float32, (3, 4)), "y": tensor(torch.uint8, (5,))})
    whole = path.read_bytes()
    for size in (0, 4, 8, 20, len(whole) - 1):
        message = damage(tmp_path / "short", whole[:size], family).message
        assert f"found {size}" in message
        assert "expected" in message
    assert f"expected {len(whole)} bytes, found {len(whole) - 1}" in message
    message = damage(tmp_path / "long", whole + b"\0", family).message
    assert f"expected {len(whole)} bytes, found {len(whole) + 1}" in message
    assert all(damage(tmp_path / "short", whole[:size], family) for size in range(len(whole)))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (struct.pack("<Q", 2**63) + b"{}", "at most"),
        (struct.pack("<Q", (16 << 20) + 1) + b"{}", "16,777,216"),
        (build(b""), "object"),
        (build(b"[]"), "object"),
        (build(b" {}"), "object"),
        (build(b'\xef\xbb\xbf{"x": 1}'), "object"),
        (build(b'{"x": '), "header"),
        (build(b'{"x": "\xff"}'), "UTF-8"),
        (build(b"{} {}"), "extra"),
        (build(b'{"a":%s}' % (b"[" * 70 + b"]" * 70)), "64"),
        (build({"x": 1}), "dtype, shape and data_offsets"),
        (build({"x": []}), "dtype, shape and data_offsets"),
        (build({"x": {"dtype": "U8", "shape": [2]}}, b"ab"), "dtype, shape and data_offsets"),
        (build({"x": entry(extra=1)}, b"ab"), "dtype, shape and data_offsets"),
        (build({"x": entry("F8_E9M9")}, b"ab"), "F8_E9M9"),
        (build({"x": entry("u8")}, b"ab"), "BF16"),
        (build({"x": entry(3)}, b"ab"), "dtype"),
        (build({"x": entry(["U8"])}, b"ab"), "dtype"),
        (build({"x": entry(shape=[-2])}, b"ab"), "counts"),
        (build({"x": entry(shape=[-1, -2])}, b"ab"), "counts"),
        (build({"x": entry(shape=[2.0])}, b"ab"), "counts"),
        (build({"x": entry(shape=[True, 2])}, b"ab"), "counts"),
        (build({"x": entry(shape="2")}, b"ab"), "counts"),
        (build({"x": entry(shape=None)}, b"ab"), "counts"),
        (build({"x": entry(offsets=[0])}, b"ab"), "counts"),
        (build({"x": entry(offsets=[0, 1, 2])}, b"ab"), "counts"),
        (build({"x": entry(offsets=[-2, 0])}, b"ab"), "counts"),
        (build({"x": entry(offsets=[2, 0])}, b"ab"), "needs 2 bytes"),
        (build({"x": entry(shape=[3])}, b"ab"), "needs 3 bytes"),
        (build({"x": entry("F32")}, b"ab"), "needs 8 bytes"),
        (build({"x": entry(shape=[2**62, 4])}, b"ab"), "impossible"),
        (build({"x": entry(shape=[2**32, 2**32])}, b"ab"), "impossible"),
        (build({"x": entry(shape=[2**70, 0], offsets=[0, 0])}), "impossible"),
        (build({"x": entry(shape=[1] * 65 + [2])}, b"ab"), "impossible"),
        (build({"x": entry(), "y": entry(offsets=[1, 3])}, b"abc"), "overlaps"),
        (build({"x": entry(), "y": entry()}, b"ab"), "overlaps"),
        (build({"x": entry(offsets=[1, 3])}, b"abc"), "hole"),
        (build({"x": entry(), "y": entry(offsets=[3, 5])}, b"abcde"), "hole"),
        (build(b'{"x":%s,"x":%s}' % ((json.dumps(entry()).encode(),) * 2), b"ab"), "twice"),
        (build({"x": entry(), "__metadata__": {"a": 1}}, b"ab"), "metadata"),
        (build({"x": entry(), "__metadata__": None}, b"ab"), "metadata"),
        (build({"x": entry(), "__metadata__": []}, b"ab"), "metadata"),
        (build({"\x1b[2J\u202e": entry("no")}, b"ab"), "\\x1b[2J\\u202e"),
    ],
)
def test_every_damage_of_a_header_is_found(tmp_path: Path, content: bytes, word: str) -> None:
    assert word in damage(tmp_path / "x", content).message


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_TENSORS", 3)
    entries = {name: entry(shape=[0], offsets=[0, 0]) for name in "abcd"}
    assert "at most 3 tensors, found 4" in damage(tmp_path / "x", build(entries)).message
    with pytest.raises(ValueError, match="at most 3"):
        layout(dict.fromkeys("abcd", ("U8", (0,))), {})


def test_a_file_that_shrinks_while_it_is_read_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors(path, {"x": tensor(torch.float32, (100,))})
    with TensorFile(path, "model") as file:
        os.truncate(path, path.stat().st_size - 10)
        with pytest.raises(RunFailed, match="10 bytes early") as caught:
            file.read("x")
    assert caught.value.id == "model.damaged"


def test_a_missing_file_and_a_fifo_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, id in (("none", "adapter.not-found"), ("fifo", "adapter.bad-config")):
        with pytest.raises(BadInput) as caught:
            TensorFile(tmp_path / name, "adapter")
        assert caught.value.id == id


def compare(content: bytes, path: Path) -> None:
    """Check that what we do not refuse in our own words is what the library reads."""
    path.write_bytes(content)
    try:
        ours = read_all(path)
    except RunFailed:
        return
    theirs = safetensors.torch.load(content)
    assert theirs.keys() == ours.keys()
    assert all(equal(ours[name], theirs[name]) for name in ours if ours[name].dtype != torch.bool)


@given(st.data())
def test_a_changed_header_is_refused_or_read_as_the_library_does(
    scratch: Path, data: st.DataObject
) -> None:
    entries = {
        "a": entry("F32", [2, 1], [0, 8]),
        "b": entry("I16", [0, 3], [8, 8]),
        "c": entry("U8", [3], [8, 11]),
        "__metadata__": {"format": "pt"},
    }
    numbers = st.integers(-1, 12) | st.sampled_from(
        [2**31, 2**63, 2**64, 2**100, 1.5, True, None, "1", []]
    )
    for _ in range(data.draw(st.integers(0, 3))):
        name = data.draw(st.sampled_from("abc"))
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        values = (
            st.sampled_from([*DTYPES, "F4", "x"])
            if key == "dtype"
            else st.lists(numbers, max_size=3)
        )
        entries[name] = entries[name] | {key: data.draw(values)}
    text = bytearray(json.dumps(entries).encode())
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(text)))
        text[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    length = len(text) + data.draw(st.sampled_from([0, 0, 0, -1, 1, 8]))
    compare(struct.pack("<Q", length) + bytes(text) + bytes(range(11)), scratch)


@given(st.binary(max_size=40), st.integers(0, 60))
def test_any_bytes_are_refused_or_read_as_the_library_does(
    scratch: Path, tail: bytes, length: int
) -> None:
    compare(struct.pack("<Q", length) + tail, scratch)
    compare(tail, scratch)
    compare(build(b"{" + tail), scratch)


def test_a_layout_that_could_not_be_read_is_not_written() -> None:
    for tensors, word in (
        ({"__metadata__": ("U8", (1,))}, "metadata"),
        ({"x": ("U8", (1,) * 65)}, "impossible"),
        ({"\ud800": ("U8", (1,))}, "surrogates"),
    ):
        with pytest.raises(ValueError, match=word):
            layout(tensors, {})
    text, entries = layout({"x": ("BF16", (3, 2))}, {"a": "b"})
    assert read_header(text[8:], len(text) + 12) == (entries, {"format": "pt", "a": "b"})


# Writing in any order.


@given(files(), st.randoms(use_true_random=False), st.data())
def test_rows_in_any_order_make_the_same_file(
    scratch: Path, tensors: dict[str, Tensor], random: Any, data: st.DataObject
) -> None:
    pieces = []
    for name, value in tensors.items():
        size = data.draw(st.integers(1, 3))
        starts = range(0, value.shape[0], size) if value.dim() else [None]
        pieces += [(name, at, value if at is None else value[at : at + size]) for at in starts]
    random.shuffle(pieces)
    scratch.unlink(missing_ok=True)
    write_tensors(scratch, tensors, {"a": "b"})
    content = scratch.read_bytes()
    scratch.unlink()
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    with TensorWriter(scratch, laid_out(shapes, {"a": "b"})) as writer:
        for name, at, piece in pieces:
            writer.write(name, piece, at or 0)
        writer.finish()
    assert scratch.read_bytes() == content


def test_a_row_that_is_missing_or_written_twice_is_a_bug(tmp_path: Path) -> None:
    shapes = {"x": ((4, 2), torch.float32), "y": ((), torch.float32)}
    rows = torch.zeros(2, 2)
    for spans, word in (
        ([0], "2 of 4"),
        ([2], "left out"),
        ([0, 2, 2], "twice"),
        ([0, 1, 2], "twice"),
    ):
        with TensorWriter(tmp_path / "x", laid_out(shapes)) as writer:
            writer.write("y", torch.tensor(1.0))
            for at in spans:
                writer.write("x", rows, at)
            with pytest.raises(ValueError, match=word):
                writer.finish()
        assert not (tmp_path / "x").exists()


def test_rows_that_were_not_announced_are_a_bug(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "x", laid_out({"x": ((4, 2), torch.float32)})) as writer:
        for piece, at in (
            (torch.zeros(5, 2), 0),
            (torch.zeros(2, 2), 3),
            (torch.zeros(2, 2), -1),
            (torch.zeros(2, 3), 0),
            (torch.zeros(2), 0),
            (torch.zeros(()), 0),
            (torch.zeros(2, 2, dtype=torch.float64), 0),
        ):
            with pytest.raises(ValueError, match="x is"):
                writer.write("x", piece, at)


def test_a_writer_that_is_left_early_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), TensorWriter(tmp_path / "x", laid_out({})) as writer:
        writer.write("y", torch.zeros(1))
    with TensorWriter(tmp_path / "x", laid_out({"x": ((2,), torch.float32)})) as writer:
        writer.write("x", torch.ones(2))
        with pytest.raises(RunFailed):  # a kill would leave this
            TensorFile(tmp_path / "x", "model")
    assert not (tmp_path / "x").exists()


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"x": torch.zeros(10), "y": torch.zeros(3)}
    for _, error in refusals(lambda: write_tensors(tmp_path / "x", tensors), 28):
        assert isinstance(error, RunFailed)
        assert error.id == "storage.full"
        assert "bytes needed" in error.message
        assert os.listdir(tmp_path) == []
    (tmp_path / "x").unlink()

    class Disk:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr(os, "statvfs", lambda _: Disk)
    with pytest.raises(RunFailed, match="4,096 bytes available"):
        write_tensors(tmp_path / "x", tensors)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("at", range(0, 64, 7))
def test_a_disk_that_keeps_another_header_is_noticed(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def lie(descriptor: int, data: Any, offset: int) -> int:
        changed = bytearray(data)
        changed[at] ^= offset == 0
        return pwrite(descriptor, changed, offset)

    monkeypatch.setattr(os, "pwrite", lie)
    with pytest.raises(RunFailed, match="not what the disk holds") as caught:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(64)}, {"format": "pt"})
    assert caught.value.id == "storage.io"
    assert not (tmp_path / "a.safetensors").exists()


def test_the_header_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets, pwrite = [], os.pwrite

    def spy(descriptor: int, data: memoryview, offset: int) -> int:
        offsets.append(offset)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", spy)
    write_tensors(tmp_path / "x", {"x": torch.ones(3), "y": torch.ones(2)})
    assert len(offsets) == 3
    assert offsets[-1] == 0 < min(offsets[:-1])


def test_a_copy_and_rows_make_the_file_that_they_come_from(tmp_path: Path) -> None:
    """Tensors that are copied and others that are written leave no byte another one."""
    tensors = {
        name: tensor(dtype, (5, 3), seed)
        for seed, (name, dtype) in enumerate(zip("abcd", (*DTYPES.values(),), strict=False))
    }
    safetensors.torch.save_file(tensors, tmp_path / "theirs", {"made": "elsewhere"})
    with TensorFile(tmp_path / "theirs", "model") as file:
        with TensorWriter(tmp_path / "ours", file.layout) as writer:
            for name in "ac":
                writer.copy(name, file)
            for name in "bd":
                writer.write(name, tensors[name])
            writer.finish()
        with (
            TensorWriter(tmp_path / "wrong", laid_out({"a": ((3, 5), torch.float64)})) as writer,
            pytest.raises(ValueError, match="a is"),
        ):
            writer.copy("a", file)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_disk_that_refuses_a_copy_leaves_no_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": torch.ones(9)})

    def copied() -> None:
        (tmp_path / "y").unlink(missing_ok=True)
        with (
            TensorFile(tmp_path / "x", "model") as file,
            TensorWriter(tmp_path / "y", file.layout) as writer,
        ):
            writer.copy("a", file)
            writer.finish()

    refused = [error for _, error in refusals(copied, errno.ENOSPC)]
    assert len(refused) == 4  # both files opened, the copy, the header
    assert all(isinstance(error, RunFailed) and error.id == "storage.full" for error in refused[1:])
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_a_source_that_has_shrunk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": torch.ones(9)})
    with TensorFile(tmp_path / "x", "model") as file:
        os.truncate(tmp_path / "x", file.layout.size - 1)
        with (
            TensorWriter(tmp_path / "y", file.layout) as writer,
            pytest.raises(RunFailed, match="the file ends at byte"),
        ):
            writer.copy("a", file)


def test_modes_follow_the_umask_and_nothing_is_overwritten(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "x", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    (tmp_path / "link").symlink_to(tmp_path / "y")
    for name in ("x", "link"):
        with pytest.raises(RunFailed, match="EEXIST"):
            write_tensors(tmp_path / name, {})
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("family", "id"), [("adapter", "adapter.wrong-dtype"), ("model", "model.shape-mismatch")]
)
def test_a_dtype_of_other_programs_is_no_damage(tmp_path: Path, family: str, id: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(build({"x": entry("F8_E4M3")}, b"ab"))
    with pytest.raises(BadInput, match="x is F8_E4M3; expected F32, F16 or BF16") as caught:
        TensorFile(path, family)
    assert caught.value.id == id
