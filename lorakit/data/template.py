"""Conversation → pieces of text, each trained or not: the loss mask is made here.

Where an answer begins and ends is found by rendering: the conversation up to the answer with the
generation prompt, and the conversation through the answer, must both begin what the whole renders
to. So the mask follows whatever the template does, and never looks at token ids.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lorakit.data.confined import ConfinedTemplate
from lorakit.data.formats import Conversation, Message
from lorakit.data.sandbox import MAX_SOURCE
from lorakit.errors import BadInput, Place, one_of
from lorakit.model.tokenizer import refusals
from lorakit.recipe.files import given
from lorakit.storage.disk import storage_errors
from lorakit.storage.paths import open_regular
from lorakit.storage.redact import printable

# A noncharacter, which no text may hold. It stands inside special tokens that data spells, so that
# they stay text, and before a piece that goes on in the middle of a text; its tokens are dropped.
BREAK = "\ufdd0"

_SURROGATE = re.compile("[\ud800-\udfff]")

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{{ '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}"
        "{{ message.role | capitalize }}: {{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message.role == 'user' %}### Instruction:{{ '\n' }}"
        "{% elif message.role == 'assistant' %}### Response:{{ '\n' }}{% endif %}"
        "{{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}### Response:{{ '\n' }}{% endif %}"
    ),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that is tokenised by itself and trained as a whole or not at all."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as pieces; `answer` is the one that begins the last answer, if there is one.

    `spelled` says that its data spells special tokens.
    """

    pieces: tuple[Piece, ...]
    answer: int | None
    reference: str
    spelled: bool

    @property
    def prompt(self) -> str:
        """The text through the generation prompt of the last answer."""
        return "".join(piece.text for piece in self.pieces[: self.answer]).replace(BREAK, "")


class Special:
    """The special tokens of a tokenizer as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.eos = tokenizer.eos_token or ""
        self.bos = (tokenizer.bos_token or "") if _adds_bos(tokenizer) else ""
        added = tokenizer.added_tokens_decoder
        self.ids = frozenset(id for id, token in added.items() if token.special)
        # Longest first, as tokenizers match; one of a single character cannot be broken.
        names = [added[id].content for id in self.ids if len(added[id].content) > 1]
        self.names = tuple(sorted(names, key=len, reverse=True))
        self._pattern = re.compile("|".join(map(re.escape, self.names)) or "(?!)")

    def spelled(self, text: str) -> bool:
        """Tell whether a text spells a special token."""
        return bool(self._pattern.search(text))

    def broken(self, text: str) -> str:
        """Return the text with a break within each special token that it spells."""
        while self._pattern.search(text):
            text = self._pattern.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)
        return text

    def turn_end(self, span: str) -> int:
        """Return where an answer's text ends: after its last special token, if nothing follows."""
        end = len(span)
        for match in self._pattern.finditer(span):
            end = match.end()
        return end if not span[end:].strip() else len(span)

    def at_end(self, text: str) -> str | None:
        """Return the special token that ends a text."""
        if not text.endswith(self.names):
            return None
        return next(name for name in self.names if text.endswith(name))


class Renderer:
    """Turn conversations into pieces, for training and for generation alike."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str = "auto",
        train_on: Literal["completions", "last", "all"] = "completions",
        system: str | None = None,
        folder: Path = Path(),
    ) -> None:
        """Choose the template.

        Args:
            tokenizer: whose template `auto` means, and whose special tokens are kept out of data.
            chat_template: `auto`, `none`, a name of `TEMPLATES`, or a .jinja file.
            train_on: which turns are trained.
            system: a system message for conversations without one.
            folder: what a template's path is relative to.

        Raises:
            BadInput: when there is no such template, or it cannot be read.
        """
        self.special = Special(tokenizer)
        self._tokenizer, self._train_on, self._system = tokenizer, train_on, system
        source = _source(chat_template, tokenizer, folder)
        several = tokenizer.chat_template if chat_template == "auto" else None
        self._named = tuple(several) if isinstance(several, dict) and source is None else ()
        if source is not None and chat_template in TEMPLATES and self.special.bos:
            source = "{{ bos_token }}" + source
        variables = tokenizer.special_tokens_map
        own = chat_template == "auto"
        file = folder / os.path.expanduser(chat_template)
        self._place = Place(tokenizer.name_or_path if own else str(file))
        try:
            self.template = None if source is None else ConfinedTemplate(source, variables)
        except BadInput as error:
            error.where = self._place
            raise

    def render(self, conversation: Conversation) -> Rendered:
        """Return the pieces of a conversation, through its last answer unless all is trained.

        Raises:
            BadInput: `template.missing`, `template.inconsistent` when the rendering of the turns so
                far does not begin that of all turns, or what the template itself raises.
        """
        if conversation.template == "unused":
            return self._plain(conversation.messages)
        if self.template is None and conversation.template == "optional" and not self._named:
            return self._plain(conversation.messages)
        if self.template is None:
            has = (
                f"templates for {', '.join(map(printable, self._named))}, none for ordinary use"
                if self._named
                else "none"
            )
            raise BadInput(
                "template.missing",
                f"{'these rows' if self._named else 'messages'} need a chat template; "
                f"the tokenizer has {has}",
                help="set data.chat_template: chatml (or plain, alpaca, a .jinja file), "
                "or use an instruct model",
            )
        try:
            return self._chat(conversation.messages, self.template)
        except BadInput as error:  # who calls adds the row, which may not be at fault
            error.help = error.help or f"the chat template is {printable(str(self._place), 500)}"
            raise

    def _plain(self, messages: Sequence[Message]) -> Rendered:
        """Lay a prompt and its completion, or a text alone, end to end; then the end of text."""
        if self._system is not None:
            message = "data.system: plain text has no system message; it needs a chat template"
            raise BadInput("recipe.conflict", message)
        *before, last = messages
        spelled = any(self.special.spelled(message.content) for message in messages)
        # A text is its author's own rendering, special tokens and all; prompts and completions
        # are data.
        texts = [self.special.broken(m.content) for m in messages] if before else [last.content]
        trained = bool(last.content.strip())
        bos = "" if texts[0].startswith(self.special.bos) else self.special.bos
        eos = "" if texts[-1].endswith(self.special.eos) else self.special.eos
        end = Piece(texts[-1] + eos, trained)
        if not before:
            return Rendered((Piece(bos + end.text, trained),), None, "", spelled)
        start = Piece(bos + texts[0], trained and self._train_on == "all")
        return Rendered((start, end), 1, last.content, spelled)

    def _chat(self, messages: Sequence[Message], template: ConfinedTemplate) -> Rendered:
        if self._system is not None and all(message.role != "system" for message in messages):
            messages = (Message("system", self._system), *messages)
        answers = [k for k, message in enumerate(messages) if message.role == "assistant"]
        last = answers[-1]
        learned = {k for k in answers if messages[k].trained and messages[k].content.strip()}
        everything = self._train_on == "all"
        turns = [
            {"role": message.role, "content": self.special.broken(message.content)}
            for message in (messages if everything else messages[: last + 1])
        ]
        whole = _rendered(template, turns, generation=False)
        pieces: list[Piece] = []
        at = 0
        for k in answers if self._train_on == "completions" else [last]:
            # An answer that nothing comes before has no prompt to answer.
            if k > 0 and (k in learned or k == last):
                start = len(self._prefix(turns[:k], whole, template, generation=True))
                through = self._prefix(turns[: k + 1], whole, template) if k < last else whole
                end = start + self.special.turn_end(whole[start : len(through)])
                pieces.append(Piece(whole[at:start], everything))
                pieces.append(Piece(whole[start:end], everything or k in learned))
                at = end
        answer = len(pieces) - 1 if pieces else None
        pieces.append(Piece(whole[at:], everything and not pieces))
        return Rendered(tuple(pieces), answer, messages[last].content, BREAK in whole)

    def _prefix(
        self,
        turns: Sequence[Mapping[str, str]],
        whole: str,
        template: ConfinedTemplate,
        *,
        generation: bool = False,
    ) -> str:
        """Render some first turns, which must begin what all turns render to."""
        text = _rendered(template, turns, generation=generation)
        if whole.startswith(text):
            return text
        ids, all_ids = (self._tokenizer.encode(t, add_special_tokens=False) for t in (text, whole))
        shared = zip(ids, all_ids, strict=False)
        at = next((k for k, (a, b) in enumerate(shared) if a != b), min(len(ids), len(all_ids)))
        found, expected = (self._token(some, at) for some in (ids, all_ids))
        raise BadInput(
            "template.inconsistent",
            f"the chat template renders the first {len(turns)} turns in another way when the rest "
            f"follows: token {at} is {found} without and {expected} with it, so the answer's place "
            "is not known",
            help="set data.train_on: last, or data.chat_template to one that keeps earlier turns",
        )

    def _token(self, ids: list[int], at: int) -> str:
        token = "".join(self._tokenizer.decode(ids[at : at + 1]))
        return f"'{printable(token)}'" if at < len(ids) else "none"


def _rendered(
    template: ConfinedTemplate, turns: Sequence[Mapping[str, str]], *, generation: bool
) -> str:
    text = template.render(turns, generation=generation)
    if _SURROGATE.search(text):
        message = "the chat template makes half of a surrogate pair, which is no text"
        raise BadInput("data.template-refused", message)
    return text


def _source(chosen: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str | None:
    if chosen == "auto":
        own: Any = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        if own is not None and not isinstance(own, str):
            message = f"chat_template is no text: found {printable(repr(own))}"
            where = str(tokenizer.name_or_path)
            help = "put it right in tokenizer_config.json, or set data.chat_template"
            raise BadInput("template.syntax", message, where=where, help=help)
        return own
    if chosen == "none":
        return None
    if chosen in TEMPLATES:
        return TEMPLATES[chosen]
    if chosen.endswith(".jinja"):
        return _read(given(chosen, folder))
    names = ("auto", "none", *TEMPLATES)
    near = get_close_matches(chosen, names, n=1)
    raise BadInput(
        "recipe.bad-choice",
        f"data.chat_template: no template has the name '{printable(chosen)}'; "
        f"expected {one_of((*names, 'a .jinja file'))}",
        help=f"did you mean '{near[0]}'?" if near else None,
    )


def _read(path: Path) -> str:
    with open_regular(path, "data") as file, storage_errors(path):
        content = file.read(4 * MAX_SOURCE + 1)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        message = f"not UTF-8: byte offset {error.start}"
        raise BadInput("data.encoding", message, where=str(path)) from None


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the tokenizer by itself puts the beginning-of-text token first."""
    with refusals(str(tokenizer.name_or_path)):
        first, bare = (tokenizer.encode("a", add_special_tokens=flag)[:1] for flag in (True, False))
    return bool(first != bare and first == [tokenizer.bos_token_id])
