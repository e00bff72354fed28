"""The tokenizer that comes with a base, loaded from its folder and checked against the model."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lorakit.errors import BadInput, LorakitError
from lorakit.model.config import cleaned
from lorakit.storage import strict_json
from lorakit.storage.hashing import sha256_file, sha256_json
from lorakit.storage.paths import inside
from lorakit.storage.redact import printable

SETTINGS = "tokenizer_config.json"
FILES = (  # of every kind of tokenizer
    "tokenizer.json tokenizer.model vocab.json vocab.txt spiece.model merges.txt"
    " tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja"
).split()
_READ = frozenset({".json", ".jinja", ".model", ".txt"})  # what transformers may open of a folder
_TEMPLATES = "additional_chat_templates"
_PANIC = "PanicException"  # of the Rust library: no `Exception`, and in no module
_PROBE = "a b"
MOST_GROWTH = 1000
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def read_tokenizer(
    folder: Path,
    config: PretrainedConfig,
    *,
    gguf: str | None = None,
    code_allowed: bool = False,
    links_into: Path | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, or of the GGUF file of that name in it.

    Raises:
        BadInput: `tokenizer.missing` when its files are missing or cannot be read,
            `tokenizer.mismatch` when it has ids that the model has no row for.
    """
    where = folder / gguf if gguf else folder
    options: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    if not gguf:
        _check_files(folder, links_into)
    with refusals(str(where), "be read"), _unseen():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=code_allowed, **options
        )
        _check_growth(tokenizer)
        with suppress(Exception):  # it need not know these letters; a panic would come of any
            tokenizer.decode(tokenizer.encode(_PROBE))
    check_vocabulary(tokenizer, config, str(where))
    stop = config.get_text_config().eos_token_id
    if gguf and isinstance(stop, int):  # some releases of transformers take another token for it
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    return tokenizer


@contextmanager
def refusals(where: str, what: str = "take a text") -> Iterator[None]:
    """Tell what the tokenizers library raises, or panics about, as a fault of the tokenizer.

    Args:
        where: the tokenizer's folder.
        what: the tokenizer cannot do.

    Raises:
        BadInput: `tokenizer.missing`.
    """
    try:
        yield
    except (LorakitError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise BadInput(
            "tokenizer.missing",
            f"the tokenizer cannot {what}: {printable(' '.join(str(error).split()), 200)}",
            where=where,
            help="fetch the tokenizer's files again",
        ) from error


@contextmanager
def _unseen() -> Iterator[None]:
    """Keep off the terminal what the Rust library itself writes there when it panics."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_growth(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a text does not become a thousand times longer before it is tokenised.

    Raises:
        BadInput: `tokenizer.missing`.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    growth = _growth(json.loads(normalizer.__getstate__())) if normalizer is not None else 1.0
    if growth > MOST_GROWTH:
        raise BadInput(
            "tokenizer.missing",
            f"the tokenizer's normalizer makes texts up to {growth:.0e} times longer",
            where=str(tokenizer.name_or_path),
            help="take the tokenizer.json that belongs to the model",
        )


def _growth(part: Any) -> float:
    """Return how many times longer a normalizer makes a text that is all what it looks for."""
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1.0
    written = part.get("content") if part.get("type") == "Replace" else part.get("prepend")
    pattern = part.get("pattern")
    sought = pattern.get("String", "") if isinstance(pattern, dict) else ""
    longer = len(str(written or "")) / max(1, len(sought))
    return max(1.0, longer) * _growth(part.get("normalizers"))


def files_sha256(folder: Path) -> str:
    """Return a digest of all files in a folder that make a tokenizer what it is."""
    return sha256_json({n: sha256_file(folder / n) for n in FILES if (folder / n).is_file()})


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, where: str
) -> None:
    """Check that the model has a row for every id of the tokenizer.

    Raises:
        BadInput: `tokenizer.mismatch`.
    """
    rows = config.get_text_config().vocab_size
    beyond = {token: id for token, id in tokenizer.get_vocab().items() if id >= rows}
    if beyond:
        names = ", ".join(
            printable(token, 30) for token in sorted(beyond, key=beyond.__getitem__)[:3]
        )
        raise BadInput(
            "tokenizer.mismatch",
            f"the tokenizer has {max(beyond.values()) + 1:,} tokens, the model {rows:,} rows; "
            f"beyond them: {names}",
            where=where,
            help="use the tokenizer that belongs to the model",
        )


def _check_files(folder: Path, links_into: Path | None) -> None:
    templates = folder / _TEMPLATES
    inner = [f"{_TEMPLATES}/{name}" for name in os.listdir(templates)] if templates.is_dir() else []
    for name in (*os.listdir(folder), *inner):  # a FIFO would be waited for, a link followed
        if Path(name).suffix in _READ:
            inside(folder, name, links_into=links_into)
    found = [name for name in VOCABULARIES if (folder / name).is_file()]
    if not found:
        raise BadInput(
            "tokenizer.missing",
            f"there is no tokenizer.json in {folder}, nor another vocabulary",
            where=str(folder),
            help="copy the tokenizer's files from the model it belongs to",
        )
    settings = inside(folder, SETTINGS, links_into=links_into)
    if settings.is_file():
        values = strict_json.read_object(settings, "tokenizer.missing")
        cleaned(values, str(settings))
        # transformers opens what these are called, wherever that is.
        named = values.get("fast_tokenizer_files")
        for name in named if isinstance(named, list) else ():
            inside(folder, str(name), links_into=links_into)
