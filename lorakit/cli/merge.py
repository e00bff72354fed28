"""`lorakit merge`: adapter and base become an ordinary model folder, checked."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lorakit.cli.command import AdapterArgument, AllowLocalCode, AllowRemoteCode, command
from lorakit.cli.screen import Screen, usage
from lorakit.host import GIB

MOST_SCALE = 1e6
UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": GIB,
}

BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="ID_OR_DIR", help="The base; else the one the adapter names."),
]


@command
def merge(
    screen: Screen,
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Option("--out", help="Where the merged model goes.")],
    base: BaseOption = None,
    dtype: Annotated[
        Literal["keep", "bf16", "fp16", "fp32"],
        typer.Option("--dtype", help="Of the merged weights; keep: as the base's."),
    ] = "keep",
    verify: Annotated[
        bool, typer.Option(help="Compare the logits with those of base and adapter.")
    ] = True,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Of one file, such as 5GB or 500MB.")
    ] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier merge at --out.")
    ] = False,
    scale: Annotated[
        float, typer.Option("--scale", help="How much of the adapter's change is merged.")
    ] = 1.0,
    base_weights: Annotated[
        Literal["original", "dequantised"],
        typer.Option(
            "--base-weights",
            help="Of a base that training held in 4 or 8 bits: those that this was made from, or "
            "its own, dequantised.",
        ),
    ] = "original",
    measure: Annotated[
        bool,
        typer.Option(help="Of such an adapter: the losses before and after, on the eval rows."),
    ] = True,
    allow_local_code: AllowLocalCode = False,
    allow_remote_code: AllowRemoteCode = False,
) -> None:
    """Merge an adapter into its base, one block of one tensor in memory at a time."""
    from rich.text import Text

    from lorakit import adapters
    from lorakit.cli.adapter_base import find_base, recipe_of
    from lorakit.cli.merge_losses import losses_of
    from lorakit.export import merge as merging
    from lorakit.runtime import start
    from lorakit.storage.disk import free_space

    if not abs(scale) <= MOST_SCALE:
        raise usage(f"--scale {scale} is out of range", f"up to {MOST_SCALE:,.0f}; 1 is all of it")
    size = _bytes(max_shard_size)
    options = merging.Options(dtype, scale, size, verify, overwrite, base_weights)
    saved = adapters.read(adapter)
    found = find_base(screen, saved, base, allow_remote_code=allow_remote_code)
    with merging.planned(saved, found, out, options) as plan:
        screen.notice(*plan.notices)
        unsure = any(notice.id == "adapter.base-unknown" for notice in plan.notices)
        screen.say(f"Base      {found.name}{'' if unsure else ' (fingerprint matches)'}")
        if plan.quantization:
            screen.say(f"Weights   {base_weights}; the adapter was trained on {plan.quantization}")
        screen.say(f"Needs     {_size(plan.bytes)}, {_size(free_space(out))} free")
        runtime, losses = start(), None
        if measure:
            recipe = recipe_of(saved)
            losses = losses_of(screen, plan, recipe, runtime, allow_local_code=allow_local_code)
        with screen.progress("Merging", plan.work) as advance:
            report = merging.merge(plan, runtime, advance, losses)
    files = len(report["shards"])
    lines = (
        f"Merged    {out}: {files} {'file' if files == 1 else 'files'}, {report['changed']} of "
        f"{report['tensors']} tensors changed, {report['dtype']}",
        f"Verified  {merging.verdict(report)}",
    )
    screen.result(Text("\n".join(lines)), {"out": str(out), **report})


def _bytes(size: str) -> int:
    """Read a size such as 5GB, 500MB or 2GiB."""
    number = size.rstrip("BbGgIiKkMm ")
    unit = size[len(number) :].strip().upper()
    try:
        count = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        count = 0
    if count < 1:
        raise usage(f"--max-shard-size {size} is no size", help="write 5GB, 500MB or 2GiB")
    return count


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= 1 << 27 else f"{count / (1 << 20):.1f} MiB"
