"""Who else on this machine may put something in the place of what is read or written."""

import os
import stat
from pathlib import Path

from lorakit.errors import Notice, Place
from lorakit.storage.disk import storage_errors


def open_to_all(path: Path) -> Notice | None:
    """Return a warning when every account may rename or replace what stands at `path`.

    So it is in a folder that all may write to and that has no sticky bit, unless it lies in one
    that others cannot enter. File systems that know no modes show all their folders like that,
    so it is not refused.

    Raises:
        RunFailed: when the disk refuses.
    """
    place = Path(os.path.realpath(path))
    for folder in (*reversed(place.parents), place):
        if not folder.is_dir():
            return None
        with storage_errors(folder):
            mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            return None
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return Notice(
                "output.open-to-all",
                "every account of this machine may rename and replace what is in this folder",
                Place(str(folder)),
                help=f"chmod o-w {folder}, or choose another folder with --out",
            )
    return None


def of_another(folder: Path) -> Notice | None:
    """Return a warning when another account owns a folder or something in it.

    Raises:
        RunFailed: when the disk refuses.
    """
    with storage_errors(folder):
        for path in (folder, *sorted(folder.rglob("*"))):
            owner = path.lstat().st_uid
            if owner != os.geteuid():
                return Notice(
                    "checkpoint.of-another",
                    f"uid {owner} owns it and this is uid {os.geteuid()}: "
                    "go on from it only when you trust that account",
                    Place(str(path)),
                )
    return None
