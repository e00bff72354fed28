"""What the trace counts without memory is what a real forward pass keeps, to the byte."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from lorakit.model.documents import Documents
from lorakit.model.families import decoder_layers
from lorakit.training.trace import Line, Trace, plain_trace, trace
from tests.tiny import tiny_config
from tests.training.shapes import adapted, llama

LENGTH = 12
GPU = (9, 0)  # compute capability
QV = ["q_proj", "v_proj"]


def kept(model: PreTrainedModel, rows: int, *, packed: bool) -> int:
    """Return the bytes of all storages that autograd keeps of a real forward pass."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known:
            seen[place] = tensor
        return tensor

    shape = (1, rows * LENGTH) if packed else (rows, LENGTH)
    positions = torch.arange(LENGTH).repeat(rows).view(shape)
    inputs: dict[str, Any] = {"documents": Documents(((rows if packed else 1, LENGTH),))}
    if packed:
        inputs["position_ids"] = positions
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.zeros(shape, dtype=torch.long)
        out = model.base_model(input_ids=ids, use_cache=False, **inputs)[0]
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def predicted(traced: Trace, tokens: int) -> float:
    """Return the bytes that a trace says are kept."""
    parts = (*(layer.saved for layer in traced.layers), traced.after.saved, traced.shared)
    return sum(line(tokens) for line in parts)


@pytest.mark.parametrize(
    ("family", "packed", "adapter"),
    [
        ("llama", True, {"rank": 4}),
        ("llama", False, {"rank": 4, "dropout": 0.1}),
        ("llama", True, {"rank": 4, "layers": [1]}),
        ("llama", True, {"rank": 2, "modules_to_save": ["norm", "embed_tokens"]}),
        ("llama", True, {"method": "dora", "rank": 2}),
        ("llama", False, {"method": "prefix", "tokens": 4}),
        ("qwen2", True, {"rank": 2, "target_modules": "attention"}),
        ("qwen2", True, {"method": "ia3"}),
        ("gpt2", True, {"rank": 4}),
    ],
    ids=str,
)
def test_the_trace_is_what_a_real_pass_keeps(
    family: str, packed: bool, adapter: dict[str, Any]
) -> None:
    config = tiny_config(family)
    real = adapted(config, "cpu", torch.float32, **adapter)
    traced = trace(adapted(config, "meta", torch.float32, **adapter), LENGTH, packed=packed)
    for rows in (1, 3):
        assert predicted(traced, rows * LENGTH) == kept(real, rows, packed=packed)


@pytest.mark.parametrize(
    ("lean", "targets", "per_token"),
    [
        # Two norms in fp32, what attention and the MLP keep, and x Aᵀ of each site.
        (False, "all-linear", "16 d + 8 f + 4 kv + 4 heads + 14 r + 8"),
        (False, QV, "14 d + 6 f + 4 kv + 4 heads + 4 r + 8"),
        # Norms and gates are made again.
        (True, "all-linear", "8 d + 4 f + 4 kv + 4 heads + 14 r + 8"),
    ],
)
def test_a_layer_keeps_what_the_formulas_say(lean: bool, targets: Any, per_token: str) -> None:
    widths = {"d": 512, "f": 1792, "kv": 128, "heads": 8, "r": 16}
    d, f, kv, heads, r = widths.values()
    config = llama(d, f, 3, heads, kv * heads // d, 320)
    model = adapted(config, "meta", torch.bfloat16, rank=r, target_modules=targets)
    if not lean:
        for each in decoder_layers(model):
            del each.forward
    layer = trace(model, 64, packed=True, gpu=GPU).layers[1]
    terms = (term.split() for term in per_token.split(" + "))
    formula = sum(int(n) * (widths[width[0]] if width else 1) for n, *width in terms)
    assert layer.saved.slope == formula
    assert layer.saved.fixed < 100  # the kernel's random state
    assert layer.input == Line(0, 2 * d)
    products = 2 * (2 * d * d + 2 * d * kv + 3 * d * f)
    per_site = {"q": 2 * d, "v": d + kv}
    every = {**per_site, "k": d + kv, "o": 2 * d, "gate": d + f, "up": d + f, "down": f + d}
    lora = 2 * r * sum((per_site if targets == QV else every).values())
    assert layer.forward == Line(0, products + lora)


def test_a_gpu_keeps_no_masks() -> None:
    config = llama(512, 1792, 2, 8, 2, 320)
    dropped, plain = (
        trace(adapted(config, "meta", torch.bfloat16, rank=4, dropout=p), 64, packed=True, gpu=GPU)
        for p in (0.1, 0.0)
    )
    assert dropped.layers[1].saved.slope == plain.layers[1].saved.slope
    assert dropped.layers[1].peak.slope == pytest.approx(plain.layers[1].peak.slope, rel=0.1)


def test_a_gpu_without_flash_attention_keeps_keys_and_values_of_every_head() -> None:
    config = llama(512, 1792, 2, 8, 2, 320)
    old, new = (
        trace(adapted(config, "meta", torch.float16, rank=4), 64, packed=True, gpu=capability)
        for capability in ((7, 5), GPU)
    )
    # No scores, which would grow with the length; the outputs again, where they lie end to end.
    more = old.layers[1].saved.slope - new.layers[1].saved.slope
    assert more == 2 * 2 * (512 - 128) + 2 * 512


def test_what_cannot_be_traced_is_guessed_from_its_widths() -> None:
    config = llama(512, 1792, 3, 8, 8, 320)
    model = adapted(config, "meta", torch.bfloat16, rank=4)
    for each in decoder_layers(model):
        del each.forward  # such a family has no twins
    traced, guess = trace(model, 64, packed=False, gpu=GPU), plain_trace(config, torch.bfloat16)
    assert len(guess.layers) == len(traced.layers)
    for name in ("input", "saved", "peak", "forward", "backward"):
        seen = getattr(traced.layers[1], name).slope
        assert getattr(guess.layers[1], name).slope == pytest.approx(seen, rel=0.25)
