"""Which rows are kept, which are not and why: nothing is lost without a count and a place."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from lorakit.data.items import Faults, Item
from lorakit.data.report import Counts
from lorakit.data.template import Rendered, Renderer
from lorakit.data.tokens import Encoded, Encoder, Example, Prompt
from lorakit.errors import BadInput, Notice, Place
from lorakit.recipe.sections import Data

MOST_DROPPED = 0.1  # share of rows over max_length that may go without the recipe saying so

TOO_LONG, EMPTY, CUT_AWAY, INCONSISTENT = (
    "over max_length",
    "no tokens to learn",
    "no tokens to learn within max_length",
    "the template hides where the answer is",
)


@dataclass
class Kept:
    """One set as it grows, row by row."""

    name: str
    section: Data
    max_length: int
    examples: list[Example] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, list[Place]] = field(default_factory=lambda: defaultdict(list))
    spelled: list[Place] = field(default_factory=list)
    trailing: list[Place] = field(default_factory=list)
    unanswered: list[Place] = field(default_factory=list)
    inconsistent: Faults = field(default_factory=Faults)
    refused: Faults = field(default_factory=Faults)
    hidden: bool = False  # an answer that is not empty has left no trace in the rendered text
    longest: int = 0
    longest_prompt: int = 0
    read: int = 0

    def add(self, items: Sequence[Item], renderer: Renderer, encoder: Encoder) -> None:
        """Render and tokenise some rows; keep those that can be trained.

        Raises:
            BadInput: when the template is missing, unsafe or goes beyond a limit.
        """
        self.read += len(items)
        self.formats.update(item.format for item in items)
        rows: list[tuple[Item, Rendered]] = []
        for item in items:
            try:
                rows.append((item, renderer.render(item.conversation)))
            except BadInput as error:
                self._not_rendered(error, item.place)
        found = encoder.encode([rendered for _, rendered in rows])
        for (item, rendered), encoded in zip(rows, found, strict=True):
            self._keep(item, rendered, encoded)

    def _not_rendered(self, error: BadInput, place: Place) -> None:
        if error.id == "template.inconsistent":
            self.inconsistent.add(error, place)
            self.dropped[INCONSISTENT].append(place)
        elif error.id == "data.template-refused":
            self.refused.add(error, place)
        else:
            error.where = error.where or place
            raise error

    def _keep(self, item: Item, rendered: Rendered, encoded: Encoded) -> None:
        example = Example(encoded.ids, encoded.labels, item.place)
        length = len(encoded.ids)
        self.longest = max(self.longest, length)
        if rendered.spelled:
            self.spelled.append(item.place)
        if not example.trained:
            self.dropped[EMPTY].append(item.place)
            self.hidden |= any(
                m.role == "assistant" and m.trained and m.content.strip()
                for m in item.conversation.messages[1:]
            )
            return
        if length > self.max_length:
            if self.section.too_long != "truncate":
                self.dropped[TOO_LONG].append(item.place)
                return
            first = self.max_length
            example = Example(encoded.ids[:first], encoded.labels[:first], item.place, cut=True)
            if not example.trained:
                self.longest_prompt = max(self.longest_prompt, encoded.prompt or 0)
                self.dropped[CUT_AWAY].append(item.place)
                return
        if item.conversation.messages[-1].role != "assistant" and self.section.train_on != "all":
            self.trailing.append(item.place)
        self.examples.append(example)
        self.weights.append(item.weight)
        if encoded.prompt and encoded.prompt >= self.max_length:
            self.unanswered.append(item.place)  # its last answer was cut away
        elif encoded.prompt:
            ids = tuple(encoded.ids[: encoded.prompt].tolist())
            prompt = Prompt(ids, rendered.prompt, rendered.reference, item.place)
            self.prompts.append(prompt)

    def check(self) -> None:
        """Refuse a set that has lost too much.

        Raises:
            BadInput: `data.template-refused` for any row; `data.too-long`, `data.no-trained-tokens`
                or `template.inconsistent`.
        """
        self.refused.raise_first()
        too_long = self.dropped.get(TOO_LONG, [])
        lost = f"{len(too_long):,} of {self.read:,} rows of {self.name} are longer than "
        lost += f"data.max_length {self.max_length:,}; the longest has {self.longest:,} tokens"
        raise_to = f"raise data.max_length to {self.longest}"
        if too_long and self.section.too_long == "error":
            raise BadInput("data.too-long", lost, where=too_long[0], help=raise_to)
        if self.read and not self.examples:
            self._refuse_all(lost, raise_to)
        if len(too_long) > MOST_DROPPED * self.read and self.section.too_long == "auto":
            help = f"{raise_to}, or say data.too_long: drop or truncate"
            raise BadInput("data.too-long", lost, where=too_long[0], help=help)

    def _refuse_all(self, lost: str, raise_to: str) -> None:
        reasons = set(self.dropped)
        if reasons == {INCONSISTENT}:
            self.inconsistent.raise_first()
        if reasons == {TOO_LONG}:
            message = f"0 usable rows of {self.read:,}: {lost}"
            where = self.dropped[TOO_LONG][0]
            advice = f"{raise_to}, or set data.too_long: truncate"
            raise BadInput("data.too-long", message, where=where, help=advice)
        counts = "; ".join(f"{reason}: {len(rows):,}" for reason, rows in self.dropped.items())
        message = f"no tokens to learn in any of {self.read:,} rows of {self.name} ({counts})"
        help = "every answer is empty: check the columns" if reasons == {EMPTY} else None
        if self.hidden:
            help = "the chat template leaves the answers out; `lorakit data preview` shows the rows"
        if CUT_AWAY in reasons:
            message += (
                f": length, for prompts alone use up to {self.longest_prompt:,} "
                f"of max_length {self.max_length:,}"
            )
            help = f"raise data.max_length to more than {self.longest_prompt}"
        first = next(iter(self.dropped.values()))[0]
        raise BadInput("data.no-trained-tokens", message, where=first, help=help)

    def notices(self, stops: frozenset[int]) -> list[Notice]:
        """Return what was dropped or cut, and answers whose end is not learnt."""
        found = []
        for reason, rows in self.dropped.items():
            limit = f" {self.max_length:,}" if reason.endswith("max_length") else ""
            message = self._counted(rows, f"{reason}{limit}: dropped")
            found.append(Notice("data.dropped", message, rows[0]))
        cut = [example.place for example in self.examples if example.cut]
        if cut:
            message = self._counted(cut, f"over max_length {self.max_length:,}: cut")
            found.append(Notice("data.cut", message, cut[0]))
        if self.unanswered and self.name == "eval":  # those of train are never asked
            what = f"no room for the last answer in max_length {self.max_length:,}: not answered"
            message = self._counted(self.unanswered, what)
            help = "metrics of answers go over the other rows; raise data.max_length"
            found.append(Notice("data.unanswered", message, self.unanswered[0], help))
        if self.trailing:
            message = self._counted(self.trailing, "turns after the last answer: left out")
            help = "data.train_on: all trains on them as well"
            found.append(Notice("data.trailing-turns", message, self.trailing[0], help))
        if self.spelled:
            message = self._counted(self.spelled, "special tokens spelled in the data")
            help = "they are learnt as text in turns, and as themselves in plain text rows"
            found.append(Notice("data.special-tokens", message, self.spelled[0], help))
        whole = [example for example in self.examples if not example.cut]
        open_ended = [example.place for example in whole if example.last_trained not in stops]
        if open_ended:
            message = (
                f"{len(whole) - len(open_ended):,} of {len(whole):,} rows of {self.name} end in a "
                "trained stop token: the model may not learn to stop"
            )
            help = "use a template that ends answers with a special token"
            found.append(Notice("data.eos-untrained", message, open_ended[0], help))
        return found

    def counts(self, stops: frozenset[int]) -> Counts | None:
        """Return the numbers of this set; None when it has no rows."""
        if not self.examples:
            return None
        dropped = {reason: len(rows) for reason, rows in self.dropped.items()}
        return Counts.of(
            self.examples,
            read=self.read,
            formats=self.formats,
            dropped=dropped,
            longest=self.longest,
            stops=stops,
            max_length=self.max_length,
        )

    def _counted(self, places: Sequence[Place], what: str) -> str:
        share = len(places) / self.read
        first = ", ".join(map(str, places[:3]))
        number = f"{len(places):,} of {self.read:,} rows of {self.name}"
        return f"{number}: {what} ({share:.1%}); first {first}"
