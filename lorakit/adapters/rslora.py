"""rsLoRA: LoRA whose scale keeps high ranks learning.

y = base(x) + s · drop(x) Aᵀ Bᵀ with s = alpha / √r in place of alpha / r.
Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
arXiv 2312.03732.

No deviation. With the usual rank 64 and alpha 16 the scale is 2.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from lorakit.adapters.lora import Lora, LoraSettings

FOREIGN = ("use_rslora", "rs_lora", "rank_stabilized")
SERVABLE = {"PEFT": "", "vLLM": "", "llama.cpp": "it scales by alpha / rank, so merge instead"}


class RsLoraSettings(LoraSettings):
    """LoRA's settings, with a rank and alpha that suit the scale."""

    rank: int = Field(64, ge=1, description="rows of A and columns of B: the size of each update")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / √rank")


class RsLora(Lora):
    """LoRA scaled by the square root of its rank."""

    Settings = RsLoraSettings
    PEFT_FLAGS: ClassVar[Mapping[str, bool]] = {"use_rslora": True, "use_dora": False}

    @staticmethod
    def scale(alpha: float, rank: int) -> float:
        """Return what the product B A is multiplied by."""
        return alpha / math.sqrt(rank)
