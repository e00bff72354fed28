"""How much memory a run needs, by part, from shapes alone.

The saved activations are those of transformers' blocks with the low-rank product of
`adapters/_linear.py`, per token and layer (two norms in fp32, four inputs of width d, keys and
values, four tensors of width f, the attention's row sums).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from transformers import PretrainedConfig

from lorakit.errors import RunFailed

GIB = 2**30
# Interpreter, libraries and allocator slack; on CUDA the context.
OVERHEAD = 600 * 2**20
# Adapter, gradient, and the two moments of AdamW: fp32 each.
BYTES_PER_STATE = 4


@dataclass(frozen=True)
class Shape:
    """The widths of a decoder that its activations depend on."""

    hidden: int
    mlp: int
    keys: int
    heads: int
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Self:
        """Read the widths from a config; what a family does not name follows from the others."""
        text = config.get_text_config()
        hidden, heads = text.hidden_size, text.num_attention_heads
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        head = getattr(text, "head_dim", None) or hidden // heads
        mlp = (
            getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
        )
        return cls(hidden, mlp, key_heads * head, heads, text.num_hidden_layers, text.vocab_size)

    def activations(self, dtype: torch.dtype) -> int:
        """Return the bytes one token leaves behind in one layer until the backward pass."""
        size = dtype.itemsize
        norms = 2 * (4 * self.hidden + 4)
        return norms + size * (4 * self.hidden + 2 * self.keys + 4 * self.mlp) + 4 * self.heads


@dataclass(frozen=True)
class Memory:
    """Bytes by part."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(
    shape: Shape,
    total: int,
    trainable: int,
    dtype: torch.dtype,
    tokens: int,
    *,
    checkpointing: bool,
) -> Memory:
    """Estimate the peak of a step over micro-batches of `tokens` tokens."""
    one_layer = tokens * shape.activations(dtype)
    inputs = tokens * shape.hidden * dtype.itemsize * shape.layers
    # Logits exist for one chunk at a time; scores, softmax and gradient are alive together.
    chunk = 3 * 64 * 2**20
    return Memory(
        {
            "weights": total * dtype.itemsize,
            "adapters": trainable * BYTES_PER_STATE,
            "grads": trainable * BYTES_PER_STATE,
            "optimizer": 2 * trainable * BYTES_PER_STATE,
            "activations": inputs + one_layer if checkpointing else one_layer * shape.layers,
            "logits": min(chunk, 3 * 4 * tokens * shape.vocabulary),
            "overhead": OVERHEAD,
        }
    )


@contextmanager
def memory_errors(memory: Memory, micro_batch_tokens: int) -> Iterator[None]:
    """Say what may help when memory runs out.

    Raises:
        RunFailed: `run.out-of-memory` in place of torch's own errors.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out = isinstance(
            error, torch.OutOfMemoryError | MemoryError
        ) or "can't allocate memory" in str(error)
        if not out:
            raise
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.parts.items())
        raise RunFailed(
            "run.out-of-memory",
            f"memory ran out in micro-batches of up to {micro_batch_tokens:,} tokens "
            f"(estimate in GiB: {parts}); the last checkpoint is intact",
            help="set train.micro_batch_size: 1, or train.gradient_checkpointing: true",
        ) from error
