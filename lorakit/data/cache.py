"""Tokenised data that outlives a run, so that the next start finds it done.

An entry is a folder named by a digest of all that its rows depend on: the bytes of the data files,
the settings, the template, the tokenizer and this code. It is published whole, and checked whole
before anything in it is believed; then it is mapped, so that rows are read when they are asked for
and processes share them. What cannot be used is made again, and what cannot be kept is not: the
cache never ends a run. Entries may be removed at any time; the ones longest unused go by
themselves.
"""

import importlib.metadata
import itertools
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lorakit import __version__
from lorakit.data.items import Request
from lorakit.data.prepare import Dataset, longest_allowed, prepare, renderer_of
from lorakit.data.report import Counts, Report
from lorakit.data.source import digest
from lorakit.data.tokens import TABLE, Example, Examples, Prompt
from lorakit.errors import LorakitError, Notice, Place
from lorakit.model.inputs import MASKED
from lorakit.storage import strict_json
from lorakit.storage.disk import make_folder
from lorakit.storage.hashing import sha256_file, sha256_json
from lorakit.storage.manifest import check_manifest, write_manifest
from lorakit.storage.publish import is_aside, publish_folder, remove_folder, sweep

FOLDER = "tokens"
MOST_BYTES = 4 << 30  # of all entries; the newest stays however large it is

_PACKAGES = ("tokenizers", "jinja2", "numpy", "pyarrow")
_CODE = ("data", "storage")  # rooms whose code decides what an entry holds
_COLUMNS, _FACTS = "columns", "dataset.json"
_MOST_FACTS = 1 << 30  # bytes


def prepared(
    cache: Path,
    request: Request,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    advance: Callable[[int], None] = lambda _: None,
) -> Dataset:
    """Return what `prepare` makes of these arguments, from lorakit's cache folder where it is.

    Raises:
        LorakitError: as `prepare` does.
    """
    digests = _digests(request)
    entry = None
    if digests and tokenizer.is_fast:
        section = request.section
        template = renderer_of(section, tokenizer, request.folder).template
        depends_on = {
            "code": [__version__, _code(), platform.python_version()],
            "packages": [importlib.metadata.version(name) for name in _PACKAGES],
            "settings": section.model_dump(mode="json", exclude={"packing", "max_length"}),
            "max_length": longest_allowed(section, context),
            "eval": [source.model_dump(mode="json") for source in request.eval_sources or ()],
            "only": request.only,
            "seed": request.seed if request.share else None,
            "folder": str(request.folder),
            "files": digests,
            "template": template.source if template else None,
            "special": tokenizer.special_tokens_map,
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
        }
        entry = cache.resolve() / FOLDER / sha256_json(depends_on)
        if found := _read(entry):
            advance(len(found.train) + len(found.eval))
            return found
    dataset = prepare(request, tokenizer, context, advance)
    if entry and dataset.report.sha256 == digests:  # else a file has changed in between
        with suppress(LorakitError, OSError):
            _write(entry, dataset)
            _make_room(entry)
    return dataset


def entries(cache: Path) -> dict[Path, int]:
    """Return the bytes of each entry in lorakit's cache folder."""
    found = [path for path in (cache / FOLDER).glob("*") if not is_aside(path.name)]
    return {path: sum(file.stat().st_size for file in path.glob("*")) for path in found}


def _digests(request: Request) -> dict[str, str]:
    """Return the digest of each source; none when one is not there, or the user's code reads it."""
    sources = list(itertools.chain(*request.sources))
    if any(":" in (source.format or request.section.format) for source in sources):
        return {}
    try:
        return dict(
            digest(source, folder=request.folder, offline=request.offline) for source in sources
        )
    except LorakitError:
        return {}  # whoever reads the rows says it


def _code() -> str:
    package = Path(__file__).parents[1]
    files = sorted(path for room in _CODE for path in package.glob(f"{room}/*.py"))
    return sha256_json([sha256_file(path) for path in files])


def _write(entry: Path, dataset: Dataset) -> None:
    """Publish an entry; nobody but its owner may read it, for its rows may be secret."""
    make_folder(entry.parents[1])
    entry.parent.mkdir(0o700, exist_ok=True)
    sets = {"train": dataset.train, "eval": dataset.eval, "prompts": _as_examples(dataset)}
    columns: dict[str, NDArray[Any]] = {"weights": np.array(dataset.weights, np.float64)}
    for name, examples in sets.items():
        columns |= {
            f"{name}.ids": examples.ids,
            f"{name}.marks": examples.marks,
            f"{name}.table": examples.table,
        }
    # Wide ones first: each then begins at a multiple of its width.
    ordered = sorted(columns, key=lambda name: -columns[name].itemsize)
    facts = {
        "entry": entry.name,
        "columns": [[name, columns[name].dtype.str, len(columns[name])] for name in ordered],
        "files": {name: examples.files for name, examples in sets.items()},
        "texts": [prompt.text for prompt in dataset.eval_prompts],
        "references": [prompt.reference for prompt in dataset.eval_prompts],
        "report": asdict(dataset.report),
        "notices": [asdict(notice) for notice in dataset.notices],
        "stop_ids": sorted(dataset.stop_ids),
        "chat_template": dataset.chat_template,
        "max_length": dataset.max_length,
    }
    needed = sum(column.nbytes for column in columns.values())
    with publish_folder(entry, replace=True, needed=needed) as folder:
        with (folder / _COLUMNS).open("wb") as file:
            for name in ordered:
                # Not tofile(), which says nothing when the disk refuses.
                file.write(np.ascontiguousarray(columns[name]).view(np.uint8).data)
        (folder / _FACTS).write_text(strict_json.dumps_line(facts), encoding="utf-8")
        write_manifest(folder)


def _read(entry: Path) -> Dataset | None:
    """Return the data set of an entry; None unless it is there and every byte as it was written."""
    try:
        if not entry.is_dir() or check_manifest(entry) is not None:
            return None
        facts = strict_json.read_object(entry / _FACTS, "data", max_bytes=_MOST_FACTS)
        if facts["entry"] != entry.name:
            return None
        columns = _mapped(entry / _COLUMNS, facts["columns"])
        sets = {
            name: Examples(
                columns[f"{name}.ids"],
                columns[f"{name}.marks"],
                columns[f"{name}.table"],
                tuple(files),
            )
            for name, files in facts["files"].items()
        }
        prompts = zip(sets["prompts"], facts["texts"], facts["references"], strict=True)
        found = Dataset(
            sets["train"],
            sets["eval"],
            tuple(
                Prompt(tuple(row.ids.tolist()), text, reference, row.place)
                for row, text, reference in prompts
            ),
            tuple(columns["weights"].tolist()),
            _report(facts["report"]),
            tuple(_notice(**notice) for notice in facts["notices"]),
            frozenset(facts["stop_ids"]),
            facts["chat_template"],
            facts["max_length"],
        )
    except (LorakitError, OSError, KeyError, TypeError, ValueError):
        return None  # it was removed just now, or somebody else has written it
    with suppress(OSError):
        os.utime(entry)
    return found


def _mapped(path: Path, columns: Sequence[tuple[str, str, int]]) -> dict[str, NDArray[Any]]:
    """Map a file and return its columns, each given by its name, dtype and length.

    Raises:
        ValueError: when they are not what the file holds.
    """
    content = np.asarray(np.memmap(path, np.uint8, "r"))
    found, start = {}, 0
    for name, written_as, length in columns:
        dtype = TABLE if name.endswith(".table") else np.dtype(written_as)
        end = start + length * dtype.itemsize
        found[name], start = content[start:end].view(dtype), end
    if start != len(content):
        raise ValueError("the columns are not as long as they should be")
    return found


def _as_examples(dataset: Dataset) -> Examples:
    """Return the ids and places of the prompts as examples in which nothing is trained."""
    ids = [np.array(prompt.ids, np.int32) for prompt in dataset.eval_prompts]
    return Examples.of(
        [
            Example(some, np.full_like(some, MASKED), prompt.place)
            for some, prompt in zip(ids, dataset.eval_prompts, strict=True)
        ]
    )


def _report(facts: Mapping[str, Any]) -> Report:
    def counts(of: Mapping[str, Any] | None) -> Counts | None:
        if of is None:
            return None
        percentiles = {int(share): length for share, length in of["percentiles"].items()}
        return Counts(**{**of, "percentiles": percentiles})

    return Report(**{**facts, "train": counts(facts["train"]), "eval": counts(facts["eval"])})


def _notice(id: str, message: str, where: Mapping[str, Any] | None, help: str | None) -> Notice:
    return Notice(id, message, Place(**where) if where else None, help)


def _make_room(newest: Path) -> None:
    """Remove what killed processes left, and the entries longest unused beyond the bound."""
    sweep(newest.parent)
    sizes, total = entries(newest.parents[1]), 0
    for entry in sorted(sizes, key=lambda path: (path != newest, -path.stat().st_mtime)):
        total += sizes[entry]
        if total > MOST_BYTES and entry != newest:
            remove_folder(entry)
