"""What a merged model's folder holds besides tensors: settings, tokenizer, template, licences."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.adapters import Saved
from lorakit.model.base import Base, load_tokenizer, skeleton
from lorakit.model.merged import REPORT
from lorakit.model.tokenizer import VOCABULARIES
from lorakit.model.weights import INDEX
from lorakit.storage import strict_json
from lorakit.storage.disk import storage_errors
from lorakit.storage.paths import inside

CONFIG = "config.json"
KINDS = frozenset({".json", ".jinja", ".txt", ".model"})
NOT_COPIED = frozenset(
    {CONFIG, INDEX, REPORT, "adapter_config.json", "lorakit.json", "manifest.json"}
)
# Where a config.json says what its weights are; transformers before 4.56 read the second.
DTYPE_KEYS = ("dtype", "torch_dtype")


def find_texts(saved: Saved, base: Base) -> dict[str, Path]:
    """Return the files to copy by name: the base's, and over them those the adapter came with.

    Raises:
        BadInput: `security.path` when one of them is a link that leads elsewhere.
    """
    kinds = KINDS | {".py"} if base.remote_code else KINDS
    found: dict[str, Path] = {}
    for folder, links_into in ((base.folder, base.links_into), (saved.folder, saved.links_into)):
        for entry in sorted(folder.iterdir()) if folder else ():
            if entry.suffix in kinds and entry.name not in NOT_COPIED and not entry.is_dir():
                found[entry.name] = inside(
                    folder or entry.parent, entry.name, links_into=links_into
                )
    return found


def write_texts(texts: Mapping[str, Path], base: Base, folder: Path, dtype: str | None) -> None:
    """Write all that `find_texts` found, and config.json; `dtype` is the new one, None keeps it.

    The configuration stays the base's own to the letter: whatever reads the base reads the result.

    Raises:
        RunFailed: when the disk refuses.
    """
    with storage_errors(folder):
        for name, path in texts.items():
            shutil.copyfile(path, folder / name)
        if base.folder:
            path = inside(base.folder, CONFIG, links_into=base.links_into)
            config = strict_json.read_object(path, "model")
        else:
            config = base.config.to_diff_dict() | {"architectures": [type(skeleton(base)).__name__]}
            base.generation.save_pretrained(folder)
            if not set(VOCABULARIES) & texts.keys():
                load_tokenizer(base).save_pretrained(folder)
        if dtype is not None:
            config = _with_dtype(config, dtype)
        # What was merged is dense, whatever the base was.
        for key in ("_name_or_path", "quantization_config"):
            config.pop(key, None)
        (folder / CONFIG).write_text(strict_json.dumps(config), encoding="utf-8")


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the settings with the dtype wherever one stands, at the top in any case."""
    changed = _replaced(config, dtype)
    return changed if changed.keys() & set(DTYPE_KEYS) else {**changed, "dtype": dtype}


def _replaced(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {
        key: dtype
        if key in DTYPE_KEYS
        else _replaced(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }
