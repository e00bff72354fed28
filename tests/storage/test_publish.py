import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorakit.errors import BadInput, LorakitError, RunFailed
from lorakit.storage import publish
from lorakit.storage.manifest import check_manifest, write_manifest
from lorakit.storage.publish import (
    publish_file,
    publish_folder,
    remove_folder,
    set_aside,
    sweep,
)
from tests.storage.kills import beside, calls, contents, kills, refusals

OLD = {"a.txt": b"old", "sub/b.txt": b"old too", "gone.txt": b"x"}
NEW = {"a.txt": b"new", "sub/b.txt": b"new too"}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    write_manifest(folder)


def put(target: Path, files: dict[str, bytes] = NEW, *, replace: bool = True) -> None:
    with publish_folder(target, replace=replace) as folder:
        write(folder, files)


def version(target: Path) -> str:
    """Say which whole version stands at `target`; anything else is an error."""
    found = contents(target)
    if found is None:
        return "absent"
    assert check_manifest(target) is None
    del found["manifest.json"]
    assert found in (OLD, NEW)
    return "old" if found == OLD else "new"


@pytest.fixture
def dead_pid() -> int:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    return child


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_kill_before_any_call_leaves_nothing_or_the_whole(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "out"
    seen = set()
    for count in kills(lambda: put(target)):  # noqa: B007
        seen.add(version(target))
        put(target)  # nothing needs repair
        assert not beside(target.parent)
        remove_folder(target)
    assert version(target) == "new"
    assert seen == {"absent", "new"}
    assert count > 20


def test_a_kill_while_replacing_leaves_nothing_the_old_or_the_new(tmp_path: Path) -> None:
    target = tmp_path / "out"
    put(target, OLD)
    seen = []
    for _ in kills(lambda: put(target)):
        seen.append(version(target))
        put(target, OLD)
        assert not beside(tmp_path)
    assert version(target) == "new"
    assert set(seen) == {"old", "absent", "new"}
    assert seen.count("absent") == 1  # between the two renames


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    put(target, OLD)
    absent = 0
    for _ in kills(lambda: put(target)):
        absent += not target.exists()
        sweep(tmp_path)
        assert version(target) in ("old", "new")
        assert not beside(tmp_path)
        put(target, OLD)
    assert absent == 1


def test_what_a_kill_left_aside_is_not_replaced_unasked(tmp_path: Path, dead_pid: int) -> None:
    put(tmp_path / "out", OLD)
    (tmp_path / "out").rename(tmp_path / f".old-out-{dead_pid}-0123abcd")
    with pytest.raises(BadInput) as caught:
        put(tmp_path / "out", replace=False)
    assert caught.value.id == "output.not-empty"
    assert version(tmp_path / "out") == "old"


def test_a_folder_set_aside_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    for files in (OLD, NEW):
        put(tmp_path / "out", files)
        set_aside(tmp_path / "out", ".bad-out")
    assert [path.name for path in tmp_path.iterdir()] == [".bad-out"]
    assert version(tmp_path / ".bad-out") == "new"


def test_two_who_replace_the_same_folder_leave_nothing_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "out", os.rename
    put(target, OLD)

    def beaten(source: Path, to: Path) -> None:
        """Another process's folder comes just after this one was refused its place."""
        if to == target and source.name.startswith(".tmp-"):
            raise OSError(errno.EIO, "refused")
        if to == target and source.name.startswith(".old-"):
            target.mkdir()
            (target / "theirs").write_bytes(b"whole")
        rename(source, to)

    monkeypatch.setattr(os, "rename", beaten)
    with pytest.raises(RunFailed):
        put(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["theirs"]


def test_the_old_does_not_return_when_the_new_was_moved_aside_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, sync = tmp_path / "out", publish.sync
    put(target, OLD)

    def moved(path: Path, *mode: int) -> None:
        sync(path, *mode)
        if path == tmp_path and target.exists():
            target.rename(tmp_path / "new, moved aside")

    monkeypatch.setattr(publish, "sync", moved)
    put(target)
    assert [path.name for path in tmp_path.iterdir()] == ["new, moved aside"]


def test_a_kill_while_replacing_a_file_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    target = tmp_path / "run.json"
    target.write_bytes(b"old")
    seen = set()
    for _ in kills(lambda: publish_file(target, b"new", replace=True)):
        seen.add(target.read_bytes())
        publish_file(target, b"old", replace=True)
        assert not beside(tmp_path)
    assert target.read_bytes() == b"new"
    assert seen == {b"old", b"new"}


def test_a_kill_while_removing_leaves_the_whole_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "step"
    put(target, OLD)
    seen = set()
    for _ in kills(lambda: remove_folder(target)):
        seen.add(version(target))
        sweep(tmp_path)
        assert not beside(tmp_path)
        put(target, OLD)
    assert seen == {"old", "absent"}
    assert not target.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
def test_a_refusing_disk_leaves_the_old_one_and_no_temporary(tmp_path: Path, code: int) -> None:
    target = tmp_path / "out"
    put(target, OLD)
    refused = 0
    for _, error in refusals(lambda: put(target), code):
        if error is None:  # the new one is in its place, and the old one could not be deleted
            assert version(target) == "new"
        else:
            assert isinstance(error, RunFailed)
            assert error.id in ("storage.full", "storage.io", "storage.denied")
            assert errno.errorcode[code] in error.message
            assert not beside(tmp_path)
            refused += version(target) == "old"
        put(target, OLD)
    assert refused > 10


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_refusing_disk_leaves_the_old_file(tmp_path: Path, code: int) -> None:
    target = tmp_path / "run.json"
    publish_file(target, b"old")
    for _, error in refusals(lambda: publish_file(target, b"new", replace=True), code):
        assert isinstance(error, RunFailed)
        assert not beside(tmp_path)
        assert target.read_bytes() in (b"old", b"new")
        publish_file(target, b"old", replace=True)


def test_everything_is_synced_before_the_rename_and_the_parent_after(tmp_path: Path) -> None:
    target = tmp_path / "out"
    log = calls(lambda: put(target))
    [rename] = [at for at, (name, _) in enumerate(log) if name == "rename"]
    temporary = Path(log[rename][1])
    synced = [Path(path) for name, path in log[:rename] if name == "fsync"]
    below = [temporary, *(temporary / path.relative_to(target) for path in target.rglob("*"))]
    assert sorted(synced) == sorted(below)
    for path in below:  # an entry is durable before the folder that names it
        assert all(synced.index(path) < synced.index(up) for up in path.parents if up in synced)
    assert ("fsync", str(tmp_path)) in log[rename:]
    assert {name for name, _ in log[rename + 1 :]} <= {"open", "fsync", "unlink"}


def test_a_file_is_synced_before_its_rename_and_the_folder_after(tmp_path: Path) -> None:
    log = calls(lambda: publish_file(tmp_path / "run.json", b"x"))
    names = [name for name, _ in log if name not in ("open", "unlink")]
    assert names == ["pwrite", "fsync", "rename", "fsync"]
    assert log[-2] == ("fsync", str(tmp_path))


def test_a_folder_is_deleted_after_it_was_durably_moved_aside(tmp_path: Path) -> None:
    put(tmp_path / "step", OLD)
    log = calls(lambda: remove_folder(tmp_path / "step"))
    names = [name for name, _ in log if name != "open"]
    assert names[:2] == ["rename", "fsync"]
    assert set(names[2:]) == {"unlink", "rmdir"}


def test_an_exception_removes_what_was_begun(tmp_path: Path) -> None:
    def fail(error: BaseException) -> None:
        with publish_folder(tmp_path / "out") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "a").write_text("half")
            raise error

    for error in (ValueError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
        assert os.listdir(tmp_path) == []
    with pytest.raises(RunFailed) as caught:
        fail(OSError(errno.ENOSPC, "No space left on device"))
    assert caught.value.id == "storage.full"
    assert caught.value.where.file == str(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    put(target, OLD)
    file = tmp_path / "file"
    file.write_text("mine")
    for refused in (
        lambda: put(target, replace=False),
        lambda: put(file, replace=False),
        lambda: publish_file(file, b"x"),
        lambda: publish_file(target, b"x"),
    ):
        with pytest.raises(BadInput) as caught:
            refused()
        assert caught.value.id == "output.not-empty"
    assert version(target) == "old"
    assert file.read_text() == "mine"
    assert not beside(tmp_path)


def test_an_empty_folder_may_become_the_result(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path / "empty", replace=False)
    assert version(tmp_path / "empty") == "new"


@pytest.mark.parametrize("replace", [False, True])
def test_nothing_is_written_through_a_link(tmp_path: Path, replace: bool) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = tmp_path / "link"
    link.symlink_to(elsewhere, target_is_directory=True)
    (tmp_path / "loop").symlink_to("loop")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nothing")
    for target in (link, link / "out", dangling, tmp_path / "loop"):
        for write_it in (
            lambda target: put(target, replace=replace),
            lambda target: publish_file(target, b"x", replace=replace),
        ):
            with pytest.raises(BadInput) as caught:
                write_it(target)
            assert caught.value.id == "security.path"
    assert os.listdir(elsewhere) == []
    assert sorted(os.listdir(tmp_path)) == ["dangling", "elsewhere", "link", "loop"]


def test_modes_are_those_of_the_umask(tmp_path: Path, umask: int) -> None:
    with publish_folder(tmp_path / "new" / "out") as folder:
        (folder / "sub").mkdir(mode=0o700)
        (folder / "sub" / "a").write_text("x")
        (folder / "sub" / "a").chmod(0o600)
    publish_file(tmp_path / "file", b"x")
    publish_file(tmp_path / "private", b"x", mode=0o600)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes.pop(tmp_path / "private") == 0o600
    assert modes == {path: (0o755 if path.is_dir() else 0o644) & ~umask for path in modes}
    assert len(modes) == 5


def test_sweep_takes_what_dead_processes_left_and_nothing_else(
    tmp_path: Path, dead_pid: int
) -> None:
    stale = [f".tmp-out-{dead_pid}-0123abcd", f".trash-a-b\n-{dead_pid}-0123abcd"]
    kept = [
        f".tmp-out-{os.getpid()}-0123abcd",
        ".tmp-out-1-0123abcd",
        f".tmp-out-{10**30}-0123abcd",
        f".tmp-out-{dead_pid}",
        f"tmp-out-{dead_pid}-0123abcd",
        "out",
    ]
    for name in (*stale, *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    sweep(tmp_path, "other")
    assert len(os.listdir(tmp_path)) == len(stale) + len(kept)
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_a_link_that_was_left_behind_is_removed_and_not_followed(
    tmp_path: Path, dead_pid: int
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (tmp_path / f".trash-out-{dead_pid}-0123abcd").symlink_to(precious)
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["precious"]
    assert os.listdir(precious) == ["file"]


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disk:
        f_bavail, f_frsize = 3, 1_000_000

    monkeypatch.setattr(os, "statvfs", lambda _: Disk)
    with pytest.raises(RunFailed) as caught, publish_folder(tmp_path / "out", needed=12_345_678):
        pytest.fail("the block must not begin")
    assert caught.value.id == "storage.full"
    assert "12,345,678" in caught.value.message
    assert "3,000,000" in caught.value.message
    assert os.listdir(tmp_path) == []


def test_of_two_publications_of_one_target_the_later_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def put_both() -> None:
        with publish_folder(target) as later:
            write(later, NEW)
            put(target, OLD, replace=False)

    with pytest.raises(BadInput) as caught:
        put_both()
    assert caught.value.id == "output.not-empty"
    assert version(target) == "old"
    assert not beside(tmp_path)


def test_a_failing_second_rename_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    put(target, OLD)
    real: Callable[..., None] = os.rename

    def rename(old: Path, new: Path) -> None:
        if ".tmp-" in str(old):
            raise OSError(errno.EIO, "Input/output error")
        real(old, new)

    monkeypatch.setattr(publish.os, "rename", rename)
    with pytest.raises(LorakitError):
        put(target)
    assert version(target) == "old"
    assert not beside(tmp_path)


def test_the_working_folder_is_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in (Path("."), Path("..")):
        for replace in (False, True):
            with pytest.raises(LorakitError):
                put(target, replace=replace)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]
