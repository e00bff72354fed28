"""Adapters with random values on tiny bases, made, saved and merged as a run does it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorakit import adapters
from lorakit.adapters import Saved
from lorakit.environment import cache_folder
from lorakit.export.merge import Options, merge, planned
from lorakit.model import base as bases
from lorakit.model.base import Base
from lorakit.model.sites import find_sites
from lorakit.model.weights import open_folder
from lorakit.recipe.sections import Model
from lorakit.runtime import Runtime
from tests.tiny import tiny_tokenizer

CPU = torch.device("cpu")
TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
}


def find_base(folder: Path) -> Base:
    """Find a local base as the commands do."""
    section = Model(path=str(folder))
    return bases.find(section, Path(), offline=True, allow_remote_code=False, cache=cache_folder())


def save_adapter(
    base: Base,
    folder: Path,
    method: str,
    *,
    seed: int = 1,
    size: float = 0.05,
    passport: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Saved:
    """Attach a method, give its tensors random values around their start, save and read it back."""
    model = bases.load(base, device=CPU, dtype=torch.float32)
    chosen = adapters.get(method)
    attached = chosen(chosen.Settings(method=method, **settings))
    sites = attached.sites(find_sites(model))
    adapters.attach(attached, model, sites, seed=seed)
    attached.start(model, sites, [])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    attached.refresh(model)
    made = {"base": base.facts(), "steps": 0, **(passport or {})}
    adapters.save(folder, attached, model, sites, made, tiny_tokenizer())
    return adapters.read(folder)


def settings(method: str, family: str) -> dict[str, Any]:
    return {} if method == "ia3" else {"target_modules": TARGETS[family], "rank": 4}


def run(saved: Saved, base: Base, out: Path, **options: Any) -> dict[str, Any]:
    """Merge; returns the report."""
    with planned(saved, base, out, Options(**options)) as plan:
        return merge(plan, Runtime(CPU))


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a model folder."""
    with open_folder(folder) as weights:
        return {name: weights.read(name) for name in weights.names}
