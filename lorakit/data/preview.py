"""What the model will see of single rows, token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from lorakit.data.items import Item
from lorakit.data.template import Renderer
from lorakit.data.tokens import Encoder
from lorakit.errors import Place
from lorakit.model.inputs import MASKED


@dataclass(frozen=True)
class Span:
    """A stretch of tokens of one kind: trained or masked, special or not."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool


@dataclass(frozen=True)
class Sample:
    """One row through the template and the tokenizer; `kept` counts tokens within max_length."""

    place: Place
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    spans: tuple[Span, ...]
    kept: int
    ends_in_stop: bool

    @property
    def trained(self) -> int:
        """The number of trained tokens within max_length."""
        return sum(label != MASKED for label in self.labels[: self.kept])

    @property
    def text(self) -> str:
        """The whole row."""
        return "".join(span.text for span in self.spans)


def samples(
    items: Sequence[Item],
    renderer: Renderer,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Iterator[Sample]:
    """Yield each row as it would be trained; one over max_length as it would be cut.

    Raises:
        BadInput: when the template does not take a row.
    """
    encoder = Encoder(tokenizer, renderer.special)
    for item in items:
        (encoded,) = encoder.encode([renderer.render(item.conversation)])
        ids, labels = encoded.ids.tolist(), encoded.labels.tolist()
        kept = min(len(ids), max_length)
        trained = [label for label in labels[:kept] if label != MASKED]
        stops = renderer.special.ids | {tokenizer.eos_token_id}
        yield Sample(
            item.place,
            tuple(ids),
            tuple(labels),
            tuple(_spans(ids, labels, renderer.special.ids, tokenizer)),
            kept,
            bool(trained) and trained[-1] in stops,
        )


def _spans(
    ids: list[int], labels: list[int], special: frozenset[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Span]:
    def kind(at: int) -> tuple[bool, bool]:
        return labels[at] != MASKED, ids[at] in special

    for (trained, is_special), places in groupby(range(len(ids)), kind):
        some = [ids[at] for at in places]
        text = "".join(tokenizer.decode(some, clean_up_tokenization_spaces=False))
        yield Span(text, tuple(some), trained, is_special)
