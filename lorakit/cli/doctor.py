"""`lorakit doctor`: what this machine has, ready to be pasted into an issue."""

import importlib.util
import platform
import shutil
from typing import Annotated, Any

import typer

from lorakit import __version__, environment
from lorakit.cli.command import AllowRemoteCode, SetOption, command
from lorakit.cli.screen import Screen
from lorakit.errors import CheckFailed
from lorakit.host import GIB, available_bytes, usable_cores

PACKAGES = (
    "torch transformers tokenizers datasets accelerate bitsandbytes safetensors pydantic typer rich"
).split()
EXTRAS = {"gguf": "gguf", "liger_kernel": "kernels"}  # those that some code reads


@command
def doctor(
    screen: Screen,
    recipe: Annotated[str, typer.Option(help="Look at what this recipe needs, too.")] = "",
    changes: SetOption = None,
    allow_remote_code: AllowRemoteCode = False,
) -> None:
    """Show versions, device, memory and caches; exit 1 with --strict when something is amiss."""
    from rich.table import Table

    from lorakit.cli import conflicts
    from lorakit.data.cache import entries
    from lorakit.devices import best_dtype, gpu
    from lorakit.model.hub import has_token
    from lorakit.runtime import start

    runtime = start()
    cache = environment.cache_folder()
    installed, found = conflicts.installed(), gpu()
    conflicting = [
        *conflicts.between_packages(installed, PACKAGES),
        *conflicts.with_gpu(found, installed.get("torch", "")),
    ]
    tokenised = entries(cache)
    disk = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists()))
    facts: dict[str, Any] = {
        "lorakit": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: installed.get(name) for name in PACKAGES},
        "device": runtime.describe(),
        "driver": found.driver or "none",
        "CUDA": found.toolkit or "none: torch is built for CPUs",
        "cores": usable_cores(),
        "dtype auto": str(best_dtype(runtime.device)).removeprefix("torch."),
        "4-bit": _four_bit(runtime.device),
        "memory free": f"{available_bytes() / GIB:.1f} GiB",
        "disk free": f"{disk.free / GIB:.1f} GiB at {cache}",
        "token cache": f"{sum(tokenised.values()) / 2**20:.1f} MiB, {len(tokenised)} data sets",
        "hub token": "found" if has_token() else "not found",
        "network": "off" if screen.offline else "allowed",
        "conflicts": f"{len(conflicting)}, told below" if conflicting else "none known",
        "extras": {name: _extra(name, extra) for name, extra in EXTRAS.items()},
    }
    problems = [f"{name} is not installed" for name in PACKAGES if facts[name] is None]
    problems += conflicting
    if facts["4-bit"] != "works":
        problems.append(f"4-bit: {facts['4-bit']}")
    if recipe:
        facts["recipe"], amiss = _recipe(screen, recipe, changes, allow_remote_code)
        problems += amiss
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name, _shown(value))
    for problem in problems:
        table.add_row("problem", problem)
    strict = bool(problems and screen.strict)
    screen.result(table, {"facts": facts, "problems": problems}, exit=int(strict))
    if strict:
        if screen.json:
            raise typer.Exit(CheckFailed.exit_code)
        raise CheckFailed("check.doctor", "; ".join(problems))


def _recipe(
    screen: Screen, name: str, changes: list[str] | None, allow_remote_code: bool
) -> tuple[str, list[str]]:
    from lorakit.cli.recipe_argument import base_of, read_recipe
    from lorakit.errors import LorakitError

    recipe = read_recipe(screen, name, changes)
    try:
        found = base_of(screen, recipe, allow_remote_code=allow_remote_code)
    except LorakitError as error:
        return f"{recipe.origin.path}: the base cannot be had", [error.message]
    return f"{recipe.origin.path}: base {found.name} found", []


def _extra(module: str, extra: str) -> str:
    present = importlib.util.find_spec(module) is not None
    return "present" if present else f'pip install "lorakit[{extra}]"'


def _four_bit(device: Any) -> str:
    """Quantise a small matrix to NF4 and multiply with it, for real."""
    try:
        import torch
        from bitsandbytes.nn import modules
    except ImportError as error:
        return f"not available: {error}"
    try:
        make: Any = modules.Linear4bit
        layer = make(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to(device)
        product = layer(torch.ones(1, 64, device=device))
    except Exception as error:
        return f"fails: {type(error).__name__}: {error}"
    return "works" if bool(product.isfinite().all()) else "fails: the product is not finite"


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name}: {text}" for name, text in value.items())
    return "missing" if value is None else str(value)
