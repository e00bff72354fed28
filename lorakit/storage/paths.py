"""Paths that cannot leave their folder, and files that are nothing but files.

Names that come from a file (a shard in an index, an entry of a manifest) are text from a stranger:
`inside` is the only way to make a path of one, and what it checked is what `open_regular` opens.
"""

import errno
import os
import stat
from difflib import get_close_matches
from io import BufferedReader
from pathlib import Path, PosixPath

from lorakit.errors import BadInput, LorakitError, Place, RunFailed, one_of
from lorakit.storage.disk import storage_error
from lorakit.storage.redact import printable

NAME_BYTES = 255  # the longest name of a file on any common file system
PICKLES = frozenset(".bin .ckpt .dill .joblib .pickle .pkl .pt .pth".split())

_KINDS = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "FIFO",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFSOCK: "socket",
    stat.S_IFLNK: "symbolic link",
}
# What to do about a file of a family, or about one fault of it, when nothing better is known.
_REMEDIES = {
    "adapter": "save the adapter again, or fetch it again",
    "checkpoint": "bring the file back as it was, or start again with --overwrite",
    "data": "put the file right, or name another in the recipe",
    "data.not-found": "put the file there, or name another in the recipe",
    "data.empty": "write rows into it, or name another file in the recipe",
    "data.syntax": "correct this place, or take the row out; keys and texts stand in double quotes",
    "model": "fetch the model again, or name another with model.path",
    "recipe.not-a-file": "name a .yaml file, a packaged recipe, or the folder of a finished run",
    "tokenizer": "fetch the tokenizer's files again",
}
_NOT_FOUND = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}


def file_error(
    family: str, kind: str, message: str, *, where: Place | str, help: str | None = None
) -> LorakitError:
    """Return the error of a family of files: `family.kind` where there is such an id.

    Else the family's word for anything wrong: `family.bad-config` (what people edit) or
    `family.damaged`. A family written as an id (`model.bad-index`) has that one as its word.
    """
    name = family.partition(".")[0]
    for id in (f"{name}.{kind}", family, f"{name}.bad-config", f"{name}.damaged"):
        for error in (BadInput, RunFailed):
            if id in error.ids:
                help = help or _REMEDIES.get(id) or _REMEDIES.get(name)
                return error(id, message, where=where, help=help)
    raise ValueError(f"no error has the id {name}.{kind}")


class Inside(PosixPath):
    """A path below `root` that was checked. It is opened part by part, and never over a link.

    So nobody who changes the folder after the check can lead outside.
    """

    root_folder: Path

    @classmethod
    def of(cls, root: Path, path: Path) -> "Inside":
        """Return a path as one that lies below a root."""
        found = cls(path)
        found.root_folder = root
        return found

    def descriptor(self) -> int:
        """Open the file for reading.

        Raises:
            OSError: ELOOP where a link has come to stand in the way.
        """
        *above, name = self.relative_to(self.root_folder).parts
        folder = os.open(self.root_folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in above:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = below
            return os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=folder)
        except NotADirectoryError as error:  # what Linux says of a link to a directory
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(self)) from error
        finally:
            os.close(folder)


def inside(folder: Path, name: str, *, links_into: Path | None = None) -> Inside:
    """Return `folder/name` for a name from a stranger; the file may be missing.

    Args:
        folder: the folder that must not be left.
        name: components joined by `/`.
        links_into: a cache that keeps its files behind links; links that end in it are resolved.

    Raises:
        BadInput: `security.path` when the name leads outside, over a link, or to no regular file.
    """

    def refused(why: str) -> BadInput:
        message = f"the entry '{printable(name)}' {why}"
        help = "put the file itself there: only regular files below the folder are opened"
        return BadInput("security.path", message, where=str(folder), help=help)

    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise refused("would lead outside; a name below the folder was expected")
    root, path = folder, folder
    for depth, part in enumerate(parts, start=1):
        path = path / part
        try:
            if links_into is not None and path.is_symlink():
                root, path = links_into.resolve(), Path(os.path.realpath(path, strict=True))
                if not path.is_relative_to(root):
                    raise refused("is a link that leads outside")
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return Inside.of(folder, folder / name)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise refused("is longer than the name of a file can be") from None
            raise storage_error(error, path) from error
        if stat.S_ISLNK(mode):
            raise refused("is a symbolic link, which may lead outside")
        wanted = stat.S_IFREG if depth == len(parts) else stat.S_IFDIR
        if stat.S_IFMT(mode) != wanted:
            raise refused(f"was expected to be a {_KINDS[wanted]}; {part} is a {kind_of(mode)}")
    return Inside.of(root, path)


def hub_cache(folder: Path) -> Path | None:
    """Return the cache of the hub that a folder is a snapshot of, where its links may end."""
    cache = folder.resolve().parent.parent
    is_snapshot = folder.resolve().parent.name == "snapshots" and (cache / "blobs").is_dir()
    return cache if is_snapshot else None


def open_regular(path: Path, family: str) -> BufferedReader:
    """Open a file for reading; a FIFO, device, socket or directory is never read.

    Raises:
        BadInput: `family.not-found`, with names that are near, or `family.not-a-file`;
            `security.path` when a checked path leads over a link by now.
        RunFailed: when the disk refuses.
    """
    checked = path if isinstance(path, Inside) else None
    try:
        # Before open: opening a device can already act on it.
        mode = os.stat(path, follow_symlinks=checked is None).st_mode
        if stat.S_ISREG(mode) or (checked and stat.S_ISLNK(mode)):
            opened = checked.descriptor() if checked else os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            file = open(opened, "rb")  # noqa: SIM115
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode):
                return file
            file.close()
    except ValueError:  # a NUL or a lone surrogate
        raise _not_found(path, family) from None
    except OSError as error:
        if error.errno in _NOT_FOUND - ({errno.ELOOP} if checked else set()):
            raise _not_found(path, family) from None
        raise storage_error(error, path) from error
    message = f"not a regular {family.partition('.')[0]} file: is a {kind_of(mode)}"
    raise file_error(family, "not-a-file", message, where=str(path))


def refuse_pickle(name: str, where: Path) -> None:
    """Refuse a file that by its ending may be a pickle.

    Raises:
        BadInput: `security.pickle`.
    """
    if Path(name).suffix.lower() in PICKLES:
        raise BadInput(
            "security.pickle",
            f"'{printable(name)}' may be a pickle, which runs code when it is loaded",
            where=str(where),
            help="convert it to .safetensors with the tool that wrote it",
        )


def kind_of(mode: int) -> str:
    """Return what a file of this mode is, in words."""
    return _KINDS.get(stat.S_IFMT(mode), "special file")


def _not_found(path: Path, family: str) -> LorakitError:
    try:
        others = [name for name in os.listdir(path.parent) if name != path.name]
        near = get_close_matches(path.name, others, n=3)
    except (OSError, ValueError):
        near = []
    help = f"near it there is {one_of(map(printable, near))}" if near else None
    message = "the link leads nowhere" if os.path.islink(path) else "there is no such file"
    return file_error(family, "not-found", message, where=printable(str(path), 500), help=help)
