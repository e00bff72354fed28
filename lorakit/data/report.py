"""What reading and tokenising the data found, in numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.data.packing import pack
from lorakit.data.tokens import Example

PADDED_ROWS = 8  # rows of the batches that the padding share is worked out for


@dataclass(frozen=True)
class Counts:
    """One set, train or eval. `dropped` is by reason; `longest` counts dropped rows too.

    `formats` says how many of the rows read are in each format, those found by `auto` included.
    """

    read: int
    formats: Mapping[str, int]
    rows: int
    dropped: Mapping[str, int]
    cut: int
    tokens: int
    trained: int
    longest: int
    percentiles: Mapping[int, int]
    ends_in_stop: int
    duplicates: int
    padding: float
    packing_fill: float

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        *,
        read: int,
        formats: Mapping[str, int],
        dropped: Mapping[str, int],
        longest: int,
        stops: frozenset[int],
        max_length: int,
    ) -> "Counts":
        """Count the examples that were kept.

        Args:
            examples: the rows kept.
            read: rows before any was dropped.
            formats: the same rows, by the format they were read by.
            dropped: rows dropped, by reason.
            longest: tokens of the longest row read.
            stops: ids that end an answer.
            max_length: the recipe's.
        """
        lengths = [len(example.ids) for example in examples]
        tokens = sum(lengths)
        # Padded as they come, eight at a time: what packing saves.
        groups = [lengths[at : at + PADDED_ROWS] for at in range(0, len(lengths), PADDED_ROWS)]
        padded = sum(len(group) * max(group) for group in groups)
        return cls(
            read=read,
            formats=dict(formats),
            rows=len(examples),
            dropped=dict(dropped),
            cut=sum(example.cut for example in examples),
            tokens=tokens,
            trained=sum(example.trained for example in examples),
            longest=longest,
            percentiles={q: int(np.percentile(lengths, q, method="higher")) for q in (50, 90, 99)},
            ends_in_stop=sum(example.last_trained in stops for example in examples),
            duplicates=len(lengths) - len({example.ids.tobytes() for example in examples}),
            padding=1 - tokens / padded,
            packing_fill=tokens / (len(pack(lengths, max_length)) * max_length),
        )

    def facts(self) -> dict[str, Any]:
        """Return the counts as JSON holds them."""
        percentiles = {f"p{q}": value for q, value in self.percentiles.items()}
        by_name = {"formats": dict(self.formats), "dropped": dict(self.dropped)}
        return {**vars(self), **by_name, "percentiles": percentiles}


@dataclass(frozen=True)
class Report:
    """Both sets. `overlap` counts eval rows that train has too; `sha256` is by source."""

    train: Counts | None
    eval: Counts | None
    overlap: int
    sha256: Mapping[str, str]
    max_length: int

    def facts(self) -> dict[str, Any]:
        """Return the report as `plan.json` and `--json` hold it."""
        return {
            "train": self.train.facts() if self.train else None,
            "eval": self.eval.facts() if self.eval else None,
            "overlap": self.overlap,
            "sha256": dict(self.sha256),
            "max_length": self.max_length,
        }

    def lines(self, *, held_out: str = "eval") -> list[str]:
        """Return the report for people, three lines a set; `held_out` is what the second is."""
        sets = {"train": self.train, held_out: self.eval}
        return [line for name, counts in sets.items() if counts for line in _lines(name, counts)]


def _lines(name: str, counts: Counts) -> list[str]:
    dropped = "".join(f", {n:,} dropped: {reason}" for reason, n in counts.dropped.items())
    cut = f", {counts.cut:,} cut" if counts.cut else ""
    mean = counts.tokens / counts.rows
    half, _, most = counts.percentiles.values()
    return [
        f"{name}  {counts.rows:,} of {counts.read:,} rows{dropped}{cut}  {counts.tokens:,} tokens, "
        f"{counts.trained / counts.tokens:.0%} trained",
        f"  tokens a row: mean {mean:,.0f}, half below {half:,}, 99 % below {most:,}, "
        f"longest {counts.longest:,}",
        f"  {counts.ends_in_stop:,} end in a trained stop token, {counts.duplicates:,} duplicates; "
        f"padding would be {counts.padding:.0%}, dense packs are {counts.packing_fill:.0%} full",
    ]
