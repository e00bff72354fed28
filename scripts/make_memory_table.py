"""Write the table of memory in the README from the estimate of `lorakit plan`; --check compares.

    python scripts/make_memory_table.py

Bases are shapes on the meta device: no weights, no network.
"""

import sys

import torch
from generated import ROOT, write_or_check
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(ROOT))

from lorakit import adapters
from lorakit.host import GIB
from lorakit.model.attention import NAME
from lorakit.model.quantized import Quantization
from lorakit.model.quantizer import quantizable
from lorakit.model.sites import find_sites
from lorakit.training.memory import Setup, Shape, estimate
from lorakit.training.trace import trace

README = ROOT / "README.md"
MARKS = "<!-- memory: scripts/make_memory_table.py -->", "<!-- end of memory -->"
TOKENS, RANK = 2048, 16
GPU = (9, 0)  # compute capability
# Hidden, MLP, layers, heads, key heads, vocabulary, and whether both ends share their weight.
BASES = {
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256, True),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256, True),
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000, False),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256, False),
    "Llama-2-13B": (5120, 13824, 40, 40, 40, 32000, False),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128256, False),
}
WAYS = {
    "bf16": (None, False),
    "bf16, recomputed": (None, True),
    "nf4": (Quantization("nf4"), False),
    "nf4, recomputed": (Quantization("nf4"), True),
}


def shape_of(name: str) -> Shape:
    """Return the shape of a base with LoRA on all its linear layers."""
    hidden, mlp, layers, heads, keys, words, tied = BASES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=words,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = NAME
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    linears = [(site.outputs, site.inputs) for site in quantizable(model)]
    settings = adapters.settings_for("lora")
    method = adapters.get("lora")(settings.model_validate({"rank": RANK}))
    adapters.attach(method, model, method.sites(find_sites(model)), seed=0)
    return Shape.of(model, trace(model, TOKENS, packed=True, gpu=GPU), linears)


def table() -> str:
    """Return the rows as Markdown, in GiB."""
    lines = [f"| base | {' | '.join(WAYS)} |", "|" + " --- |" * (1 + len(WAYS))]
    for name in BASES:
        shape, cells = shape_of(name), [name]
        for how, recomputed in WAYS.values():
            count = shape.layers if recomputed else 0
            setup = Setup(TOKENS, recomputed=count, quantization=how, gpu=True)
            cells.append(f"{estimate(shape, setup).total / GIB:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Put the table between its marks, or check that it is there."""
    before, begin, rest = README.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise SystemExit(f"README.md has no place for the table: {MARKS[0]} … {MARKS[1]}")
    return write_or_check(README, f"{before}{begin}\n{table()}\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
