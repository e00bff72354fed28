import errno
import os
from pathlib import Path

import pytest

from lorakit.errors import BadInput, RunFailed
from lorakit.storage.disk import (
    append_line,
    copy_all,
    create,
    free_space,
    make_folder,
    require_space,
    storage_error,
    storage_errors,
    write_all,
)
from tests.storage.kills import calls


@pytest.mark.parametrize(
    ("code", "id"),
    [
        (errno.ENOSPC, "storage.full"),
        (errno.EDQUOT, "storage.full"),
        (errno.EFBIG, "storage.full"),
        (errno.EACCES, "storage.denied"),
        (errno.EPERM, "storage.denied"),
        (errno.EROFS, "storage.denied"),
        (errno.EIO, "storage.io"),
        (errno.ESTALE, "storage.io"),
        (errno.ELOOP, "security.path"),
    ],
)
def test_an_error_says_path_errno_and_bytes(tmp_path: Path, code: int, id: str) -> None:
    error = storage_error(OSError(code, os.strerror(code), "/other"), tmp_path, 1234)
    assert error.id == id
    assert isinstance(error, BadInput if code == errno.ELOOP else RunFailed)
    assert error.where.file == str(tmp_path)
    if id != "security.path":
        assert errno.errorcode[code] in error.message
        assert "/other" in error.message
    if id == "storage.full":
        assert "1,234 bytes needed" in error.message
        assert "bytes available" in error.message


def test_an_error_without_errno_is_one_of_the_disk(tmp_path: Path) -> None:
    assert storage_error(OSError("odd"), tmp_path).id == "storage.io"


def test_free_space_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    assert free_space(tmp_path / "not" / "there") > 0
    require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(RunFailed, match="needed"):
        require_space(tmp_path, 1 << 62)


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))
    descriptor = create(tmp_path / "file")
    write_all(descriptor, b"0123456789", 2)
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"\0\x000123456789"


@pytest.mark.parametrize("refusal", [None, errno.EXDEV, errno.EINVAL])
@pytest.mark.parametrize("most", [1, 7, 100])
def test_bytes_are_copied_whatever_the_kernel_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int | None, most: int
) -> None:
    """In calls that begin at multiples of a block; short ones go on; refused ones are read."""
    real, begins = os.copy_file_range, []

    def copy(source: int, target: int, count: int, start: int, offset: int) -> int:
        if refusal and start > 40:
            raise OSError(refusal, os.strerror(refusal))
        begins.append((start, count))
        return real(source, target, min(count, most), start, offset)

    monkeypatch.setattr(os, "copy_file_range", copy)
    monkeypatch.setattr("lorakit.storage.disk._COPIED", 16)
    data = bytes(range(100))
    (tmp_path / "from").write_bytes(data)
    source, target = os.open(tmp_path / "from", os.O_RDONLY), create(tmp_path / "to")
    try:
        copy_all(source, target, 10, 90, 5)
        assert all(start // 16 == (start + count - 1) // 16 for start, count in begins)
        with pytest.raises(OSError, match="the file ends at byte 100"):
            copy_all(source, target, 50, 101, 5)
    finally:
        os.close(source)
        os.close(target)
    assert (tmp_path / "to").read_bytes()[:85] == bytes(5) + data[50:100] + data[60:90]


def test_a_new_file_is_really_new(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "file").write_text("x")
    for name in ("link", "file"):
        with pytest.raises(FileExistsError):
            create(tmp_path / name)
    assert not (tmp_path / "target").exists()


def test_each_new_folder_is_synced_into_the_one_above(tmp_path: Path) -> None:
    log = calls(lambda: make_folder(tmp_path / "a" / "b"))
    done = [(name, path) for name, path in log if name != "open"]
    assert done == [
        ("mkdir", str(tmp_path / "a")),
        ("fsync", str(tmp_path)),
        ("mkdir", str(tmp_path / "a" / "b")),
        ("fsync", str(tmp_path / "a")),
    ]
    assert calls(lambda: make_folder(tmp_path / "a" / "b")) == []


def test_a_file_in_the_way_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(OSError, match="a"):
        make_folder(tmp_path / "a" / "b")


def test_lines_are_appended_in_one_write_and_after_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, '{"step": 1}')
    path.write_bytes(path.read_bytes() + b'{"st')
    log = calls(lambda: append_line(path, '{"text": "ü"}'))
    assert [name for name, _ in log] == ["open", "write"]
    assert path.read_bytes() == '{"step": 1}\n{"st\n{"text": "ü"}\n'.encode()


def test_lines_are_not_appended_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(BadInput) as caught:
        append_line(tmp_path / "link", "y")
    assert caught.value.id == "security.path"
    assert (tmp_path / "target").read_text() == "x"


def test_half_an_appended_line_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", lambda fd, data: len(data) - 1)
    with pytest.raises(RunFailed) as caught:
        append_line(tmp_path / "log", "abc")
    assert caught.value.id == "storage.full"


def test_what_rust_says_of_the_disk_is_understood(tmp_path: Path) -> None:
    """As the tokenizers do when their file does not fit."""
    with pytest.raises(RunFailed, match="EFBIG") as refused, storage_errors(tmp_path):
        raise Exception("File too large (os error 27)")
    assert refused.value.id == "storage.full"
    with pytest.raises(ValueError, match="else"), storage_errors(tmp_path):
        raise ValueError("something else (os error 27) within")
