"""Two checks of a merge: the bytes that were written, and the logits of the model they make.

The bound of the second follows from one matrix product whose weight was rounded (measured over
sizes 256 to 2,048 and ranks 8 to 64). A decoder layer has four such products in a row, and their
errors add up like random ones. It is wide beside what a light adapter does, so the adapter's effect
itself is looked for as well: rounding to bf16 swallows changes far below a weight's last place
(SmolLM2, all linear layers: 93 % of the effect stay after a real run, 41 % after one small step).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lorakit.adapters import Saved, attach_saved, switched_off
from lorakit.errors import CheckFailed
from lorakit.export.blocks import MergedTensors, Unit
from lorakit.model.base import Base, load
from lorakit.model.sites import find_sites
from lorakit.model.tokenizer import VOCABULARIES
from lorakit.model.weights import open_folder
from lorakit.runtime import Runtime, in_threads

# Its annotations leave out half of what it returns.
_AUTO: Any = AutoModelForCausalLM

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
KEPT = (0.1, 1.5)  # share of the adapter's effect
PRODUCTS = 4  # in a row, in one decoder layer
SPARE = 1.2  # of the weights: what loading and a forward pass take besides
GIB = 1 << 30

PROBES = (
    "The capital of France is Paris, and its river is called",
    "def mean(values):\n    return sum(values) /",
    '{"name": "Ada", "age": 36, "city":',
    "Q: What is 17 + 25?\nA:",
    "Once upon a time there was a small house at the edge of",
    "El tren de Madrid llega a las ocho de la",
    "Subject: Re: order 1042\n\nHello, my parcel has not",
    "1. eggs\n2. milk\n3.",
)


@dataclass(frozen=True)
class Written:
    """What reading the files again has shown: tensors in all, adapted ones, and those changed."""

    tensors: int
    adapted: int
    changed: int


@dataclass(frozen=True)
class Logits:
    """Base with adapter against merged model, over all positions of the probe prompts.

    `relative` is the difference's norm over that of the logits; `distance` is how far the adapter
    moves the base's logits at most; `kept` is the share of that move which the merged model makes:
    0 is the base, 1 all of it. It is None where the adapter moves nothing.
    """

    prompts: int
    positions: int
    max_abs: float
    relative: float
    bound: float
    argmax_agreement: float
    distance: float
    kept: float | None

    @property
    def ok(self) -> bool:
        least, most = KEPT
        return self.relative <= self.bound and (self.kept is None or least <= self.kept <= most)

    def facts(self) -> dict[str, Any]:
        """Return the numbers for `merge_report.json`."""
        return {
            "prompts": self.prompts,
            "positions": self.positions,
            "max_abs": self.max_abs,
            "relative_l2": self.relative,
            "bound": self.bound,
            "argmax_agreement": self.argmax_agreement,
            "base_distance": self.distance,
            "effect_kept": self.kept,
            "ok": self.ok,
        }


def check_written(
    tensors: MergedTensors, folder: Path, advance: Callable[[int], None] = lambda _: None
) -> Written:
    """Open what was written, compute every block again and compare it bit for bit.

    `advance` hears how many bytes more are found equal.

    Raises:
        CheckFailed: `check.merge` when a tensor is missing, left over or different, and when
            nothing differs from the base although the adapter is not zero.
        RunFailed: `model.damaged` when a file's header is broken.
    """
    expected = [name for unit in tensors.units for name in unit.names.values()]
    changed: set[str] = set()
    with open_folder(folder) as found:
        if set(found.names) != set(expected):
            odd = sorted(set(found.names) ^ set(expected))
            raise CheckFailed("check.merge", f"the files do not hold what was merged: {odd[0]}")

        def check(piece: tuple[Unit, slice]) -> int:
            blocks = tensors.blocks(*piece)
            for block in blocks:
                if not _same(found.read(block.name, piece[1]), block.merged):
                    raise CheckFailed(
                        "check.merge",
                        f"{block.name}: {found.file_of[block.name]} does not hold what was "
                        f"merged, from row {block.row} on",
                        help="the disk or the memory is at fault: merge again, elsewhere",
                    )
                if (
                    piece[0].layer
                    and block.name not in changed
                    and not _same(block.base.to(block.merged.dtype), block.merged)
                ):
                    changed.add(block.name)
            return sum(block.merged.nbytes for block in blocks)

        pieces = ((unit, rows) for unit in tensors.units for rows in tensors.slices(unit))
        in_threads(check, pieces, advance)
    layers = [unit.layer for unit in tensors.units if unit.layer]
    adapted = sum(len(unit.names) for unit in tensors.units if unit.layer)
    if not changed and tensors.scale and not all(layer.untouched() for layer in layers):
        raise CheckFailed(
            "check.merge",
            f"none of {adapted} adapted tensors differs from the base although the adapter is not "
            "zero: its changes are lost in rounding",
            help="merge with --dtype fp32",
        )
    return Written(len(expected), adapted, len(changed))


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are the same to the bit; bytes are also compared the fastest."""
    x, y = (t.contiguous().reshape(-1).view(torch.uint8).numpy() for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and bool((x == y).all())


def needed_bytes(tensors: MergedTensors) -> int:
    """Return the memory that comparing logits takes: one model at a time, in fp32."""
    return int(
        SPARE * sum(4 * tensors.size(name) for u in tensors.units for name in u.names.values())
    )


def compare_logits(
    saved: Saved, base: Base, folder: Path, dtype: torch.dtype, runtime: Runtime
) -> Logits:
    """Run probe prompts through base and adapter, and through the merged files.

    Both compute in fp32 (fp64 for fp64 weights), so that nothing but the rounding of the merged
    weights lies between them. The merged folder is loaded as any user of transformers would.
    """
    compute = torch.promote_types(dtype, torch.float32)
    model = load(base, device=runtime.device, dtype=compute)
    attach_saved(saved, model, find_sites(model))
    prompts = _probes(folder, model.config.get_text_config().vocab_size)
    adapted = _logits(model, prompts)
    with switched_off(model):
        plain = _logits(model, prompts)
    del model
    merged = _logits(_load_merged(folder, base, compute, runtime), prompts)
    effect = (adapted - plain).double()
    strength = float(effect.square().sum())
    depth = PRODUCTS * base.config.get_text_config().num_hidden_layers
    return Logits(
        prompts=len(prompts),
        positions=len(adapted),
        max_abs=float((adapted - merged).abs().max()),
        relative=float((adapted - merged).norm() / adapted.norm()),
        bound=BOUNDS[dtype] * depth**0.5,
        argmax_agreement=float((adapted.argmax(-1) == merged.argmax(-1)).double().mean()),
        distance=float(effect.abs().max()),
        kept=float((effect * (merged - plain)).sum()) / strength if strength else None,
    )


def _load_merged(folder: Path, base: Base, dtype: torch.dtype, runtime: Runtime) -> PreTrainedModel:
    model, info = _AUTO.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": runtime.device} if runtime.device.type != "cpu" else None,
        trust_remote_code=base.remote_code,
        local_files_only=True,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            first = sorted(map(str, info[kind]))[0]
            message = f"transformers finds {kind.replace('_', ' ')} in the result: {first}"
            raise CheckFailed("check.merge", message)
    loaded: PreTrainedModel = model
    return loaded


def _probes(folder: Path, vocabulary: int) -> list[list[int]]:
    """Return the prompts as ids: by the folder's tokenizer, by their bytes where it has none."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        return [[byte % vocabulary for byte in text.encode()] for text in PROBES]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return [tokenizer.encode(text) for text in PROBES]


@torch.no_grad()
def _logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits of every position, prompts end to end: (positions, vocabulary)."""
    rows = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    return torch.cat([model(input_ids=row, use_cache=False).logits[0].cpu() for row in rows])
