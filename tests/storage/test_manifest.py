import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.errors import BadInput
from lorakit.storage.manifest import check_manifest, write_manifest
from lorakit.storage.strict_json import dumps

FILES = {"a.txt": b"abc", "empty": b"", "sub/b.bytes": bytes(range(64))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    write_manifest(folder)
    return folder


def test_a_folder_as_it_was_written_is_good(folder: Path) -> None:
    assert check_manifest(folder) is None
    listed = json.loads((folder / "manifest.json").read_bytes())
    assert listed["schema"] == 1
    assert set(listed["files"]) == set(FILES)


def test_every_flipped_bit_is_found(folder: Path) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        good = path.read_bytes()
        for at in range(0, len(good), 3):
            bad = bytearray(good)
            bad[at] ^= 1 << (at % 8)
            path.write_bytes(bad)
            assert check_manifest(folder) is not None, (path.name, at)
        path.write_bytes(good)
    assert check_manifest(folder) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: (f / "manifest.json").unlink(), "no manifest"),
        (lambda f: shutil.rmtree(f), "no manifest"),
        (lambda f: (f / "manifest.json").write_text("{"), "damaged manifest"),
        (lambda f: (f / "manifest.json").write_text("[]"), "damaged manifest"),
        (lambda f: (f / "manifest.json").write_text('{"schema": 1}'), "damaged manifest"),
        (
            lambda f: (f / "manifest.json").write_text(dumps({"schema": 2, "files": {}})),
            "damaged manifest",
        ),
        (lambda f: (f / "a.txt").unlink(), "missing a.txt"),
        (lambda f: (f / "sub/b.bytes").write_bytes(b"x"), "size sub/b.bytes"),
        (lambda f: (f / "a.txt").write_bytes(b"abd"), "checksum a.txt"),
        (lambda f: (f / "more.txt").write_bytes(b""), "unexpected more.txt"),
        (lambda f: os.replace(f / "a.txt", f / "b.txt"), "missing a.txt"),
        (lambda f: (f / "emptied").mkdir(), None),
    ],
)
def test_each_reason_is_named(
    folder: Path, change: Callable[[Path], object], reason: str | None
) -> None:
    change(folder)
    assert check_manifest(folder) == reason


@pytest.mark.parametrize("name", ["x.pt", "x.BIN", "sub/x.pkl", "x.pth", "x.ckpt"])
def test_a_pickle_is_refused_by_its_name(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    with pytest.raises(BadInput, match="pickle") as caught:
        check_manifest(folder)
    assert caught.value.id == "security.pickle"
    assert name in caught.value.message


def test_links_and_devices_are_refused(folder: Path) -> None:
    for make in (lambda p: p.symlink_to("a.txt"), lambda p: p.symlink_to("sub"), os.mkfifo):
        path = folder / "strange"
        make(path)
        with pytest.raises(BadInput, match="strange") as caught:
            check_manifest(folder)
        assert caught.value.id == "security.path"
        path.unlink()
