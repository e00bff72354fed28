import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import BadInput, RunFailed
from lorakit.storage.paths import file_error, inside, open_regular, refuse_pickle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with a shard, a neighbour of like name, and every way out."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "model-secret").mkdir()
    (tmp_path / "model-secret" / "x.safetensors").write_text("secret")
    (folder / "x.safetensors").write_text("x")
    (folder / "sub" / "y.safetensors").write_text("y")
    (folder / "link.safetensors").symlink_to("../model-secret/x.safetensors")
    (folder / "linked").symlink_to("../model-secret")
    (folder / "near.safetensors").symlink_to("x.safetensors")
    os.mkfifo(folder / "fifo.safetensors")
    return folder


def test_names_below_the_folder_are_paths(folder: Path) -> None:
    assert inside(folder, "x.safetensors").read_text() == "x"
    assert inside(folder, "sub/y.safetensors").read_text() == "y"
    assert inside(folder, "missing/z.safetensors") == folder / "missing" / "z.safetensors"
    assert inside(folder, "with space ü") == folder / "with space ü"


@pytest.mark.parametrize(
    "name",
    [
        "../model-secret/x.safetensors",
        "/etc/hostname",
        "sub/../../model-secret/x.safetensors",
        "sub/../x.safetensors",
        "..",
        ".",
        "",
        "sub//y.safetensors",
        "sub/",
        "a\\..\\b",
        "x.safetensors\0.bin",
        "x\n",
        "\ud800",
        "link.safetensors",
        "linked/x.safetensors",
        "near.safetensors",
        "fifo.safetensors",
        "sub",
        "x.safetensors/y",
    ],
)
def test_every_way_out_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(BadInput) as caught:
        inside(folder, name)
    assert caught.value.id == "security.path"
    assert caught.value.message.isprintable()


def test_the_message_says_entry_and_outside(folder: Path) -> None:
    for name in ("../model-secret/x.safetensors", "link.safetensors"):
        with pytest.raises(BadInput, match="outside") as caught:
            inside(folder, name)
        assert name in caught.value.message


def test_the_links_of_a_cache_are_followed_within_it(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a" / "snapshots" / "123"
    blobs = tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("x")
    (tmp_path / "secret").write_text("y")
    (snapshot / "x.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "out.safetensors").symlink_to("../../../secret")
    (snapshot / "gone.safetensors").symlink_to("../../blobs/gone")
    (snapshot / "loop.safetensors").symlink_to("loop.safetensors")
    cache = tmp_path / "models--a"
    assert inside(snapshot, "x.safetensors", links_into=cache) == (blobs / "abc").resolve()
    assert not inside(snapshot, "gone.safetensors", links_into=cache).exists()
    with pytest.raises(BadInput, match="outside"):
        inside(snapshot, "out.safetensors", links_into=cache)
    with pytest.raises(BadInput, match="link"):
        inside(snapshot, "loop.safetensors", links_into=cache)
    with pytest.raises(BadInput, match="link"):
        inside(snapshot, "x.safetensors")


@given(
    st.text(st.characters(codec=None))
    | st.lists(st.sampled_from(["..", ".", "a", "b", ""])).map("/".join)
)
def test_no_name_leads_outside(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = Path(os.path.realpath(tmp_path_factory.getbasetemp()))
    try:
        path = inside(folder, name)
    except (BadInput, RunFailed):  # a name that is too long is the disk's to refuse
        return
    assert path.resolve().is_relative_to(folder)
    assert path.resolve() != folder


@pytest.mark.parametrize("name", ["x.safetensors", "sub/y.safetensors"])
def test_a_link_that_comes_after_the_check_is_not_followed(
    folder: Path, tmp_path: Path, name: str
) -> None:
    path = inside(folder, name)
    with open_regular(path, "model") as file:
        assert file.read() == name.removeprefix("sub/")[:1].encode()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / Path(name).name).write_text("secret")
    first = folder / name.partition("/")[0]
    first.rename(tmp_path / "gone")
    first.symlink_to(outside / name if first == path else outside)
    assert Path(path).read_text() == "secret"  # who goes by the name alone
    with pytest.raises(BadInput) as caught:
        open_regular(path, "model")
    assert caught.value.id == "security.path"
    first.unlink()
    with pytest.raises(BadInput) as caught:
        open_regular(path, "model")
    assert caught.value.id == "model.not-found"


def test_the_links_of_a_cache_are_resolved_once(tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text("x")
    (snapshot / "x.json").symlink_to("../../blobs/abc")
    path = inside(snapshot, "x.json", links_into=cache)
    with open_regular(path, "model") as file:
        assert file.read() == b"x"
    (tmp_path / "secret").write_text("secret")
    (blobs / "abc").unlink()
    (blobs / "abc").symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput) as caught:
        open_regular(path, "model")
    assert caught.value.id == "security.path"


def test_a_regular_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("x")
    for name in ("x", "link"):
        with open_regular(tmp_path / name, "data") as file:
            assert file.read() == b"abc"


def test_nothing_but_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # the address of a socket is short
        server.bind("socket")
        os.chdir(here)
        for name in ("fifo", "directory", "socket", "/dev/null", "/dev/zero"):
            with pytest.raises(BadInput, match="not a regular data file") as caught:
                open_regular(tmp_path / name, "data")
            assert caught.value.id == "data.not-a-file"
            assert caught.value.where.file == str(tmp_path / name)
    with pytest.raises(BadInput, match="is a directory"):
        open_regular(tmp_path / "directory", "recipe")


def test_a_file_that_turns_into_a_fifo_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    regular = os.stat(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path, **_: regular)
        with pytest.raises(BadInput, match="FIFO"):
            open_regular(tmp_path / "fifo", "data")


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(BadInput) as caught:
        open_regular(tmp_path / "trian.jsonl", "data")
    assert caught.value.id == "data.not-found"
    assert "train.jsonl" in caught.value.help
    for name in ("a\0b", "\ud800", "x" * 300, "train.jsonl/x", "no/such/x"):
        with pytest.raises(BadInput) as caught:
            open_regular(tmp_path / name, "data")
        assert caught.value.id == "data.not-found"
        assert str(caught.value.where).isprintable()


@pytest.mark.parametrize(
    ("family", "kind", "id"),
    [
        ("data", "encoding", "data.encoding"),
        ("adapter", "encoding", "adapter.bad-config"),
        ("adapter", "not-found", "adapter.not-found"),
        ("adapter", "damaged", "adapter.damaged"),
        ("model", "syntax", "model.bad-config"),
        ("model.bad-index", "syntax", "model.bad-index"),
        ("model.bad-index", "not-found", "model.not-found"),
        ("checkpoint", "syntax", "checkpoint.damaged"),
    ],
)
def test_a_family_names_its_errors(family: str, kind: str, id: str) -> None:
    error = file_error(family, kind, "x", where="y")
    assert error.id == id
    assert isinstance(error, RunFailed if id.endswith("damaged") else BadInput)


def test_an_unknown_family_is_a_bug() -> None:
    with pytest.raises(ValueError, match="nobody"):
        file_error("nobody", "syntax", "x", where="y")


def test_pickles_are_refused_with_the_safe_format(tmp_path: Path) -> None:
    for name in ("adapter_model.bin", "a/x.PT", "optimizer.pkl"):
        with pytest.raises(BadInput, match="pickle") as caught:
            refuse_pickle(name, tmp_path)
        assert caught.value.id == "security.pickle"
        assert "safetensors" in caught.value.help
    refuse_pickle("model.safetensors", tmp_path)
