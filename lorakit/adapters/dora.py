"""DoRA: LoRA for the direction of each row of a weight, and a trained length for it.

V = W + s · B A, W' = (m / ‖V‖) ⊙ V row by row, so y = bias + (m / ‖V‖) ⊙ (x Wᵀ + s · x Aᵀ Bᵀ).
m (outputs) starts as ‖W‖. No gradient flows through ‖V‖ (section 4.3 of the paper). With dropout
the base sees all of x: y = base(x) + (m / ‖V‖) ⊙ (x_d Wᵀ + s · x_d Aᵀ Bᵀ) - x_d Wᵀ, which are two
products with W in each direction, so that a quantised W is made dense twice.
Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.

Deviation: the norm is computed in closed form, once a step, without building V:
‖V‖² = ‖W‖² + 2s · rowsum((W Aᵀ) ⊙ B) + s² · rowsum((B A Aᵀ) ⊙ B). Embeddings are not adapted.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from lorakit.adapters._layer import ALL, Adapted, parameter
from lorakit.adapters._linear import LowRank, add_low_rank, added_to, low_rank_linear
from lorakit.adapters._low_rank import Init, LoraLayer
from lorakit.adapters.lora import LINEAR_PARTS, PEFT_FIXED, Lora
from lorakit.model.frozen import dense_weight, frozen_product
from lorakit.model.sites import Kind, Site

FOREIGN = ("use_dora", "peft_use_dora", "weight_decomposed")
SERVABLE = {
    "PEFT": "",
    "vLLM": "it refuses trained lengths, so merge instead",
    "llama.cpp": "its converter refuses trained lengths, so merge instead",
}

TINY = 1e-30  # far below the squared norm of any row but one of zeros
ROW_VALUES = 1 << 24  # values of W that are widened at a time


class DoraLayer(LoraLayer):
    """The update and the row lengths of one linear site."""

    norm: Tensor
    base_squares: Tensor | None

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, init: Init) -> None:
        super().__init__(site, rank, scale, dropout, init)
        self.magnitude = parameter(site.outputs)
        self.register_buffer("norm", torch.empty(site.outputs), persistent=False)
        self.register_buffer("base_squares", None, persistent=False)

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the output of the weight with new directions and lengths.

        The lengths multiply in fp32: in bf16 every factor within 0.4 % of one would be one.
        """
        factor = self.magnitude / self.norm
        if self.training and self.dropout:
            seen = functional.dropout(x, self.dropout)
            plain = frozen_product(seen, base)
            turned = add_low_rank(plain, seen, self.update()) * factor
            y: Tensor = base(x) + (turned - plain).to(x.dtype)
            return y
        turned = low_rank_linear(x, base, self.update())
        bare = turned - base.bias if isinstance(base.bias, Tensor) else turned
        # Not bare * factor + bias: where the factor is one, this is the base bit for bit.
        return (turned + bare * (factor - 1)).to(x.dtype)

    def low_rank(self) -> LowRank | None:
        """Return nothing: the lengths change the whole weight."""
        return None

    def merged(self, base: Mapping[str, Tensor], rows: slice = ALL) -> dict[str, Tensor]:
        """Return (m / ‖V‖) ⊙ V."""
        turned = added_to(base["weight"], self.update(), rows)
        norm = turned.norm(dim=1, keepdim=True).clamp(min=TINY**0.5)
        length = self.magnitude[rows, None].to(turned.device)
        return {**base, "weight": turned * (length / norm)}

    def tensors(self) -> dict[str, Tensor]:
        """Return A, B and m."""
        return {**super().tensors(), f"{self.name}.lora_magnitude_vector": self.magnitude}

    def reset(self, generator: torch.Generator) -> None:
        """Draw A; lengths are those of the base once `begin` was called."""
        super().reset(generator)
        with torch.no_grad():
            self.magnitude.fill_(1.0)
            self.norm.fill_(1.0)

    def begin(self, base: nn.Module) -> None:
        """Take the base's row lengths."""
        self.refresh(base)
        with torch.no_grad():
            self.magnitude.copy_(self.norm)

    @torch.no_grad()
    def refresh(self, base: nn.Module) -> None:
        """Compute ‖V‖ from the present A and B; ‖W‖² and W Aᵀ a few rows at a time."""
        weight = dense_weight(base)
        wide = torch.promote_types(weight.dtype, torch.float32)
        A, B, s = self.A.to(wide), self.B.to(wide), self.scale
        step = max(1, ROW_VALUES // A.shape[1])
        pieces = [slice(start, start + step) for start in range(0, len(B), step)]
        if self.base_squares is None:
            self.base_squares = torch.cat([weight[p].to(wide).square().sum(1) for p in pieces])
        overlaps = torch.cat([((weight[p].to(wide) @ A.t()) * B[p]).sum(1) for p in pieces])
        own = ((B @ (A @ A.t())) * B).sum(1)
        self.norm = (self.base_squares + 2 * s * overlaps + s * s * own).clamp_(min=TINY).sqrt_()


class Dora(Lora):
    """Low-rank updates of directions, with trained lengths."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv1d"})
    PARTS: ClassVar[tuple[frozenset[str], ...]] = (LINEAR_PARTS | {"lora_magnitude_vector"},)
    PEFT_FLAGS: ClassVar[Mapping[str, bool]] = {"use_dora": True}
    PEFT_FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {**PEFT_FIXED, "use_rslora": (False,)}
    linear_layer: ClassVar[type[LoraLayer]] = DoraLayer

    def start(self, model: PreTrainedModel, sites: Sequence[Site], batches: Iterable[Any]) -> None:
        """Take the row lengths of the base."""
        for layer, base in _layers(model):
            layer.begin(base)

    def refresh(self, model: PreTrainedModel) -> None:
        """Compute the norms of the weights with their updates."""
        for layer, base in _layers(model):
            layer.refresh(base)


def _layers(model: nn.Module) -> Iterator[tuple[DoraLayer, nn.Module]]:
    for module in model.modules():
        if isinstance(module, Adapted) and isinstance(module.adapter, DoraLayer):
            yield module.adapter, module.base
