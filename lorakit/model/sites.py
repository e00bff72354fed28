"""The places of a model that an adapter method can adapt, found without its weights."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "conv1d", "embedding", "norm", "block"]
Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "down", "gate_up", "head", "embed", "other"]


@dataclass(frozen=True)
class Site:
    """What a method needs to know of one module: its path, kind, role and shape.

    `layer` is the 0-based index of the decoder layer that holds it, None outside all layers.
    A conv1d site (GPT-2) stores its weight as (inputs, outputs); everything a method sees of it
    is in the usual orientation (outputs, inputs). An embedding has inputs = rows of the table.
    `tied` names the module that shares this one's weight.
    """

    name: str
    kind: Kind
    role: Role
    inputs: int
    outputs: int
    has_bias: bool
    layer: int | None = None
    tied: str | None = None
