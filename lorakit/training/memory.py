"""How much memory a run needs, by part, from the shapes of a model and how it is run.

Pure functions: what the layers keep comes from a trace, everything else is counted here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil, prod

import torch
from transformers import PreTrainedModel

from lorakit import adapters
from lorakit.host import GIB
from lorakit.model.families import head_of
from lorakit.model.loss import Way, chunk_rows, way_of
from lorakit.model.quantized import Quantization
from lorakit.recipe.sections import Optimizer
from lorakit.training.trace import Trace

# On a CPU the interpreter and its libraries, on a GPU the context of its driver.
OVERHEAD, CONTEXT = 600 << 20, 500 << 20
# On a CPU, beside tensors that are alive: what libraries keep once they have multiplied, and, as a
# share of what comes and goes in a step, the gaps between tensors in the C library's heap. Measured
# on glibc 2.36 as `lorakit train` sets it (`processes.tunables`): 8 MiB of code, 9 of scratch, and
# gaps of 6 to 32 %, the larger ones where layers are few. The middle of what two machines showed.
LIBRARIES, GAPS = 17 << 20, 0.15
# And what oneDNN and torch keep for the shapes that they have multiplied in bf16. A step of rows of
# one length has 54: 74 MiB on AVX512-BF16, 43 on AMX. Others add more, up to `environment.KERNELS`.
KERNELS = 64 << 20
# 8-bit states come in blocks with an fp32 scale each; small tensors keep fp32 states
# (Dettmers et al. 2021, 2110.02861, as bitsandbytes has it).
STATE_BLOCK, STATE_SMALLEST = 256, 4096


@dataclass(frozen=True)
class Shape:
    """What an estimate knows of an adapted model.

    Args:
        trace: what its layers keep.
        parameters: numbers in the base, tied ones once.
        linears: (outputs, inputs) of the weights that can be quantised.
        trained: the shape of each trained tensor.
        hidden: width of the states that the head takes.
        queries: width of all heads of a layer together.
        vocabulary: rows of the head.
        way: how the loss comes by its gradient.
        capped: whether the head is followed by a soft cap.
        of_head: numbers of the head that are trained.
        dtype: of the base and its activations.
    """

    trace: Trace
    parameters: int
    linears: tuple[tuple[int, int], ...]
    trained: tuple[tuple[int, ...], ...]
    hidden: int
    queries: int
    vocabulary: int
    way: Way
    capped: bool
    of_head: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls, model: PreTrainedModel, trace: Trace, linears: Iterable[tuple[int, int]]
    ) -> "Shape":
        """Read the shape of an adapted model, which may be on the meta device."""
        trained = adapters.trainable(model).values()
        own = {
            id(parameter) for layer in adapters.layers_of(model) for parameter in layer.parameters()
        }
        text = model.config.get_text_config()
        head, found = getattr(text, "head_dim", None), head_of(model)
        return cls(
            trace,
            sum(p.numel() for p in model.parameters() if id(p) not in own),
            tuple(linears),
            tuple(tuple(parameter.shape) for parameter in trained),
            text.hidden_size,
            head * text.num_attention_heads if head else text.hidden_size,
            text.vocab_size,
            way_of(model),
            found is not None and found.cap is not None,
            sum(p.numel() for p in found.module.parameters() if p.requires_grad) if found else 0,
            model.dtype,
        )

    @property
    def trainable(self) -> int:
        """The count of trained numbers."""
        return sum(map(prod, self.trained))

    @property
    def layers(self) -> int:
        return len(self.trace.layers)


@dataclass(frozen=True)
class Setup:
    """How a model is run.

    Args:
        tokens: of a micro-batch, padding included.
        share: of them that are trained.
        recomputed: layers, from the first, whose activations are computed again.
        offload: whether the inputs of those wait in host memory.
        quantization: of the base, None where it is dense.
        optimizer: that the device has for the recipe.
        gpu: whether a GPU computes.
    """

    tokens: int
    share: float = 1.0
    recomputed: int = 0
    offload: bool = False
    quantization: Quantization | None = None
    optimizer: Optimizer = "adamw"
    gpu: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes by part on the device that computes, and what waits in the host's memory meanwhile."""

    parts: dict[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def gib(size: float) -> str:
    """Write bytes as people read them, so that what is just too much shows as more."""
    return f"{size / GIB:.2f} GiB"


def estimate(shape: Shape, setup: Setup) -> Memory:
    """Estimate the peak of a step."""
    states = optimizer_bytes(shape, setup.optimizer)
    paged = setup.optimizer.startswith("paged")
    activations, logits = _activations(shape, setup)
    buffer = max(map(prod, shape.linears), default=0) * shape.dtype.itemsize
    narrow = shape.dtype.itemsize
    copies = narrow if narrow < 4 else 0  # of what is trained, in the dtype that is computed in
    inputs = sum(layer.input(setup.tokens) for layer in shape.trace.layers[: setup.recomputed])
    parts = {
        "weights": weight_bytes(shape, setup.quantization),
        "adapters": (4 + copies) * shape.trainable,
        "grads": 4 * shape.trainable,
        "optimizer": 0 if paged else states,
        "activations": activations,
        "logits": logits,
        "dequantization": buffer if setup.quantization else 0,
        "allocator": 0 if setup.gpu else _beside(shape, setup),
        "overhead": CONTEXT if setup.gpu else OVERHEAD,
    }
    return Memory(parts, round(inputs) * setup.offload + states * paged)


def _beside(shape: Shape, setup: Setup) -> int:
    """Return the bytes that a CPU's libraries keep, and those of gaps in the C library's heap.

    What small objects stand in is memory that no tensor of its size fits in again, and each layer
    that is run leaves such objects: gaps follow what all layers make, whether or not they keep it.
    """
    gaps = GAPS * sum(_activations(shape, replace(setup, recomputed=0, offload=False)))
    return LIBRARIES + KERNELS * (shape.dtype is torch.bfloat16) + round(gaps)


def weight_bytes(shape: Shape, how: Quantization | None) -> int:
    """Return the bytes that the base takes."""
    size = shape.dtype.itemsize
    if how is None:
        return size * shape.parameters
    dense = size * (shape.parameters - sum(map(prod, shape.linears)))
    return dense + how.held_bytes(shape.linears)


def optimizer_bytes(shape: Shape, optimizer: str) -> int:
    """Return the bytes of an optimizer's states."""
    return sum(state_bytes(tensor, optimizer) for tensor in shape.trained)


def state_bytes(tensor: tuple[int, ...], optimizer: str) -> int:
    """Return the bytes of an optimizer's states for a tensor of this shape."""
    numbers = prod(tensor)
    if optimizer == "sgd":
        return 0
    if optimizer == "adafactor" and len(tensor) > 1:
        return 4 * (numbers // tensor[-1] + tensor[-1])
    moments = 1 if optimizer.startswith(("lion", "adafactor")) else 2
    if optimizer.endswith("8bit") and numbers >= STATE_SMALLEST:
        return moments * (numbers + 4 * ceil(numbers / STATE_BLOCK))
    return moments * 4 * numbers


def _activations(shape: Shape, setup: Setup) -> tuple[int, int]:
    """Return the bytes of activations and of logits at the moment that needs most of both.

    That is the loss, or the backward pass of what follows the last layer, of a layer, or of the
    embedding: what lies behind a layer is gone by then.
    """
    tokens, layers = setup.tokens, shape.trace.layers
    kept = [
        min(layer.input(tokens), layer.saved(tokens))  # nothing where no gradient comes by
        if number < setup.recomputed
        else layer.saved(tokens)
        for number, layer in enumerate(layers)
    ]
    if setup.offload:  # two inputs are on their way at a time
        waiting = kept[: setup.recomputed]
        kept[: setup.recomputed] = [0.0] * len(waiting)
        kept[:1] = [2 * max(waiting, default=0)]
    shared, after = shape.trace.shared(tokens), shape.trace.after
    states = tokens * setup.share * shape.hidden * shape.dtype.itemsize
    moments = [
        (sum(kept) + shared + after.saved(tokens), _loss(shape, setup) + states),
        (sum(kept) + after.peak(tokens) + states, 0.0),
        *(
            (sum(kept[:number]) + shared + layer.peak(tokens), 0.0)
            for number, layer in enumerate(layers)
        ),
        (shape.trace.before(tokens), 0.0),
    ]
    activations, logits = max(moments, key=sum)
    return round(activations), round(logits)


def _loss(shape: Shape, setup: Setup) -> float:
    """Return the bytes of logits, and of what is made of them, that are alive at a time.

    Ready in the forward pass: the fp32 scores and their softmax, on a CPU in one place and once
    more in the dtype of the weights, the slope of a cap, and the gradient of the trained states.
    Otherwise: the log-softmax, its gradient and that of the scores; of a chunk where the head is
    run again, with what that adds to the gradients of its own tensors. A model that makes logits
    itself may make those of all tokens, whose gradient is put together from that of trained ones.
    """
    trained, narrow = setup.tokens * setup.share, shape.dtype.itemsize
    if shape.way == "whole":
        return shape.vocabulary * max(12 * trained, narrow * (2 * setup.tokens + trained))
    halved = narrow * (narrow < 4)
    rows = min(chunk_rows(shape.vocabulary, gpu=setup.gpu), trained)
    again = shape.way == "again"
    bytes_a_score = 12 if again else 8 if setup.gpu else 4 + halved
    of_scores = rows * shape.vocabulary * (bytes_a_score + narrow * shape.capped)
    of_head = shape.of_head * (4 + halved)  # in fp32, and as the base computes with them
    return of_scores + of_head + (trained - rows * again) * shape.hidden * narrow
