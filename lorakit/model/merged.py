"""A model folder that a merge wrote: its report says what each file must be."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.storage import strict_json
from lorakit.storage.hashing import check_sha256, sha256_file
from lorakit.storage.paths import file_error, inside

REPORT = "merge_report.json"


def texts_of(folder: Path, tensors: set[str]) -> dict[str, str]:
    """Return the digest of every file of a merge but those of tensors."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: sha256_file(path) for path in files if path.name not in tensors}


def check_texts(folder: Path) -> None:
    """Check the settings and the tokenizer of a merge against its report; of others nothing.

    Raises:
        RunFailed: `model.damaged` when one is missing or not as it was written.
    """
    _check(folder, _listed(folder, "texts"))


def check_shards(folder: Path) -> None:
    """Check the files of tensors of a merge against its report; of others nothing.

    Raises:
        RunFailed: `model.damaged` when one is missing or not as it was written.
    """
    _check(folder, _listed(folder, "shards"))


def _listed(folder: Path, part: str) -> Iterator[tuple[str, str]]:
    """Yield name and digest of each file that a part of the report lists."""
    path = folder / REPORT
    if not path.is_file():
        return
    try:
        listed: Any = strict_json.read_object(path, "model")[part]
        pairs = listed.items() if part == "texts" else [(s["file"], s["sha256"]) for s in listed]
        yield from [(str(name), str(digest)) for name, digest in pairs]
    except (KeyError, TypeError, AttributeError):
        message = f"{part} are not listed as a merge lists them"
        raise file_error("model", "damaged", message, where=str(path)) from None


def _check(folder: Path, listed: Iterator[tuple[str, str]]) -> None:
    for name, digest in listed:
        path = inside(folder, name)
        if not path.is_file():
            message = f"the merge wrote {name}, which is missing"
            raise file_error("model", "damaged", message, where=str(folder), help="merge again")
        check_sha256(path, digest, "model")
