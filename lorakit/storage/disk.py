"""What the disk says: its errors in our words, its free space, and the order of durable writes."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import BadInput, LorakitError, RunFailed

RESERVE = 1 << 20  # bytes that a plan leaves free: log lines must still fit when the run stops

_COPIED = 64 << 20  # bytes in one call
_NO_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
_OS_ERROR = re.compile(r"\(os error (\d+)\)$")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def storage_error(error: OSError, path: Path, needed: int | None = None) -> LorakitError:
    """Return what the disk refused in our words, with the errno's name and, when full, the bytes.

    Args:
        error: what the system call raised.
        path: what was being written or read, as the user knows it.
        needed: bytes that had to fit, where the caller knows.
    """
    name = errno.errorcode.get(error.errno or 0, "no errno")
    message = f"{error.strerror or error} ({name})"
    if isinstance(error.filename, str) and error.filename != str(path):
        message += f" at {error.filename}"
    if error.errno in _FULL:
        wanted = "" if needed is None else f"{needed:,} bytes needed, "
        message += f": {wanted}{free_space(path):,} bytes available"
        help = "free some space, or write to another disk"
        return RunFailed("storage.full", message, where=str(path), help=help)
    if error.errno in _DENIED:
        help = "check the owner and the mode of the file and of its folder"
        return RunFailed("storage.denied", message, where=str(path), help=help)
    if error.errno == errno.ELOOP:
        return BadInput(
            "security.path", "is a symbolic link, which is never followed here", where=str(path)
        )
    long = error.errno == errno.ENAMETOOLONG
    help = "choose a shorter name" if long else "check the path and the disk, then run it again"
    return RunFailed("storage.io", message, where=str(path), help=help)


@contextmanager
def storage_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn every OSError of the block into a `storage_error` about `path`.

    So it is with what libraries written in Rust raise instead, a plain exception that names the
    number of the error.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(error, path, needed) from error
    except Exception as error:
        if (named := _OS_ERROR.search(str(error))) is None:
            raise
        number = int(named[1])
        raise storage_error(OSError(number, os.strerror(number)), path, needed) from error


def free_space(path: Path) -> int:
    """Return the bytes that may still be written at `path`, which need not exist yet."""
    for folder in (path, *path.absolute().parents):
        try:
            found = os.statvfs(folder)
        except OSError:
            continue
        return found.f_bavail * found.f_frsize
    return 0


def require_space(path: Path, needed: int) -> None:
    """Check that `needed` bytes and a small reserve fit at `path`.

    Raises:
        RunFailed: when they do not, with both numbers.
    """
    if free_space(path) < needed + RESERVE:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise storage_error(full, path, needed)


def sync(path: Path, mode: int | None = None) -> None:
    """Push a file's bytes or a folder's entries to the disk, its mode set first where one is given.

    After an error the kernel may have dropped the bytes: never sync again, write a new file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if mode is not None:
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create(path: Path, mode: int = 0o644) -> int:
    """Return the descriptor of a new file, open for reading and writing; it must not exist yet."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)


def write_all(descriptor: int, data: bytes | memoryview, offset: int = 0) -> None:
    """Write every byte at `offset`, however many calls that takes."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[count:], offset + count


def copy_all(source: int, target: int, start: int, end: int, offset: int) -> None:
    """Copy the bytes from `start` to `end` of one file to `offset` in another, in the kernel.

    A file system that can share blocks shares all that lie alike in both files: after the first,
    each call begins at a multiple of a block. Where the kernel will not, the bytes are read.
    """
    copy = getattr(os, "copy_file_range", _copy)  # not on macOS
    while start < end:
        step = min(end, (start // _COPIED + 1) * _COPIED) - start
        try:
            count = copy(source, target, step, start, offset)
        except OSError as error:
            if error.errno not in _NO_COPY or copy is _copy:
                raise
            copy = _copy
            continue
        if not count:
            raise OSError(errno.EIO, f"the file ends at byte {start:,}")
        start, offset = start + count, offset + count


def _copy(source: int, target: int, count: int, start: int, offset: int) -> int:
    data = os.pread(source, min(count, 1 << 20), start)
    write_all(target, data, offset)
    return len(data)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each entry pushed to the disk; it may exist already."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        os.mkdir(folder, 0o755)
    except FileExistsError:
        if not folder.is_dir():
            raise
    sync(folder.parent)


def append_line(path: Path, text: str) -> None:
    """Append one line in one write, so that lines of two processes never mix.

    A line that a crash tore off is ended first: it costs that line and not this one.

    Raises:
        RunFailed: when the disk refuses.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    with storage_errors(path, len(text)):
        descriptor = os.open(path, flags, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            line = b"\n" * torn + text.encode() + b"\n"
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
