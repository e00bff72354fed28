"""The list of a folder's files with size and SHA-256, written last."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.errors import BadInput, LorakitError
from lorakit.storage import strict_json
from lorakit.storage.disk import create, storage_errors, write_all
from lorakit.storage.hashing import sha256_file
from lorakit.storage.paths import kind_of, refuse_pickle
from lorakit.storage.redact import printable

NAME = "manifest.json"
SCHEMA = 1


def write_manifest(folder: Path) -> None:
    """Write down the size and SHA-256 of every file below `folder`.

    Raises:
        RunFailed: when the disk refuses.
    """
    with storage_errors(folder):
        files = {
            name: {"size": path.stat().st_size, "sha256": sha256_file(path)}
            for name, path in sorted(_files(folder))
        }
        descriptor = create(folder / NAME)
        try:
            write_all(descriptor, strict_json.dumps({"schema": SCHEMA, "files": files}).encode())
        finally:
            os.close(descriptor)


def check_manifest(folder: Path) -> str | None:
    """Return why the files below `folder` are not those of its manifest; None when they are.

    Raises:
        BadInput: `security.pickle` or `security.path` when there is a pickle or a symbolic link.
        RunFailed: when the disk cannot be read.
    """
    with storage_errors(folder):
        found = dict(_files(folder))
        for name in found:
            refuse_pickle(name, folder)
        manifest = found.pop(NAME, None)
        if manifest is None:
            return "no manifest"
        listed = _listed(manifest)
        if listed is None:
            return "damaged manifest"
        for name in sorted(listed.keys() | found.keys()):
            if name not in found:
                return f"missing {printable(name)}"
            if name not in listed:
                return f"unexpected {printable(name)}"
            if found[name].stat().st_size != listed[name].get("size"):
                return f"size {name}"
        wrong = (
            name for name, path in found.items() if sha256_file(path) != listed[name].get("sha256")
        )
        return next((f"checksum {name}" for name in wrong), None)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield each file below `folder` with its name; links and devices are refused."""
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        name = path.relative_to(folder).as_posix()
        if stat.S_ISREG(mode):
            yield name, path
        elif not stat.S_ISDIR(mode):
            message = f"'{printable(name)}' is a {kind_of(mode)}, which may lead outside"
            help = "no run wrote it: remove it"
            raise BadInput("security.path", message, where=str(folder), help=help)


def _listed(manifest: Path) -> dict[str, Any] | None:
    """Read the manifest's files; None when a byte of it is not as it was written."""
    try:
        content = strict_json.read(manifest, "checkpoint")
    except LorakitError:
        return None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return None
    files = content.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return None
    return files
