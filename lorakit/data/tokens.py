"""Pieces → token ids and labels: the one tokenisation for training, evaluation and generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lorakit.data.template import BREAK, Rendered, Special
from lorakit.errors import BadInput, Place
from lorakit.model.inputs import MASKED
from lorakit.model.tokenizer import refusals

# What is known of each example: where its tokens end, how many are trained, where it stands.
TABLE = np.dtype(
    [("end", "<i8"), ("trained", "<i4"), ("file", "<i4"), ("line", "<i4"), ("cut", "?")], align=True
)

# How texts begin, to see whether a tokenizer marks the start of one.
_STARTS = ("a", " a", "\n\na", "1", ".", "the")


@dataclass(frozen=True, eq=False)
class Example:
    """A row as the model sees it: ids (tokens,) and labels (tokens,), both int32.

    A label is the id at its own position where that token is trained, else -100. The first is
    always -100: nothing comes before it. `cut` says that the row was longer than max_length.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    place: Place
    cut: bool = False

    @property
    def trained(self) -> int:
        """The number of trained tokens."""
        return int(np.count_nonzero(self.labels != MASKED))

    @property
    def last_trained(self) -> int | None:
        """The id of the last trained token."""
        trained = self.labels[self.labels != MASKED]
        return int(trained[-1]) if len(trained) else None


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Examples as columns, in memory or mapped from a file; each is made when it is asked for.

    `ids` (tokens,) are those of all rows, end to end, uint16 where that holds them, else uint32;
    `marks` has a bit for each, set where it is trained. `table` (rows,) is a `TABLE`; its `file`
    counts `files`, and a `line` of 0 means none.
    """

    ids: NDArray[np.unsignedinteger[Any]]
    marks: NDArray[np.uint8]
    table: NDArray[np.void]
    files: tuple[str, ...]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Self:
        """Return examples as columns."""
        if isinstance(examples, cls):
            return examples
        files = {name: k for k, name in enumerate(dict.fromkeys(e.place.file for e in examples))}
        table = np.zeros(len(examples), TABLE)
        table["end"] = np.cumsum([len(example.ids) for example in examples])
        for name, values in {
            "trained": [example.trained for example in examples],
            "file": [files[example.place.file] for example in examples],
            "line": [example.place.line or 0 for example in examples],
            "cut": [example.cut for example in examples],
        }.items():
            table[name] = values
        ids = np.concatenate([example.ids for example in examples] or [np.zeros(0, np.int32)])
        labels = np.concatenate([example.labels for example in examples] or [ids])
        narrow = np.uint16 if ids.max(initial=0) <= np.iinfo(np.uint16).max else np.uint32
        return cls(ids.astype(narrow), np.packbits(labels != MASKED), table, tuple(files))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The tokens of each example."""
        return np.diff(self.table["end"], prepend=0)

    @property
    def trained(self) -> NDArray[np.int64]:
        """The trained tokens of each example."""
        return self.table["trained"].astype(np.int64)

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[k] for k in range(len(self))[index]]
        row = range(len(self))[index]
        _, _, file, line, cut = self.table[row].tolist()
        first, last = (int(self.table["end"][k]) if k >= 0 else 0 for k in (row - 1, row))
        ids = self.ids[first:last].astype(np.int32)
        bits = np.unpackbits(self.marks[first // 8 : -(-last // 8)])[first % 8 :][: len(ids)]
        place = Place(self.files[file], line or None)
        return Example(ids, np.where(bits, ids, np.int32(MASKED)), place, cut)


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: ids through the generation prompt, their text, the answer expected."""

    ids: tuple[int, ...]
    text: str
    reference: str
    place: Place


@dataclass(frozen=True, eq=False, slots=True)
class Encoded:
    """Ids and labels at full length; `prompt` counts the ids before the last answer."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    prompt: int | None


class Encoder:
    """Tokenise pieces, each as if it stood where it stands.

    A piece is cut off from the one before it, as an answer is from its prompt when a model
    generates. So that no tokenizer takes its start for the start of a text, it is tokenised behind
    an anchor whose ids are then dropped: the special token that ends the piece before it, else a
    break. Byte-level tokenizers start anywhere alike and need no break.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: Special) -> None:
        """Prepare the tokenizer.

        Raises:
            BadInput: `tokenizer.missing` when it has no tokenizer.json to work from.
        """
        if not tokenizer.is_fast:
            raise BadInput(
                "tokenizer.missing",
                f"{type(tokenizer).__name__} is a slow tokenizer; lorakit needs tokenizer.json",
                help="load it once with transformers and save it with save_pretrained",
            )
        self._special = special
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may ask for both, and rows would be cut in silence.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._where = str(tokenizer.name_or_path)
        with refusals(self._where):
            self._anchors = {
                name: self._backend.encode(name, add_special_tokens=False).ids
                for name in (*special.names, BREAK, "")
            }
            self._break = ""
            alone = [self._ids("", text) for text in _STARTS]
            if alone != [self._ids(BREAK, text) for text in _STARTS]:
                self._break = BREAK

    def encode(self, rows: Sequence[Rendered]) -> list[Encoded]:
        """Return ids and labels of rendered conversations, in their order.

        Raises:
            BadInput: `tokenizer.missing` when the tokenizer cannot take a text.
        """
        pieces = [(anchor, text) for row in rows for anchor, text in self._anchored(row)]
        with refusals(self._where):
            found = self._backend.encode_batch_fast(
                [anchor + text for anchor, text in pieces], add_special_tokens=False
            )
            ids = iter(
                [
                    self._dropped(anchor, text, one.ids)
                    for (anchor, text), one in zip(pieces, found, strict=True)
                ]
            )
        return [_joined(row, [next(ids) for _ in row.pieces]) for row in rows]

    def _anchored(self, row: Rendered) -> list[tuple[str, str]]:
        pieces, before = [], ""
        for piece in row.pieces:
            anchor = (self._special.at_end(before) or self._break) if before else ""
            pieces.append((anchor, piece.text))
            before = piece.text or before
        return pieces

    def _ids(self, anchor: str, text: str) -> list[int]:
        ids = self._backend.encode(anchor + text, add_special_tokens=False).ids
        return self._dropped(anchor, text, ids)

    def _dropped(self, anchor: str, text: str, ids: list[int]) -> list[int]:
        """Return the ids without those of the anchor and of the breaks within the text."""
        start = self._anchors[anchor]
        if BREAK not in text and ids[: len(start)] == start:
            return ids[len(start) :]
        whole = anchor + text
        exact = self._backend.encode(whole, add_special_tokens=False)
        return [
            id
            for id, (start, end) in zip(exact.ids, exact.offsets, strict=True)
            if end > len(anchor) and whole[start:end] != BREAK
        ]


def _joined(row: Rendered, ids: list[list[int]]) -> Encoded:
    whole = np.array([id for piece in ids for id in piece], np.int32)
    labels = np.full_like(whole, MASKED)
    at = 0
    for piece, some in zip(row.pieces, ids, strict=True):
        if piece.trained:
            labels[at : at + len(some)] = whole[at : at + len(some)]
        at += len(some)
    labels[:1] = MASKED
    prompt = None if row.answer is None else sum(map(len, ids[: row.answer]))
    return Encoded(whole, labels, prompt)
