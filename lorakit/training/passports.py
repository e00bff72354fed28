"""What an adapter says of its own making, and what a resume must find unchanged."""

import importlib.metadata
import platform
from functools import cache
from pathlib import Path
from typing import Any

from lorakit import __version__
from lorakit.model.quantized import Quantization
from lorakit.recipe.sections import Recipe
from lorakit.runtime import Runtime
from lorakit.storage.hashing import sha256_json
from lorakit.storage.redact import without_folders
from lorakit.training import optim
from lorakit.training.checkpoint import State
from lorakit.training.plan import Plan

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
# Keys that change neither the mathematics nor the order of the data.
HARMLESS_SECTIONS = ("output_dir", "merge", "eval")
HARMLESS_KEYS = ("log_every", "save_every", "keep_checkpoints", "strict_optimizer", "on_oom")
# Where things lie, which a resolved recipe writes otherwise: what lies there has its digest.
PATHS = ("path", "chat_template")


def versions(plan: Plan | None = None) -> dict[str, str]:
    """Return the versions that a result may depend on: of bitsandbytes where a plan uses it."""
    uses = plan and (plan.quantization or plan.setup.optimizer in optim.BITSANDBYTES)
    packages = (*PACKAGES, "bitsandbytes") if uses else PACKAGES
    found = {name: _version(name) for name in packages}
    return {"lorakit": __version__, "python": platform.python_version(), **found}


@cache  # each is searched for on the disk, and every checkpoint says them
def _version(package: str) -> str:
    return importlib.metadata.version(package)


def of_run(plan: Plan, state: State) -> dict[str, Any]:
    """Return the passport of an adapter at this moment of its run."""
    recipe = plan.recipe.model_dump(mode="json")
    facts = {
        "method": plan.recipe.adapter.method,
        "recipe_name": plan.recipe.origin.name,
        "recipe": recipe,
        "recipe_sha256": sha256_json(recipe),
        "data": plan.dataset.report.facts(),
        "template_sha256": sha256_json(plan.dataset.chat_template),
        "base": plan.base.facts(),
        **Quantization.record(plan.quantization),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "seed": plan.recipe.seed,
        "versions": versions(plan),
        "steps": state.step,
        "trained_tokens": state.trained_tokens,
        "resumed_inexactly": state.inexact,
        "metrics": {
            "loss": state.loss,
            "best_eval_loss": state.best_loss,
            "best_step": state.best_step,
        },
    }
    shared: dict[str, Any] = without_folders(facts)
    return shared


def pinned(plan: Plan, runtime: Runtime) -> dict[str, Any]:
    """Return what must be the same for a resumed run to end bit-equal to an uninterrupted one.

    The base's files are read by the main process alone.
    """
    report = plan.dataset.report
    digests = {"sha256": list(report.sha256.values())}
    return {
        **{f"recipe.{key}": value for key, value in _mathematics(plan.recipe).items()},
        **{f"data {Path(source).name}": sha256 for source, sha256 in report.sha256.items()},
        "data": sha256_json(report.facts() | digests),
        "tokenizer": runtime.from_main(plan.base.tokenizer_sha256),
        "order": plan.steps.order_sha256(0),
        "template": sha256_json(plan.dataset.chat_template),
        "base": runtime.from_main(plan.base.weights_sha256),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": runtime.describe(),
        "processes": runtime.processes,
        "compiled": plan.compiled,
        **versions(plan),
    }


def _mathematics(recipe: Recipe) -> dict[str, Any]:
    """Flatten the keys that change what is computed into `section.key: value`."""
    flat = {}
    for section, value in recipe.model_dump(mode="json").items():
        members = value if isinstance(value, dict) else {"": value}
        for key, member in members.items():
            if section not in HARMLESS_SECTIONS and key not in (*HARMLESS_KEYS, *PATHS):
                flat[f"{section}.{key}".rstrip(".")] = _without_paths(member)
    return flat


def _without_paths(value: Any) -> Any:
    """Return the value of a key; of sources all but where they lie."""
    if not isinstance(value, list):
        return value
    return [
        {key: one for key, one in source.items() if key not in PATHS}
        if isinstance(source, dict)
        else source
        for source in value
    ]
