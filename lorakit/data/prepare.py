"""Sources → examples: everything that happens to data before the first batch, counted."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lorakit.data.items import Items, Request, read
from lorakit.data.kept import Kept
from lorakit.data.report import Report
from lorakit.data.template import Renderer
from lorakit.data.tokens import Encoder, Example, Examples, Prompt
from lorakit.errors import BadInput, Notice, Place
from lorakit.recipe.sections import Data

ROWS_AT_ONCE = 512
USUAL_LENGTH = 2048  # of `data.max_length: auto`


@dataclass(frozen=True)
class Dataset:
    """Rows ready to train on, what was found on the way, and what generation needs to know.

    `weights` are repeats per epoch of each training row. `eval_prompts` leaves out rows of plain
    text. `stop_ids` are the tokens that answers end in. `chat_template` is the one in use.
    """

    train: Examples
    eval: Examples
    eval_prompts: tuple[Prompt, ...]
    weights: tuple[float, ...]
    report: Report
    notices: tuple[Notice, ...]
    stop_ids: frozenset[int]
    chat_template: str | None
    max_length: int


def prepare(
    request: Request,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    advance: Callable[[int], None] = lambda _: None,
) -> Dataset:
    """Read, render and tokenise all data.

    Args:
        request: the rows that are wanted.
        tokenizer: the base's.
        context: positions that the model has for a row, where there is a limit.
        advance: hears how many more rows are done.

    Raises:
        BadInput: when a row, the template or the lengths do not allow training.
        EnvironmentLacks: `env.offline`.
    """
    section = request.section
    max_length = longest_allowed(section, context)
    items = read(request)
    renderer = renderer_of(section, tokenizer, request.folder)
    encoder = Encoder(tokenizer, renderer.special)
    sets = {name: Kept(name, section, max_length) for name in ("train", "eval")}
    for name, some in (("train", items.train), ("eval", items.eval)):
        if request.only not in (None, name):
            continue
        for at in range(0, len(some), ROWS_AT_ONCE):
            several = some[at : at + ROWS_AT_ONCE]
            sets[name].add(several, renderer, encoder)
            advance(len(several))
        sets[name].check()
    notices = (*items.notices, *_without_effect(section, items))
    return _dataset(sets["train"], sets["eval"], notices, items.sha256, renderer, tokenizer)


def longest_allowed(section: Data, context: int | None) -> int:
    """Return max_length, at most the positions that the model has for a row.

    Raises:
        BadInput: `model.context-too-short` when the recipe asks for more.
    """
    asked = section.max_length
    if asked == "auto":
        return min(USUAL_LENGTH, context or USUAL_LENGTH)
    if context is not None and asked > context:
        raise BadInput(
            "model.context-too-short",
            f"data.max_length {asked} > the {context} positions that the model has for a row",
            help=f"set data.max_length to at most {context}",
        )
    return asked


def _without_effect(section: Data, items: Items) -> list[Notice]:
    """Return notices on keys that are set where all rows are plain text, which has no turns."""
    rows = [item.conversation for item in (*items.train, *items.eval)]
    if not items.train or any(row.template != "unused" or row.messages[:-1] for row in rows):
        return []
    keys = {
        "chat_template": section.chat_template not in ("auto", "none"),
        "train_on": section.train_on != "completions",
    }
    return [
        Notice(
            "recipe.no-effect",
            f"data.{key} has no effect: every row is plain text, trained as it stands",
            Place(items.train[0].place.file),
            "remove this key, or set data.format",
        )
        for key, is_set in keys.items()
        if is_set
    ]


def renderer_of(section: Data, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Renderer:
    """Return what renders the conversations of this recipe."""
    return Renderer(
        tokenizer,
        chat_template=section.chat_template,
        train_on=section.train_on,
        system=section.system,
        folder=folder,
    )


def shared_rows(train: Iterable[Example], others: Iterable[Example]) -> int:
    """Return how many of the other rows have the tokens of a training row."""
    seen = {example.ids.tobytes() for example in train}
    return sum(example.ids.tobytes() in seen for example in others)


def overlapping(name: str, overlap: int, rows: int) -> Notice:
    """Say how many rows of a set are in train as well."""
    return Notice("data.overlap", f"{overlap:,} of {rows:,} {name} rows are in train as well")


def _dataset(
    train: Kept,
    held_out: Kept,
    notices: tuple[Notice, ...],
    sha256: dict[str, str],
    renderer: Renderer,
    tokenizer: PreTrainedTokenizerBase,
) -> Dataset:
    ends = {example.last_trained for example in (*train.examples, *held_out.examples)}
    special = {id for id in ends if id in renderer.special.ids}
    stops = frozenset(special | ({eos} if (eos := tokenizer.eos_token_id) is not None else set()))
    overlap = shared_rows(train.examples, held_out.examples)
    found = [*notices, *train.notices(stops), *held_out.notices(stops)]
    if overlap:
        found.append(overlapping("eval", overlap, len(held_out.examples)))
    report = Report(train.counts(stops), held_out.counts(stops), overlap, sha256, train.max_length)
    return Dataset(
        Examples.of(train.examples),
        Examples.of(held_out.examples),
        tuple(held_out.prompts),
        tuple(train.weights),
        report,
        tuple(found),
        stops,
        renderer.template.source if renderer.template else None,
        train.max_length,
    )
