"""What `lorakit eval` measures, made ready: the base, the adapter on it, and the rows."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit import adapters, environment
from lorakit.adapters import Saved
from lorakit.cli.recipe_argument import base_of
from lorakit.cli.screen import Screen
from lorakit.data.cache import prepared
from lorakit.data.items import Request
from lorakit.devices import resolve_dtype
from lorakit.errors import BadInput
from lorakit.evaluation.run import Task
from lorakit.model import base as bases
from lorakit.model.attention import can_pack
from lorakit.model.base import Base
from lorakit.model.quantized import Quantization
from lorakit.model.sites import find_sites
from lorakit.recipe.sections import Recipe
from lorakit.runtime import Runtime, start
from lorakit.storage.hashing import sha256_file, sha256_json
from lorakit.training.passports import versions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Subject:
    """A base and, unless it is measured alone, the adapter at `path` on it."""

    saved: Saved | None
    path: Path | None
    base: Base
    tokenizer: PreTrainedTokenizerBase
    runtime: Runtime
    dtype: "torch.dtype"

    @property
    def packs(self) -> bool:
        """Whether rows may share a sequence."""
        packs = self.saved is None or self.saved.method().packs
        return packs and can_pack(self.base.config) is None

    @property
    def run(self) -> Path | None:
        """The folder of the run that made the adapter, where it lies in one."""
        run = self.saved.folder.parent if self.saved else None
        return run if run and (run / "run.json").is_file() else None

    def load(self, recipe: Recipe) -> PreTrainedModel:
        """Load the base and put the adapter onto it."""
        model = bases.load(
            self.base,
            device=self.runtime.device,
            dtype=self.dtype,
            attention=recipe.model.attention,
            quantization=Quantization.of(recipe.model),
        )
        if self.saved:
            adapters.attach_saved(self.saved, model, find_sites(model))
        return model


def opened(
    screen: Screen, recipe: Recipe, path: Path | None, *, allow_remote_code: bool
) -> Subject:
    """Read the adapter at `path` and find the recipe's base; no weight of the base is loaded.

    Raises:
        BadInput: `adapter.not-found`, `adapter.wrong-base`, or what reading them raises.
    """
    if path and not os.path.exists(path):
        raise BadInput(
            "adapter.not-found",
            "there is no adapter to measure",
            where=str(path),
            help=f"lorakit train {recipe.origin.path}, or --adapter DIR, or --base-only",
        )
    saved = adapters.read(path) if path else None
    base = base_of(screen, recipe, allow_remote_code=allow_remote_code)
    screen.notice(*base.notices)
    if saved:
        notice = adapters.check_base(saved, base)
        screen.notice(*saved.notices, *([notice] if notice else []))
    runtime = start()
    dtype = resolve_dtype(recipe.model.dtype, runtime.device)
    return Subject(saved, path, base, bases.load_tokenizer(base), runtime, dtype)


def task_of(
    screen: Screen, recipe: Recipe, subject: Subject, limit: int | None, *, allow_local_code: bool
) -> Task:
    """Prepare the rows of `eval.data`, else of `data.eval`; with a limit the first ones.

    Raises:
        BadInput: `eval.no-data` when the recipe names none, or what reading them raises.
    """
    if recipe.eval.data is None and recipe.data.eval is None:
        raise BadInput(
            "eval.no-data",
            "the recipe names no rows to measure on",
            where=recipe.origin.place("eval"),
            help="set eval.data, or data.eval: 0.05",
        )
    request = Request.of(
        recipe,
        offline=screen.offline,
        allow_local_code=allow_local_code,
        eval_sources=recipe.eval.data,
        only="eval",
    )
    # The base alone is measured on the rows that it is compared on.
    saved = subject.saved
    method = saved.method() if saved else adapters.get(recipe.adapter.method)(recipe.adapter)
    cache, context = environment.cache_folder(), method.context(subject.base.context)
    with screen.progress("Reading the data", None) as advance:
        dataset = prepared(cache, request, subject.tokenizer, context, advance)
    screen.notice(*dataset.notices)
    examples = dataset.eval[:limit]
    places = {example.place for example in examples}
    return Task(
        examples,
        [prompt for prompt in dataset.eval_prompts if prompt.place in places],
        recipe.eval,
        dataset.stop_ids,
        seed=recipe.seed,
        packing=subject.packs,
        taken=method.positions(),
    )


def facts_of(recipe: Recipe, subject: Subject, task: Task, limit: int | None) -> dict[str, Any]:
    """Return what the figures depend on."""
    saved = subject.saved
    return {
        "recipe": str(recipe.origin.path),
        "recipe_sha256": sha256_json(recipe.model_dump(mode="json")),
        "adapter": str(subject.path) if subject.path else None,
        "adapter_sha256": sha256_file(Path(saved.file)) if saved else None,
        "base_model": subject.base.name,
        "base_revision": subject.base.revision,
        "data_sha256": task.sha256,
        "normalize": list(recipe.eval.normalize),
        "generate": recipe.eval.generate.model_dump(),
        "seed": task.seed,
        "packing": task.packing,
        "limit": limit,
        "versions": versions(),
        "device": subject.runtime.describe(),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
