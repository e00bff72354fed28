"""Merge an adapter into its base: new files, written block by block, checked, then published."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lorakit import __version__
from lorakit.adapters import Saved, check_base, merge_layers
from lorakit.devices import DTYPES
from lorakit.errors import BadInput, CheckFailed, Notice
from lorakit.export.blocks import MergedTensors
from lorakit.export.logits import BOUNDS, compare_logits, needed_bytes
from lorakit.export.shards import Shard, planned_shards, write_index, write_shard
from lorakit.export.target import open_target, trained_on
from lorakit.export.texts import find_texts, write_texts
from lorakit.export.verify import check_written
from lorakit.host import GIB
from lorakit.model.base import Base, skeleton
from lorakit.model.merged import REPORT, texts_of
from lorakit.model.quantized import Quantization
from lorakit.model.sites import find_sites
from lorakit.recipe.sections import BaseWeights
from lorakit.runtime import Runtime
from lorakit.storage import strict_json
from lorakit.storage.disk import storage_errors, sync
from lorakit.storage.hashing import sha256_file
from lorakit.storage.publish import check_place, publish_folder
from lorakit.threads import Threads

SCHEMA = "lorakit.merge/1"
MAX_SHARD = 5 * 10**9  # bytes


@dataclass(frozen=True)
class Options:
    """How to merge: dtype of the result, share of the adapter's change, size of files in bytes.

    `base_weights` are those to merge into where training held them quantised.
    """

    dtype: Literal["keep", "bf16", "fp16", "fp32"] = "keep"
    scale: float = 1.0
    max_shard: int = MAX_SHARD
    verify: bool = True
    overwrite: bool = False
    base_weights: BaseWeights = "original"


@dataclass(frozen=True)
class MergePlan:
    """A merge before it costs anything: every tensor and every file, and warnings."""

    saved: Saved
    base: Base
    out: Path
    options: Options
    tensors: MergedTensors
    shards: Mapping[str, Shard]
    texts: Mapping[str, Path]
    notices: tuple[Notice, ...]

    @property
    def quantization(self) -> Quantization | None:
        """How training held the base; None where it was dense, or nothing tells."""
        return trained_on(self.saved, self.base)

    @property
    def bytes(self) -> int:
        """What the files of tensors take on the disk."""
        return sum(self.tensors.bytes(unit) for unit in self.tensors.units)

    @property
    def work(self) -> int:
        """How many bytes `merge` says that it has come further by: each is written and read."""
        return 2 * self.bytes

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest dtype that an adapted tensor is written in."""
        names = [name for unit in self.tensors.units if unit.layer for name in unit.names.values()]
        return max(map(self.tensors.dtype, names), key=BOUNDS.__getitem__)


@contextmanager
def planned(saved: Saved, base: Base, out: Path, options: Options) -> Iterator[MergePlan]:
    """Yield the plan of a merge, the base's files open, after every check that reads no weights.

    Raises:
        BadInput: `output.is-input`, `output.not-empty`, `adapter.wrong-base` or
            `adapter.not-mergeable`; `usage` when there is nothing to dequantise.
    """
    check_output(out, [saved.folder, base.where], overwrite=options.overwrite)
    notice = check_base(saved, base)
    sites = find_sites(skeleton(base))
    layers = merge_layers(saved, sites)
    with open_target(saved, base, options.base_weights) as weights:
        dtype = None if options.dtype == "keep" else DTYPES[options.dtype]
        tensors = MergedTensors(weights, layers, sites, dtype=dtype, scale=options.scale)
        shards = planned_shards(tensors, options.max_shard)
        notices = (*saved.notices, *base.notices, *([notice] if notice else []))
        yield MergePlan(
            saved, base, out, options, tensors, shards, find_texts(saved, base), notices
        )


def merge(
    plan: MergePlan,
    runtime: Runtime,
    advance: Callable[[int], None] = lambda _: None,
    losses: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write, check and publish the merged model; returns the content of `merge_report.json`.

    A merge that fails a check leaves nothing behind. `advance` hears of `plan.work` bytes in all;
    `losses` were measured before, and are for the report.

    Raises:
        CheckFailed: `check.merge` when what was written is not base and adapter in one.
        RunFailed: `model.not-finite`, or when the disk refuses or is too small.
    """
    options = plan.options
    texts = sum(path.stat().st_size for path in plan.texts.values())
    with (
        publish_folder(plan.out, replace=options.overwrite, needed=plan.bytes + texts) as folder,
        Threads() as threads,
    ):
        synced, digests = [], []
        for name, shard in plan.shards.items():
            path = folder / name
            write_shard(plan.tensors, path, shard, threads, advance)
            # The disk writes and the digest is taken while the next shard, or the check, computes.
            synced.append(threads.beside(sync, path))
            digests.append(threads.beside(sha256_file, path))
        kept = options.dtype == "keep" and plan.base.folder is not None
        write_texts(plan.texts, plan.base, folder, None if kept else _name(plan.dtype))
        write_index(plan.shards, folder, plan.bytes)
        written = check_written(plan.tensors, folder, threads, advance)
        report = {
            "schema": SCHEMA,
            "lorakit_version": __version__,
            "method": plan.saved.method().name(),
            "adapter_sha256": sha256_file(Path(plan.saved.file)),
            "base": plan.base.facts(),
            "base_weights": options.base_weights,
            "trained_on": Quantization.record(how) if (how := plan.quantization) else None,
            "losses": losses,
            "dtype": _name(plan.dtype),
            "scale": options.scale,
            "shards": [
                {"file": name, "sha256": digest.result(), "bytes": shard.layout.size}
                for (name, shard), digest in zip(plan.shards.items(), digests, strict=True)
            ],
            "texts": texts_of(folder, set(plan.shards)),
            "tensors": written.tensors,
            "adapted": written.adapted,
            "changed": written.changed,
            "verify": {"ok": True, **_compared(plan, folder, runtime, threads)},
        }
        for done in synced:
            done.result()
        with storage_errors(plan.out):
            (folder / REPORT).write_text(strict_json.dumps(report), encoding="utf-8")
    return report


def verdict(report: Mapping[str, Any]) -> str:
    """Say what a merge's checks found, in one line."""
    found = report["verify"]
    if "skipped" in found:
        return f"files read back equal; logits not compared: {found['skipped']}"
    agreeing = round(found["argmax_agreement"] * found["positions"])
    share = found["effect_kept"]
    kept = "" if share is None else f" ({round(100 * share)}% of it kept)"
    return (
        f"{found['prompts']} prompts: max logit difference {found['max_abs']:.2g} "
        f"({found['relative_l2']:.1e} of the norm, {report['dtype']} bound {found['bound']:.1e}), "
        f"argmax {agreeing}/{found['positions']}, "
        f"distance to base {found['base_distance']:.3g}{kept}"
    )


def _compared(plan: MergePlan, folder: Path, runtime: Runtime, threads: Threads) -> dict[str, Any]:
    """Compare logits, or say why not.

    Raises:
        CheckFailed: `check.merge` when they are further apart than rounding explains.
    """
    needed, free = needed_bytes(plan.tensors, plan.base, plan.dtype), runtime.free_bytes()
    if not plan.options.verify:
        return {"skipped": "--no-verify"}
    if plan.options.scale != 1:
        return {"skipped": f"scale {plan.options.scale:g} is no model that could be compared"}
    if needed > free:
        return {"skipped": f"needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"}
    found = compare_logits(
        plan.tensors, plan.saved, plan.base, folder, plan.dtype, runtime.device, threads
    )
    if not found.ok:
        report = {"verify": found.facts(), "dtype": _name(plan.dtype)}
        raise CheckFailed(
            "check.merge",
            f"the merged model is not base and adapter in one; {verdict(report)}",
            help="nothing was published; where rounding swallows a light adapter, --dtype fp32 "
            "keeps it, and --no-verify merges without this check",
        )
    return found.facts()


def check_output(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse to write over what is read, or over what is not a merge of ours.

    Raises:
        BadInput: `output.is-input` or `output.not-empty`.
    """
    check_place(out)
    place = os.path.realpath(out)
    for path in inputs:
        if path.resolve().is_relative_to(place):
            raise BadInput(
                "output.is-input",
                f"would replace {path.name}, which the merge reads",
                where=str(out),
                help="choose another folder with --out",
            )
        if path.is_dir() and Path(place).is_relative_to(path.resolve()):
            raise BadInput(
                "output.is-input",
                f"lies in {path.name}, which the merge reads",
                where=str(out),
                help="choose another folder with --out",
            )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        message = "is a file, so no model can be there"
        raise BadInput("output.not-empty", message, where=str(out), help="use another --out")
    ours = (out / REPORT).is_file()
    if not (overwrite and ours):
        raise BadInput(
            "output.not-empty",
            "the folder holds an earlier merge" if ours else "holds files that are no merge",
            where=str(out),
            help="--overwrite replaces it" if ours else "choose another folder with --out",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
