"""Results that are absent, old or complete, and never half: written beside, synced, renamed."""

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorakit.errors import BadInput
from lorakit.storage.disk import (
    create,
    make_folder,
    require_space,
    storage_errors,
    sync,
    write_all,
)
from lorakit.storage.paths import NAME_BYTES, kind_of
from lorakit.storage.redact import printable, steers

# `tmp`: being written. `old`: moved aside for a new one. `trash`: being removed.
_ASIDE = re.compile(r"\.(?P<kind>tmp|old|trash)-(?P<name>.+)-(?P<pid>\d+)-[0-9a-f]{8}", re.DOTALL)


@contextmanager
def publish_folder(
    target: Path, *, replace: bool = False, needed: int | None = None
) -> Iterator[Path]:
    """Yield a new folder beside `target` that becomes `target` when the block ends well.

    Whatever the block writes below it is synced and gets its mode, 0644 or 0755 less the umask. On
    any exception it is removed; after a kill, the next publication of this target removes it.

    Args:
        target: where the result will stand; folders above it are made.
        replace: move an existing target aside, and remove it once the new one is in its place.
        needed: bytes that the block will write, checked first.

    Raises:
        BadInput: when `target` is there already, or is or lies in a symbolic link.
        RunFailed: when the disk refuses.
    """
    temporary = _beside(target, "tmp")
    with storage_errors(target, needed):
        _prepare(target, replace=replace)
        if needed is not None:
            require_space(target, needed)
        try:
            os.mkdir(temporary, 0o755)
            yield temporary
            _settle(temporary)
            _check(target, replace=replace)  # again: the block may have taken hours
            _put(temporary, target)
        finally:
            _delete(temporary)


def publish_file(target: Path, data: bytes, *, replace: bool = False, mode: int = 0o644) -> None:
    """Write one file so that a reader sees nothing, the old file or the whole new one.

    Raises:
        BadInput: when `target` is there already, or is or lies in a symbolic link.
        RunFailed: when the disk refuses.
    """
    temporary = _beside(target, "tmp")
    with storage_errors(target, len(data)):
        _prepare(target, replace=replace)
        try:
            descriptor = create(temporary, mode)
            try:
                write_all(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(temporary, target)
            sync(target.parent)
        finally:
            _delete(temporary)


def remove_folder(folder: Path) -> None:
    """Remove a folder; it is moved aside first, so that half of it never looks like the whole.

    Raises:
        RunFailed: when the disk refuses.
    """
    with storage_errors(folder):
        aside = _beside(folder, "trash")
        os.rename(folder, aside)
        try:
            sync(folder.parent)
        except OSError:
            os.rename(aside, folder)  # not aside for good, so not to be deleted: whole, as before
            raise
        _delete(aside)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left beside their targets, or beside the one called `name`.

    What was moved aside for a new one that never took its place is brought back.

    Raises:
        RunFailed: when the disk refuses.
    """
    with storage_errors(folder):
        for entry in os.listdir(folder):
            match = _ASIDE.fullmatch(entry)
            if not match or name not in (None, match["name"]) or _alive(int(match["pid"])):
                continue
            target = folder / match["name"]
            if match["kind"] == "old" and not os.path.lexists(target):
                os.rename(folder / entry, target)
            else:
                _delete(folder / entry)


def set_aside(folder: Path, name: str) -> None:
    """Give a folder another name beside its own, in place of what has it.

    Raises:
        RunFailed: when the disk refuses.
    """
    target = folder.with_name(name)
    with storage_errors(folder):
        if os.path.lexists(target):
            remove_folder(target)
        os.rename(folder, target)


def check_place(target: Path) -> None:
    """Check that something can be written at `target`: no link or device is there, no file above.

    Who may write to `/dev` would else put a file in the place of `/dev/null`; and a path that
    steers a terminal would do so wherever it is shown.

    Raises:
        BadInput: `security.path` or `output.not-empty`.
    """
    if character := steers(str(target)):
        message = f"holds the character {character}, which is not allowed in a path"
        raise BadInput("security.path", message, where=printable(str(target), 500))
    if any(len(os.fsencode(part)) > NAME_BYTES for part in target.parts):
        message = f"holds a name of more than {NAME_BYTES} bytes, which no file can have"
        raise BadInput("security.path", message, where=str(target))
    for path in (target, target.parent):
        if os.path.islink(path):
            raise BadInput(
                "security.path",
                "is a symbolic link; lorakit does not write through links",
                where=str(path),
                help=f"name the place it leads to: {os.path.realpath(path)}",
            )
    with suppress(FileNotFoundError, NotADirectoryError):
        mode = os.lstat(target).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            message = f"is a {kind_of(mode)}, which nothing takes the place of"
            help = "name a file or a folder that is not there"
            raise BadInput("output.not-empty", message, where=str(target), help=help)
    above = next((path for path in target.parents if os.path.lexists(path)), None)
    if above is not None and not os.path.isdir(above):
        message = f"{above} is a file, so nothing can be written below it"
        raise BadInput("output.not-empty", message, where=str(target), help="choose another place")


def check_file(target: Path, *, replace: bool = False) -> None:
    """Check that `publish_file` may write there, before the work whose result it will hold.

    Raises:
        BadInput: `security.path` or `output.not-empty`; a file that is there may be replaced.
    """
    check_place(target)
    if os.path.isdir(target):
        message = "is a folder; the name of a file was expected"
        raise BadInput("output.not-empty", message, where=str(target), help="name a file in it")
    _check(target, replace=replace)


def is_aside(name: str) -> bool:
    """Tell whether an entry is what a publication keeps beside its target until it has ended."""
    return _ASIDE.fullmatch(name) is not None


def _beside(target: Path, kind: str) -> Path:
    return target.parent / f".{kind}-{target.name}-{os.getpid()}-{secrets.token_hex(4)}"


def _prepare(target: Path, *, replace: bool) -> None:
    _check(target, replace=replace)
    make_folder(target.parent)
    sweep(target.parent, target.name)
    _check(target, replace=replace)  # again: what a kill left aside may be back


def _check(target: Path, *, replace: bool) -> None:
    check_place(target)
    if not replace and os.path.lexists(target) and not _is_empty_folder(target):
        raise BadInput("output.not-empty", "is there already", where=str(target))


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not os.listdir(path)


def _settle(folder: Path) -> None:
    """Give all below `folder` its mode and push it to the disk, entries before their folders."""
    mode = stat.S_IMODE(os.lstat(folder).st_mode)  # 0755 less the umask: mkdir took it off
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name), mode & 0o644)
        sync(Path(parent), mode)


def _put(temporary: Path, target: Path) -> None:
    """Rename a settled folder to `target`, an older one moved aside for it."""
    old = _beside(target, "old")
    had_old, placed = os.path.lexists(target), False
    if had_old:
        os.rename(target, old)
    try:
        os.rename(temporary, target)
        placed = True
        sync(target.parent)
    finally:
        if had_old and not placed:
            _bring_back(old, target)
        _delete(old)


def _bring_back(old: Path, target: Path) -> None:
    """Rename what was moved aside to `target`, unless somebody else's folder has come there."""
    try:
        os.rename(old, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise  # it stays aside, and the next publication brings it back


def _delete(path: Path) -> None:
    """Delete a file or folder that nobody looks for; what cannot go now is swept another time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's, or no pid of this machine: leave it
        pass
    return True
