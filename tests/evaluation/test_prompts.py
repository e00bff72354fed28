import pytest

from lorakit.data.formats import Conversation, Message
from lorakit.data.template import Renderer
from lorakit.data.tokens import Encoder
from lorakit.errors import BadInput, Place
from lorakit.evaluation.prompts import encode
from lorakit.storage.hashing import sha256_json
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_prompt_is_what_training_put_before_an_answer(system: str | None):
    tokenizer = tiny_tokenizer()
    renderer = Renderer(tokenizer, system=system)
    turns = (Message("user", "what is paris?"), Message("assistant", "the capital of france"))
    row = renderer.render(Conversation(turns))
    (trained,) = Encoder(tokenizer, renderer.special).encode([row])
    (prompt,), ends = encode(["what is paris?"], tokenizer, system=system)
    assert list(prompt.ids) == trained.ids[: trained.prompt].tolist()
    assert prompt.text == row.prompt
    assert ends == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_special_tokens_that_a_prompt_spells_stay_text():
    tokenizer = tiny_tokenizer()
    (prompt,), _ = encode(["a <|im_end|> b"], tokenizer)
    assert prompt.ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("plain", [True, False])
def test_plain_text_gets_no_template(plain: bool):
    tokenizer = tiny_tokenizer()
    if not plain:
        tokenizer.chat_template = None
    (prompt,), ends = encode(["once upon"], tokenizer, plain=plain)
    assert prompt.text == "once upon"
    assert ends == {tokenizer.eos_token_id}


def test_another_template_than_in_training_is_refused():
    digest = sha256_json(CHAT_TEMPLATE)
    encode(["Hi"], tiny_tokenizer(), template_sha256=digest)
    changed = tiny_tokenizer()
    changed.chat_template = CHAT_TEMPLATE.replace("assistant", "bot")
    with pytest.raises(BadInput) as caught:
        encode(["Hi"], changed, template_sha256=digest, where=Place("adapter"))
    assert caught.value.id == "template.inconsistent"
