"""Write an adapter as a PEFT folder with its passport, then open it again and compare."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorakit import __version__
from lorakit.adapters._layer import Copy, layers_of
from lorakit.adapters._method import Method, SiteSettings
from lorakit.adapters._read import CONFIG, DIGEST, FORMAT, PASSPORT, TENSORS, read
from lorakit.errors import RunFailed
from lorakit.model.sites import Site
from lorakit.storage import strict_json
from lorakit.storage.disk import storage_errors
from lorakit.storage.hashing import sha256_file, sha256_json
from lorakit.storage.tensors import write_tensors


class Tokenizer(Protocol):
    """What writes its own files, the chat template among them."""

    def save_pretrained(self, folder: Path, /) -> object: ...


def save(
    folder: Path,
    method: Method,
    model: PreTrainedModel,
    sites: Sequence[Site],
    passport: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    *,
    unchanged: bool = False,
) -> None:
    """Write the adapter of a model into a folder that the caller publishes.

    Args:
        folder: made if need be; holds none of the adapter's files yet.
        method: what was attached.
        model: the adapted model.
        sites: those that the method chose.
        passport: what is known of the adapter's making. Of it this reads `base` (its `name` and
            `revision` go into PEFT's settings) and `steps`: after the first one an adapter that
            changes nothing is a failure.
        tokenizer: written beside the adapter.
        unchanged: it may still change nothing, for every step was skipped.

    Raises:
        RunFailed: `adapter.not-saved` when the folder does not hold what the model does,
            `adapter.not-finite` when a value is not finite, or when the disk refuses.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        method.PREFIX + name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in method.tensors(model).items()
    }
    write_tensors(folder / TENSORS, tensors)
    config = {**_common(method, model, sites, passport), **method.to_peft(model, sites)}
    with storage_errors(folder):
        text = strict_json.dumps(dict(sorted(config.items())))
        (folder / CONFIG).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        files = sorted(path for path in folder.iterdir() if path.is_file())
    written = {
        **passport,
        "format": FORMAT,
        "lorakit": __version__,
        "method": method.name(),
        "settings": method.settings.model_dump(mode="json"),
        "servable": method.servable(sites),
        "scales": {layer.name: layer.scale for layer in layers_of(model) if layer.name},
        "files": {path.name: sha256_file(path) for path in files},
    }
    written[DIGEST] = sha256_json(written)
    with storage_errors(folder):
        (folder / PASSPORT).write_text(strict_json.dumps(written), encoding="utf-8")
    steps = 0 if unchanged else int(passport.get("steps", 0))
    _check(folder, method, model, tensors, steps=steps)


def _common(
    method: Method, model: PreTrainedModel, sites: Sequence[Site], passport: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the part of PEFT's settings that is the same for every method."""
    base = passport.get("base", {})
    common = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.get("name"),
        "revision": base.get("revision"),
        "inference_mode": True,
    }
    if isinstance(method.settings, SiteSettings):
        copies = [layer for layer in layers_of(model) if isinstance(layer, Copy)]
        tied = any(site.tied for site in sites)
        tied = tied or len({layer.weight for layer in copies}) < len(copies)
        # Both ends of a tie are named: PEFT sees a tie only where it knows one of the two names.
        common |= {
            "target_modules": sorted(
                end for site in sites for end in (site.name, site.tied) if end
            ),
            "modules_to_save": sorted(layer.name for layer in copies) or None,
            **({"ensure_weight_tying": True} if tied else {}),
        }
    return common


def _check(
    folder: Path, method: Method, model: PreTrainedModel, tensors: Mapping[str, Tensor], steps: int
) -> None:
    """Open the folder again and compare it with what it was made of.

    Raises:
        RunFailed: `adapter.not-saved`.
    """
    saved = read(folder)
    again = {method.PREFIX + name: tensor for name, tensor in saved.tensors.items()}
    for name in sorted(tensors.keys() | again.keys()):
        if name not in again or name not in tensors or not torch.equal(tensors[name], again[name]):
            message = f"{name} is not in the file as it is in the model"
            raise RunFailed("adapter.not-saved", message, where=saved.file)
    layers = [layer for layer in layers_of(model) if not isinstance(layer, Copy)]
    if steps and all(layer.untouched() for layer in layers):
        raise RunFailed(
            "adapter.not-saved",
            f"after {steps} steps the adapter still changes nothing",
            where=saved.file,
            help="raise train.learning_rate; if that does not help, report this",
        )
