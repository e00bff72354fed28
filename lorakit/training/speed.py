"""How long a step takes: its products are counted, their rate is measured or a card's on paper.

A run reaches only a share of either, which is a guess: every time here is an estimate and says so.
"""

import re
from dataclasses import dataclass

import torch

from lorakit.devices import DTYPES, NATIVE_BF16, has_amx
from lorakit.errors import BadInput, EnvironmentLacks, one_of
from lorakit.host import GIB
from lorakit.runtime import Runtime
from lorakit.training.memory import Setup, Shape

# What of the rate of large products a whole step reaches. On a CPU the median of lorakit's arms in
# C1 to C4, A3 and A4 of `scripts/bench/results/cpu-*.json`, steps of 135 M parameters: 0.36 to 0.73
# in fp32, 0.48 to 0.60 in bf16, and 0.21 to 0.30 where AMX multiplies so fast that products are the
# lesser part of a step. On a GPU it is a guess: nothing was measured yet.
SHARE_FP32, SHARE_BF16, SHARE_AMX, SHARE_GPU = 0.63, 0.57, 0.25, 0.5


@dataclass(frozen=True)
class Card:
    """A GPU by its maker's data sheet: bytes, and dense 16-bit FLOP/s with fp32 sums.

    `capability` is the compute capability; one that is known by its memory alone is taken as new.
    """

    name: str
    memory: int
    flops: float | None = None
    capability: tuple[int, int] = (9, 0)

    @property
    def bf16(self) -> bool:
        return self.capability >= NATIVE_BF16

    def takes(self, dtype: str) -> torch.dtype:
        """Return what `model.dtype` means on it.

        Raises:
            EnvironmentLacks: when an explicit dtype is not supported.
        """
        if dtype == "auto":
            return torch.bfloat16 if self.bf16 else torch.float16
        if dtype == "bf16" and not self.bf16:
            raise EnvironmentLacks(
                "env.dtype",
                f"a {self.name} has no native bf16",
                help="set model.dtype to fp16 or auto",
            )
        return DTYPES[dtype]


def _card(name: str, gib: int, teraflops: float, capability: tuple[int, int]) -> Card:
    return Card(name, gib * GIB, teraflops * 1e12, capability)


CARDS = {
    card.name.lower(): card
    for card in (
        _card("T4", 16, 65, (7, 5)),
        _card("V100", 32, 125, (7, 0)),
        _card("RTX 3090", 24, 71, (8, 6)),
        _card("RTX 4090", 24, 165, (8, 9)),
        _card("RTX 5090", 32, 210, (12, 0)),
        _card("A10", 24, 125, (8, 6)),
        _card("L4", 24, 121, (8, 9)),
        _card("A6000", 48, 155, (8, 6)),
        _card("L40S", 48, 362, (8, 9)),
        _card("A100-40GB", 40, 312, (8, 0)),
        _card("A100-80GB", 80, 312, (8, 0)),
        _card("H100", 80, 989, (9, 0)),
        _card("H200", 141, 989, (9, 0)),
    )
}
_BETWEEN = re.compile(r"[\s_-]+")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB)?", re.IGNORECASE)
_UNITS = {"gib": GIB, "g": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6}


def card(text: str) -> Card:
    """Return the card that a name or a size of memory means: `L40S`, `24GiB`, `24`.

    Raises:
        BadInput: when it is neither.
    """
    # People write RTX 3090, RTX3090 and rtx-3090.
    name = _BETWEEN.sub("", text.lower())
    if known := next((c for n, c in CARDS.items() if _BETWEEN.sub("", n) == name), None):
        return known
    size = _SIZE.fullmatch(text.strip())
    if size is None or float(size[1]) == 0:
        names = one_of(card.name for card in CARDS.values())
        raise BadInput("usage", f"--gpu {text}: a size such as 24GiB, or {names}")
    memory = float(size[1]) * _UNITS[(size[2] or "GiB").lower()]
    return Card(f"{memory / GIB:g} GiB", int(memory))


@dataclass(frozen=True)
class Rate:
    """FLOP/s that a run is expected to reach, and where the number comes from."""

    flops: float
    source: str

    @classmethod
    def of(cls, card: Card) -> "Rate | None":
        """Return what a card is expected to reach, None where only its memory is known."""
        if card.flops is None:
            return None
        source = f"{SHARE_GPU:.0%} of the {card.name}'s {card.flops / 1e12:g} TFLOP/s"
        return cls(SHARE_GPU * card.flops, f"{source} on paper")

    @classmethod
    def measured(cls, runtime: Runtime, dtype: torch.dtype) -> "Rate":
        """Time a product on the device of a run."""
        found, share = runtime.product_rate(dtype), SHARE_FP32
        if runtime.is_gpu:
            share = SHARE_GPU
        elif dtype.itemsize < 4:
            share = SHARE_AMX if has_amx() else SHARE_BF16
        shown = f"{found / 1e9:,.0f}" if found >= 1e10 else f"{found / 1e9:.2g}"
        return cls(share * found, f"{share:.0%} of {shown} GFLOP/s, measured now")


def step_flops(shape: Shape, setup: Setup, tokens: float, squares: float) -> float:
    """Return the FLOPs of an optimizer step.

    Args:
        shape: the adapted model.
        setup: how it is run.
        tokens: of the step.
        squares: the sum of the squared lengths of its rows.
    """
    layers = shape.trace.layers
    products = sum(layer.forward.slope + layer.backward.slope for layer in layers)
    products += sum(layer.forward.slope for layer in layers[: setup.recomputed])
    head = 4 * shape.hidden * shape.vocabulary * setup.share
    # Causal attention: 2 forward and 5 backward for each pair and width, 2 again if recomputed.
    passes = 7 * len(layers) + 2 * setup.recomputed
    return tokens * (products + head) + squares * shape.queries * passes
