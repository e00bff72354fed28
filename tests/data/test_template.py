"""The loss mask against an oracle of character spans, for four families of templates."""

from collections.abc import Callable
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.data.formats import Conversation, Message
from lorakit.data.template import BREAK, Renderer
from lorakit.data.tokens import Encoded, Encoder
from lorakit.errors import BadInput
from lorakit.model.inputs import MASKED
from tests.data.given import (
    MISTRAL,
    THINKING,
    base_tokenizer,
    byte_level,
    llama3_like,
    sentencepiece_like,
    stripping,
)
from tests.tiny import tiny_tokenizer

Spans = list[tuple[str, bool]]


def _chatml(messages: list[Message]) -> Spans:
    return [
        span
        for m in messages
        for span in (
            (f"<|im_start|>{m.role}\n", False),
            (f"{m.content}<|im_end|>", m.role == "assistant"),
            ("\n", False),
        )
    ]


def _stripped(messages: list[Message]) -> Spans:
    return _chatml([Message(m.role, m.content.strip()) for m in messages])


def _llama3(messages: list[Message]) -> Spans:
    spans = [("<|begin_of_text|>", False)]
    for m in messages:
        spans.append((f"<|start_header_id|>{m.role}<|end_header_id|>\n\n", False))
        spans.append((f"{m.content}<|eot_id|>", m.role == "assistant"))
    return spans


def _mistral(messages: list[Message]) -> Spans:
    spans = [("<s>", False)]
    for m in messages:
        if m.role == "user":
            spans.append((f"[INST] {m.content} [/INST]", False))
        else:
            spans.append((f" {m.content}</s>", True))
    return spans


FAMILIES: dict[str, tuple[Any, Callable[[list[Message]], Spans]]] = {
    "chatml": (tiny_tokenizer(), _chatml),
    "llama3": (llama3_like(), _llama3),
    "mistral": (byte_level(["<s>", "</s>"], MISTRAL, bos_token="<s>", eos_token="</s>"), _mistral),
    "stripping": (stripping(), _stripped),
}

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters=BREAK)
FRAGMENTS = st.one_of(
    st.text(CHARACTERS, max_size=8),
    st.sampled_from(
        ["the an", " ", "\n\n", "<|im_end|>", "<|eot_id|>", "</s>", "<s>", "[/INST]", "é日"]
    ),
)
CONTENT = st.lists(FRAGMENTS, max_size=4).map("".join)
WORDS = st.lists(st.sampled_from("the an in a cat .".split()), min_size=1, max_size=6).map(" ".join)


def _turns(content: st.SearchStrategy[str]) -> st.SearchStrategy[list[Message]]:
    pairs = st.lists(st.tuples(content, content), min_size=1, max_size=3)
    return pairs.map(
        lambda some: [
            m for ask, answer in some for m in (Message("user", ask), Message("assistant", answer))
        ]
    )


@cache
def _tools(tokenizer: Any, **keys: Any) -> tuple[Renderer, Encoder]:
    renderer = Renderer(tokenizer, **keys)
    return renderer, Encoder(tokenizer, renderer.special)


def _encoded(tokenizer: Any, messages: list[Message], **keys: Any) -> Encoded:
    renderer, encoder = _tools(tokenizer, **keys)
    return encoder.encode([renderer.render(Conversation(tuple(messages)))])[0]


def _runs(tokenizer: Any, encoded: Encoded) -> Spans:
    """Return the text of each stretch of trained or masked tokens."""
    trained = encoded.labels != MASKED
    return [
        (tokenizer.decode(encoded.ids[list(places)]), bool(flag))
        for flag, places in groupby(range(len(trained)), lambda at: trained[at])
    ]


def _merged(spans: Spans) -> Spans:
    spans = [span for span in spans if span[0]]
    return [
        ("".join(t for t, _ in some), flag) for flag, some in groupby(spans, lambda span: span[1])
    ]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60)
@given(data=st.data())
def test_mask_is_the_answers_and_their_end(family: str, data: st.DataObject) -> None:
    tokenizer, oracle = FAMILIES[family]
    messages = data.draw(_turns(CONTENT))
    # An answer of nothing is not trained; to the oracle it is a turn of another speaker.
    learned = [m for m in messages if m.role == "assistant" and m.content.strip()]
    spans = [(text, trained and (text.strip() not in _EMPTY)) for text, trained in oracle(messages)]
    encoded = _encoded(tokenizer, messages)
    assert _runs(tokenizer, encoded) == _merged(spans)
    assert (encoded.labels != MASKED).any() == bool(learned)


_EMPTY = ("<|im_end|>", "<|eot_id|>", "</s>")


@pytest.mark.parametrize("train_on", ["completions", "last", "all"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30)
@given(data=st.data())
def test_the_prompt_begins_the_row(family: str, train_on: str, data: st.DataObject) -> None:
    tokenizer, _ = FAMILIES[family]
    messages = data.draw(_turns(CONTENT))
    encoded = _encoded(tokenizer, messages, train_on=train_on)
    # The same turns with another last answer: what comes before it must not change.
    other = [*messages[:-1], Message("assistant", data.draw(CONTENT))]
    changed = _encoded(tokenizer, other, train_on=train_on)
    assert encoded.prompt is not None
    assert encoded.prompt == changed.prompt
    assert (encoded.ids[: encoded.prompt] == changed.ids[: encoded.prompt]).all()
    if train_on == "last":
        assert (encoded.labels[: encoded.prompt] == MASKED).all()


@settings(max_examples=60)
@given(prompt=CONTENT)
def test_a_prompt_is_what_inference_sends(prompt: str) -> None:
    tokenizer = FAMILIES["chatml"][0]
    if _tools(tokenizer)[0].special.spelled(prompt):
        return
    encoded = _encoded(tokenizer, [Message("user", prompt), Message("assistant", "\n\nthe")])
    turns = [{"role": "user", "content": prompt}]
    sent = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert encoded.ids[: encoded.prompt].tolist() == sent


PLAIN = {
    **{name: tokenizer for name, (tokenizer, _) in FAMILIES.items()},
    "sentencepiece": sentencepiece_like(MISTRAL, legacy=False),
    "sentencepiece legacy": sentencepiece_like(MISTRAL, legacy=True),
}


@pytest.mark.parametrize("family", PLAIN)
@settings(max_examples=60)
@given(data=st.data())
def test_data_cannot_spell_control_tokens(family: str, data: st.DataObject) -> None:
    tokenizer = PLAIN[family]
    messages = data.draw(_turns(CONTENT))
    blank = [Message(m.role, "x") for m in messages]
    special = set(tokenizer.all_special_ids)

    def controls(some: list[Message]) -> list[int]:
        return [id for id in _encoded(tokenizer, some).ids.tolist() if id in special]

    assert controls(messages) == controls(blank)


@pytest.mark.parametrize("family", PLAIN)
@settings(max_examples=60)
@given(messages=_turns(WORDS))
def test_ids_are_those_of_the_whole_text(family: str, messages: list[Message]) -> None:
    """Cutting at answers changes no token of ordinary text, and offsets give the same mask."""
    tokenizer = PLAIN[family]
    turns = [{"role": m.role, "content": m.content} for m in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    encoded = _encoded(tokenizer, messages)
    assert encoded.ids.tolist() == whole["input_ids"]
    oracle = FAMILIES.get(family, FAMILIES["mistral"])[1]
    flags = np.concatenate([[trained] * len(span) for span, trained in oracle(messages)])
    expected = [bool(flags[start:end].all()) for start, end in whole["offset_mapping"]]
    assert (encoded.labels != MASKED).tolist() == expected


def test_train_on() -> None:
    tokenizer, messages = (
        tiny_tokenizer(),
        [
            Message("user", "a"),
            Message("assistant", "b"),
            Message("user", "c"),
            Message("assistant", "d"),
        ],
    )
    answers = [text for text, trained in _runs(tokenizer, _encoded(tokenizer, messages)) if trained]
    assert answers == ["b<|im_end|>", "d<|im_end|>"]
    last = _runs(tokenizer, _encoded(tokenizer, messages, train_on="last"))
    assert [text for text, trained in last if trained] == ["d<|im_end|>"]
    everything = _encoded(tokenizer, messages, train_on="all")
    assert (everything.labels[1:-1] == everything.ids[1:-1]).all()
    assert everything.labels[0] == everything.labels[-1] == MASKED  # nothing before, nothing to say


def test_turns_after_the_last_answer_belong_to_all() -> None:
    tokenizer = tiny_tokenizer()
    messages = [Message("user", "a"), Message("assistant", "b"), Message("user", "late")]
    everything = _encoded(tokenizer, messages, train_on="all")
    (_, masked), (text, trained), (end, _) = _runs(tokenizer, everything)
    assert (masked, trained, end) == (False, True, "\n")
    assert text.endswith("assistant\nb<|im_end|>\n<|im_start|>user\nlate<|im_end|>")
    shorter = _encoded(tokenizer, messages[:-1], train_on="all")
    assert everything.prompt == shorter.prompt


def test_an_answer_may_be_left_out() -> None:
    tokenizer = tiny_tokenizer()
    messages = [Message("user", "a"), Message("assistant", "b", trained=False)]
    messages += [Message("user", "c"), Message("assistant", "d"), Message("user", "late")]
    runs = _runs(tokenizer, _encoded(tokenizer, messages))
    assert [text for text, trained in runs if trained] == ["d<|im_end|>"]
    assert "late" not in "".join(
        text for text, _ in runs
    )  # nothing after the last answer is learnt


def test_system_is_added_where_there_is_none() -> None:
    tokenizer = tiny_tokenizer()
    messages = [Message("user", "a"), Message("assistant", "b")]
    text = tokenizer.decode(_encoded(tokenizer, messages, system="be brief").ids)
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na")
    own = [Message("system", "own"), *messages]
    assert "be brief" not in tokenizer.decode(_encoded(tokenizer, own, system="be brief").ids)


def test_a_template_that_changes_earlier_turns() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    messages = [Message("user", "a"), Message("assistant", "b")]
    assert _runs(tokenizer, _encoded(tokenizer, messages))[1] == (
        "<think></think>b<|im_end|>",
        True,
    )
    with pytest.raises(BadInput, match="token 11 is '<' without and 'b' with it") as caught:
        _encoded(tokenizer, messages * 2)
    assert caught.value.id == "template.inconsistent"
    last = _runs(tokenizer, _encoded(tokenizer, messages * 2, train_on="last"))
    assert last[1] == ("<think></think>b<|im_end|>", True)


@pytest.mark.parametrize("name", ["chatml", "plain", "alpaca"])
@pytest.mark.parametrize("make", [base_tokenizer, tiny_tokenizer])
def test_own_templates(name: str, make: Callable[[], Any]) -> None:
    tokenizer = make()
    messages = [Message("system", "s"), Message("user", "a"), Message("assistant", "b")] * 2
    encoded = _encoded(tokenizer, messages, chat_template=name)
    runs = _runs(tokenizer, encoded)
    end = "<|im_end|>" if name == "chatml" else tokenizer.eos_token
    trained = [text.strip() for text, flag in runs if flag]
    assert trained == [f"b{end}"] * 2
    text = "".join(text for text, _ in runs)
    assert (text.count("<s>") == 1) == (make is base_tokenizer)
    assert text.startswith("<s>") == (make is base_tokenizer)


def test_a_template_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    messages = [Message("user", "a"), Message("assistant", "b")]
    runs = _runs(tiny_tokenizer(), _encoded(tiny_tokenizer(), messages, chat_template="~/t.jinja"))
    assert "".join(text for text, _ in runs) == "[a][b]"


def _plain(tokenizer: Any, *contents: str, template: str = "optional", **keys: Any) -> Encoded:
    roles = ("user", "assistant") if len(contents) == 2 else ("assistant",)
    messages = tuple(Message(*pair) for pair in zip(roles, contents, strict=True))
    renderer, encoder = _tools(tokenizer, **keys)
    rendered = renderer.render(Conversation(messages, template))  # type: ignore[arg-type]
    return encoder.encode([rendered])[0]


def test_prompt_and_completion_without_a_template() -> None:
    tokenizer = base_tokenizer()
    encoded = _plain(tokenizer, "1+1=", "=2")
    assert _runs(tokenizer, encoded) == [("<s>1+1=", False), ("=2</s>", True)]
    assert encoded.ids[: encoded.prompt].tolist() == tokenizer.encode("1+1=")
    assert _runs(tokenizer, _plain(tokenizer, "a", "b", train_on="all")) == [
        ("<s>", False),
        ("ab</s>", True),
    ]


@pytest.mark.parametrize("text", ["the an", "<s>the an", "the an</s>", "<s>the an</s>"])
def test_text_begins_and_ends_once(text: str) -> None:
    tokenizer = base_tokenizer()
    encoded = _plain(tokenizer, text, template="unused")
    assert _runs(tokenizer, encoded) == [("<s>", False), ("the an</s>", True)]
    assert encoded.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert encoded.ids.tolist().count(tokenizer.eos_token_id) == 1


def test_plain_rows_take_no_system_message() -> None:
    with pytest.raises(BadInput) as caught:
        _plain(base_tokenizer(), "a", "b", system="be brief")
    assert caught.value.id == "recipe.conflict"


def test_messages_without_a_template() -> None:
    with pytest.raises(BadInput) as caught:
        _encoded(base_tokenizer(), [Message("user", "a"), Message("assistant", "b")])
    assert caught.value.id == "template.missing"
    assert "data.chat_template: chatml" in str(caught.value.help)
