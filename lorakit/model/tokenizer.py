"""The tokenizer that comes with a base, loaded from its folder and checked against the model."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lorakit.errors import BadInput
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
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=code_allowed, **options
        )
    except Exception as error:  # the tokenizers library raises nothing more special
        raise BadInput(
            "tokenizer.missing",
            f"the tokenizer cannot be read: {printable(' '.join(str(error).split()), 200)}",
            where=str(where),
            help="fetch the tokenizer's files again",
        ) from error
    check_vocabulary(tokenizer, config, str(where))
    stop = config.get_text_config().eos_token_id
    if gguf and isinstance(stop, int):  # some releases of transformers take another token for it
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    return tokenizer


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
    found = [name for name in VOCABULARIES if inside(folder, name, links_into=links_into).is_file()]
    if not found:
        raise BadInput(
            "tokenizer.missing",
            f"there is no tokenizer.json in {folder}, nor another vocabulary",
            where=str(folder),
            help="copy the tokenizer's files from the model it belongs to",
        )
    settings = inside(folder, SETTINGS, links_into=links_into)
    if settings.is_file():
        cleaned(strict_json.read_object(settings, "tokenizer.missing"), str(settings))
