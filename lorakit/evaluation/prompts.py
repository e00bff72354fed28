"""Prompts as training would have put them: the same renderer, the same tokenisation."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lorakit.data.formats import Conversation, Message
from lorakit.data.template import Renderer
from lorakit.data.tokens import Encoder, Prompt
from lorakit.errors import BadInput, Place
from lorakit.storage.hashing import sha256_json

# Stands where the answer will: what a template puts before and after an answer shows around it.
ANSWER = "."


def encode(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    plain: bool = False,
    system: str | None = None,
    template_sha256: str | None = None,
    where: Place | None = None,
) -> tuple[list[Prompt], frozenset[int]]:
    """Return texts as prompts, and the ids that end an answer to them.

    Args:
        texts: what a user says.
        tokenizer: the adapter's own, whose chat template is used where it has one.
        plain: leave the template out: the model was trained on plain text.
        system: a system message before each of them.
        template_sha256: what the template in training was.
        where: the adapter, for errors.

    Raises:
        BadInput: `template.inconsistent` when the template is not that of the training, or what the
            template says against a text.
    """
    renderer = Renderer(tokenizer, system=system)
    source = renderer.template.source if renderer.template else None
    if template_sha256 not in (None, sha256_json(source)):
        raise BadInput(
            "template.inconsistent",
            "the chat template beside the adapter is not the one it was trained with",
            where=where,
            help="put chat_template.jinja of the training back",
        )
    rows = [
        renderer.render(
            Conversation(
                (Message("user", text), Message("assistant", ANSWER)),
                "unused" if plain else "optional",
            )
        )
        for text in texts
    ]
    found = Encoder(tokenizer, renderer.special).encode(rows)
    prompts = [
        Prompt(tuple(one.ids[: one.prompt].tolist()), row.prompt, "", Place("prompt", number))
        for number, (row, one) in enumerate(zip(rows, found, strict=True), 1)
    ]
    answers = {row.pieces[row.answer].text for row in rows if row.answer is not None}
    ends = filter(None, map(renderer.special.at_end, answers))
    ids = [tokenizer.convert_tokens_to_ids(name) for name in ends]
    return prompts, frozenset(id for id in ids if isinstance(id, int))
