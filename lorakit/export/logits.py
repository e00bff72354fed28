"""The second check of a merge: the logits of base and adapter against those of the merged files.

The bound follows from one matrix product whose weight was rounded (measured over sizes 256 to
2,048 and ranks 8 to 64). A decoder layer has four such products in a row, and their errors add up
like random ones. It is wide beside what a light adapter does, so the adapter's effect itself is
looked for as well: rounding to bf16 swallows changes far below a weight's last place
(SmolLM2, all linear layers: 93 % of the effect stay after a real run, 41 % after one small step).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.adapters import Saved, attach_layers, switched_off
from lorakit.export.blocks import MergedTensors
from lorakit.model.base import Base, load_tokenizer
from lorakit.model.config import read_config
from lorakit.model.streamed import held_bytes, streamed
from lorakit.model.tokenizer import VOCABULARIES
from lorakit.model.weights import open_folder
from lorakit.threads import Threads

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
KEPT = (0.1, 1.5)  # share of the adapter's effect
PRODUCTS = 4  # in a row, in one decoder layer

TOKENS = 4  # of each prompt: enough for a difference to show, few enough to be quick

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


def needed_bytes(tensors: MergedTensors, base: Base, dtype: torch.dtype) -> int:
    """Return the memory that comparing logits takes at most: a matrix and three models' logits.

    And a whole model, where the weights cannot be read as they are used.
    """
    sizes = [tensors.size(name) for unit in tensors.units for name in unit.names.values()]
    vocabulary: int = base.config.get_text_config().vocab_size
    logits = 4 * len(PROBES) * TOKENS * vocabulary
    held = held_bytes(base, tensors.weights)
    return held + (max(sizes) + logits) * compute_dtype(dtype).itemsize


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what logits are computed in: in it, nothing but the weights' rounding differs."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def compare_logits(
    tensors: MergedTensors,
    saved: Saved,
    base: Base,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    threads: Threads,
) -> Logits:
    """Run probe prompts through base and adapter, and through the merged files.

    Weights are read as they are needed, so that this takes little memory.

    Raises:
        LorakitError: when the merged folder is no model that could be loaded.
    """
    compute: Any = {"device": device, "dtype": compute_dtype(dtype), "threads": threads}
    config = read_config(folder, code_allowed=base.remote_code, links_into=None)
    made = replace(base, folder=folder, gguf=None, links_into=None, config=config)
    ids = probes(made).to(device)
    model = streamed(base, tensors.weights, **compute)
    layers = {name: layer.to(device) for name, layer in tensors.layers.items()}
    attach_layers(saved.method(), model, layers)
    adapted = _logits(model, ids)
    with switched_off(model):
        plain = _logits(model, ids)
    del model
    with open_folder(folder) as found:
        merged = _logits(streamed(made, found, **compute), ids)
    depth = PRODUCTS * base.config.get_text_config().num_hidden_layers
    return compared(adapted, plain, merged, bound=BOUNDS[dtype] * depth**0.5)


def compared(adapted: Tensor, plain: Tensor, merged: Tensor, *, bound: float) -> Logits:
    """Compare logits (prompts, tokens, vocabulary), one position in fp64 at a time."""
    sums, largest = torch.zeros(5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for position in zip(*(x.flatten(0, 1) for x in (adapted, plain, merged)), strict=True):
        a, p, m = (logits.double() for logits in position)
        error, effect = a - m, a - p
        products = ((error, error), (a, a), (effect, effect), (effect, m - p))
        agree = a.argmax() == m.argmax()
        sums += torch.stack([*(x.dot(y) for x, y in products), agree.double()])
        largest = largest.maximum(torch.stack([error.abs().max(), effect.abs().max()]))
    errors, squares, strength, along, agreeing = sums.tolist()
    positions = adapted.shape[:2].numel()
    return Logits(
        prompts=len(adapted),
        positions=positions,
        max_abs=largest[0].item(),
        relative=(errors / squares) ** 0.5 if squares else float(errors > 0),
        bound=bound,
        argmax_agreement=agreeing / positions,
        distance=largest[1].item(),
        kept=along / strength if strength else None,
    )


def probes(base: Base) -> Tensor:
    """Return the prompts' first tokens (prompts, tokens), all of one length.

    By the folder's tokenizer, or by the prompts' bytes where it has none.
    """
    if base.folder and any((base.folder / name).is_file() for name in VOCABULARIES):
        tokenizer = load_tokenizer(base)
        rows = [tokenizer.encode(text) for text in PROBES]
    else:
        vocabulary = base.config.get_text_config().vocab_size
        rows = [[byte % vocabulary for byte in text.encode()] for text in PROBES]
    length = min(TOKENS, *map(len, rows))
    return torch.tensor([row[:length] for row in rows])


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the logits of every position (prompts, tokens, vocabulary)."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.cpu()
