"""Layers that add a low-rank product to a weight: linear sites, embeddings, ends of a tie."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit.adapters._layer import ALL, Layer, parameter
from lorakit.adapters._linear import LowRank, added_to, low_rank_linear
from lorakit.model.sites import Site

Init = Literal["default", "gaussian"]


class LoraLayer(Layer):
    """The update of one linear site."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, init: Init) -> None:
        super().__init__(site.name)
        self.A = parameter(rank, site.inputs)
        self.B = parameter(site.outputs, rank)
        self.scale = scale
        self.dropout = dropout
        self.init = init

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return base(x) + s · drop(x) Aᵀ Bᵀ."""
        dropout = self.dropout if self.training else 0.0
        return low_rank_linear(x, base, self.update(), dropout=dropout)

    def update(self) -> LowRank:
        """Return A, B and their scale."""
        return LowRank(self.A, self.B, self.scale)

    def low_rank(self) -> LowRank | None:
        """Return the update."""
        return self.update()

    def merged(self, base: Mapping[str, Tensor], rows: slice = ALL) -> dict[str, Tensor]:
        """Return W + s · B A."""
        return {**base, "weight": added_to(base["weight"], self.update(), rows)}

    def tensors(self) -> dict[str, Tensor]:
        """Return A and B."""
        return {f"{self.name}.lora_A.weight": self.A, f"{self.name}.lora_B.weight": self.B}

    def reset(self, generator: torch.Generator) -> None:
        """Draw A; B is zero, so that nothing changes yet."""
        rank, inputs = self.A.shape
        drawn = torch.empty(rank, inputs)
        if self.init == "gaussian":
            drawn.normal_(0.0, 1 / rank, generator=generator)
        else:
            bound = 1 / math.sqrt(inputs)
            drawn.uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.A.copy_(drawn)
            self.B.zero_()

    def untouched(self) -> bool:
        """Tell whether B is all zero."""
        return not self.B.any()


class LoraEmbedding(Layer):
    """The update of an embedding table."""

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__(site.name)
        self.A = parameter(rank, site.inputs)
        self.B = parameter(site.outputs, rank)
        self.scale = scale

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return the rows of E + s · Aᵀ Bᵀ at the ids, scaled as the base scales its own."""
        y: Tensor = base(x)
        looked_up = functional.embedding(x, self.A.t()) @ self.B.t()
        # Gemma's embedding multiplies what it looks up; the update is part of the table.
        return y + (looked_up * (self.scale * getattr(base, "embed_scale", 1.0))).to(y.dtype)

    def update(self) -> LowRank:
        """Return the update of the table (table, dim) as a product B A."""
        return LowRank(self.B.t(), self.A.t(), self.scale)

    def low_rank(self) -> LowRank | None:
        """Return the update of the table."""
        return self.update()

    def merged(self, base: Mapping[str, Tensor], rows: slice = ALL) -> dict[str, Tensor]:
        """Return E + s · Aᵀ Bᵀ."""
        return {**base, "weight": added_to(base["weight"], self.update(), rows)}

    def tensors(self) -> dict[str, Tensor]:
        """Return A and B."""
        return {f"{self.name}.lora_embedding_A": self.A, f"{self.name}.lora_embedding_B": self.B}

    def reset(self, generator: torch.Generator) -> None:
        """Draw B; A is zero, so that nothing changes yet."""
        with torch.no_grad():
            self.A.zero_()
            self.B.copy_(torch.empty(self.B.shape).normal_(generator=generator))

    def untouched(self) -> bool:
        """Tell whether A is all zero."""
        return not self.A.any()

    def tied(self, name: str) -> Layer:
        """Return the same update for the head."""
        return TiedHead(name, self)


class TiedHead(Layer):
    """The update of an embedding table at the head that shares the table."""

    def __init__(self, name: str, embedding: LoraEmbedding) -> None:
        super().__init__(name)
        self.embedding = embedding
        self.scale = embedding.scale

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Return base(x) + s · x B A."""
        return low_rank_linear(x, base, self.embedding.update())

    def low_rank(self) -> LowRank | None:
        """Return the update of the table."""
        return self.embedding.update()

    def merged(self, base: Mapping[str, Tensor], rows: slice = ALL) -> dict[str, Tensor]:
        """Return what the embedding's update makes of the shared weight."""
        return self.embedding.merged(base, rows)

    def tensors(self) -> dict[str, Tensor]:
        """Return the embedding's tensors as PEFT writes them for a linear layer."""
        A, B, _ = self.embedding.update()
        return {f"{self.name}.lora_A.weight": A, f"{self.name}.lora_B.weight": B}

    def reset(self, generator: torch.Generator) -> None:
        """Leave the values to the embedding."""

    def untouched(self) -> bool:
        """Ask the embedding."""
        return self.embedding.untouched()
