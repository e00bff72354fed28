"""How the rows of a batch fall into documents, and how attention's kernels take them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Self

import torch
from torch import Tensor

from lorakit import devices

# On a CPU documents of up to so many tokens are as long as the next multiple of STEP: those of
# about one length share products, whose library keeps a kernel for each shape it has met.
ROUNDED_TOKENS, STEP = 512, 16
# From which compute capability on torch has a variable-length kernel for a GPU.
FLASH = (8, 0)


@dataclass(frozen=True)
class Documents:
    """How each row of a batch falls into documents, the same way in every row.

    `runs` are (count, length): (2, 5), (1, 3) are two documents of 5 tokens and one of 3.
    `bounds` says where documents begin and end in all rows laid end to end, int32 (documents + 1),
    on devices whose kernel asks for it; `sorted` is how batched products take them, where documents
    differ. `capability` is that of the GPU they are for, None on a CPU.
    """

    runs: tuple[tuple[int, int], ...]
    bounds: Tensor | None = None
    sorted: "Sorted | None" = None
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, lengths: tuple[int, ...], rows: int, device: torch.device) -> Self:
        """Describe rows that are made of documents of these lengths each."""
        runs = tuple((sum(1 for _ in run), length) for length, run in groupby(lengths))
        if device.type == "cpu":
            return cls(runs, None, Sorted.of(lengths * rows) if len(runs) > 1 else None)
        capability = devices.capability(device)
        if not (has_flash(capability) and devices.has_flash_kernels()):
            return cls(runs, capability=capability)
        ends = torch.tensor([0, *(lengths * rows)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(runs, devices.sent(ends, device), capability=capability)

    @property
    def in_a_row(self) -> int:
        return sum(count for count, _ in self.runs)

    @property
    def longest(self) -> int:
        return max(length for _, length in self.runs)

    def within(self, tokens: int) -> Iterator[tuple[slice, int, int]]:
        """Yield where each run lies in rows laid end to end, its count and its length."""
        row = sum(count * length for count, length in self.runs)
        rows = tokens // row if row else 0
        runs = [(count * rows, length) for count, length in self.runs]
        start = 0
        for count, length in runs if len(runs) == 1 else self.runs * rows:
            yield slice(start, start + count * length), count, length
            start += count * length


@dataclass(frozen=True)
class Sorted:
    """Documents by length, each with some more tokens at its end: those of about one length alike.

    No token before them sees them, for attention is causal; what they see themselves is dropped.

    Args:
        documents: how all tokens fall into documents then.
        sources: the token that stands at each place; behind a document its last one again.
        added: the places that no document has.
        places: where each token stands.
    """

    documents: Documents
    sources: Tensor
    added: Tensor
    places: Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...]) -> Self:
        """Sort documents of these lengths that lie end to end."""
        wide = [_rounded(length) for length in lengths]
        order = sorted(range(len(lengths)), key=wide.__getitem__)
        starts, at = list(accumulate(lengths, initial=0)), 0
        sources, added, places = [], [], torch.empty(starts[-1], dtype=torch.long)
        for number in order:
            start, length, end = starts[number], lengths[number], at + wide[number]
            sources.append(torch.arange(start, start + wide[number]).clamp_(max=start + length - 1))
            added.append(torch.arange(at + length, end))
            torch.arange(at, at + length, out=places[start : start + length])
            at = end
        runs = tuple((sum(1 for _ in run), size) for size, run in groupby(wide[n] for n in order))
        return cls(Documents(runs), torch.cat(sources), torch.cat(added), places)

    def laid_out(self, states: Tensor) -> Tensor:
        """Return (tokens, heads, dim) as (places, heads, dim)."""
        return states.index_select(0, self.sources)

    def taken_back(self, states: Tensor) -> Tensor:
        """Return (places, heads, dim) as (tokens, heads, dim)."""
        return states.index_select(0, self.places)


def has_flash(capability: tuple[int, int] | None) -> bool:
    """Tell whether torch has flash attention for a GPU of this compute capability."""
    return capability is not None and capability >= FLASH


def _rounded(length: int) -> int:
    return -(-length // STEP) * STEP if length <= ROUNDED_TOKENS else length
