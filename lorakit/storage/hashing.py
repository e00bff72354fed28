"""SHA-256 of files and of values, and the check of a file against the digest it should have."""

import hashlib
import json
from pathlib import Path

from lorakit.storage.disk import storage_errors
from lorakit.storage.paths import file_error, open_regular


def sha256_file(path: Path) -> str:
    """Return the digest of a file's bytes, in hex.

    Raises:
        RunFailed: when the disk cannot read it.
    """
    with storage_errors(path), path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """Return the digest of a JSON value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_sha256(path: Path, expected: str, family: str) -> None:
    """Check a file against the digest that its maker wrote down.

    Raises:
        RunFailed: `family.damaged`, with both digests, when they differ.
    """
    with open_regular(path, family) as file, storage_errors(path):
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        message = f"wrong checksum: expected sha256 {expected[:12]}…, found {found[:12]}…"
        raise file_error(
            family, "damaged", message, where=str(path), help="fetch or write the file again"
        )
