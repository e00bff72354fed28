"""Everything that happens to data before the first batch: kept, dropped, cut, split, counted."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.formats import Conversation, Message
from lorakit.data.items import Item, split
from lorakit.data.prepare import Dataset
from lorakit.errors import BadInput, Place
from lorakit.model.inputs import MASKED
from lorakit.recipe.sections import Source
from tests.data.given import (
    THINKING,
    ask,
    base_tokenizer,
    prepared,
    rows_file,
    section,
    sentencepiece_like,
)
from tests.tiny import tiny_tokenizer

SHORT = [ask(f"{k}?", f"{k}.") for k in range(20)]
LONG = ask("what? " * 20, "the answer")


def _ids(found: Dataset) -> list[str]:
    return [notice.id for notice in found.notices]


def test_clean_data_says_nothing(tmp_path: Path) -> None:
    found = prepared(section(rows_file(tmp_path, SHORT)))
    assert not found.notices
    assert found.stop_ids == {2}
    assert found.weights == (1.0,) * 20
    assert not found.eval
    counts = found.report.train
    assert counts is not None
    assert counts.rows == counts.read == counts.ends_in_stop == 20
    assert counts.tokens == sum(len(example.ids) for example in found.train)
    assert counts.trained == sum((example.labels != MASKED).sum() for example in found.train)
    assert counts.longest == max(len(example.ids) for example in found.train)


def test_the_formats_that_were_found_are_counted(tmp_path: Path) -> None:
    """Rows that are dropped count too: they were read."""
    chat = rows_file(tmp_path, [*SHORT, LONG], "chat.jsonl")
    text = rows_file(tmp_path, [{"text": "once upon a time"}] * 3, "text.jsonl")
    data = section(chat, max_length=50, eval=str(text))
    both = [Source(path=str(chat)), Source(path=str(text))]
    found = prepared(data.model_copy(update={"train": tuple(both)})).report
    assert found.train is not None
    assert found.train.formats == {"prompt_completion": 21, "text": 3}
    assert found.eval is not None
    assert found.eval.formats == {"text": 3}
    assert found.facts()["train"]["formats"] == found.train.formats


ROW = json.dumps(ask("2 + 2?", "4")).encode()
WRITTEN = {
    "a BOM": b"\xef\xbb\xbf" + ROW + b"\n" + ROW + b"\n",
    "CRLF": ROW + b"\r\n" + ROW + b"\r\n",
    "no last line end": ROW + b"\n" + ROW,
    "a blank line at the end": ROW + b"\n" + ROW + b"\n\n",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_rows_are_the_same_however_their_lines_are_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(WRITTEN[name])
    found = prepared(section(path))
    assert [example.place.line for example in found.train] == [1, 2]
    texts = [tiny_tokenizer().decode(example.ids) for example in found.train]
    assert texts == ["<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"] * 2


def test_long_rows_are_dropped_and_named(tmp_path: Path) -> None:
    rows = [*SHORT[:5], LONG, *SHORT[5:]]
    found = prepared(section(rows_file(tmp_path, rows), max_length=50))
    assert len(found.train) == 20
    (notice,) = found.notices
    assert notice.id == "data.dropped"
    assert "1 of 21 rows" in notice.message
    assert "rows.jsonl:6" in notice.message
    assert "over max_length 50: dropped" in notice.message
    assert found.report.train is not None
    assert found.report.train.dropped == {"over max_length": 1}
    assert found.report.train.longest > 50


def test_many_long_rows_need_a_word_in_the_recipe(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [*SHORT, LONG, LONG, LONG])
    with pytest.raises(BadInput, match="3 of 23 rows") as caught:
        prepared(section(path, max_length=50))
    assert caught.value.id == "data.too-long"
    assert len(prepared(section(path, max_length=50, too_long="drop")).train) == 20
    with pytest.raises(BadInput, match="3 of 23"):
        prepared(section(path, max_length=50, too_long="error"))


def test_cut_rows_keep_what_fits(tmp_path: Path) -> None:
    row = ask("?", "the answer " * 20)
    data = section(rows_file(tmp_path, [*SHORT, row]), max_length=60, too_long="truncate")
    found = prepared(data)
    whole = prepared(section(tmp_path / "rows.jsonl")).train[-1]
    cut = found.train[-1]
    assert cut.cut
    assert cut.ids.tolist() == whole.ids[:60].tolist()
    assert _ids(found) == ["data.cut"]
    assert found.report.train is not None
    assert found.report.train.cut == 1


def test_a_prompt_whose_answer_was_cut_away_is_not_answered(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    later = [{"role": "user", "content": "what? " * 20}, turns[1]]
    path = rows_file(tmp_path, [{"messages": turns}, {"messages": [*turns, *later]}])
    data = section(path, eval=str(path), max_length=60, too_long="truncate")
    found = prepared(data)
    assert len(found.eval) == 2
    assert [prompt.place.line for prompt in found.eval_prompts] == [1]
    (notice,) = [notice for notice in found.notices if notice.id == "data.unanswered"]
    assert "1 of 2 rows of eval: no room for the last answer in max_length 60" in notice.message
    assert str(notice.where) == f"{path}:2"


def test_nothing_left_after_the_cut_names_the_length(tmp_path: Path) -> None:
    data = section(rows_file(tmp_path, [LONG] * 4), max_length=16, too_long="truncate")
    with pytest.raises(BadInput) as caught:
        prepared(data)
    assert caught.value.id == "data.no-trained-tokens"
    prompt = prepared(section(tmp_path / "rows.jsonl"), only="train").report.train
    assert prompt is not None
    assert "4 rows" in caught.value.message
    assert "length" in caught.value.message
    assert "of max_length 16" in caught.value.message


def test_empty_answers_among_good_ones(tmp_path: Path) -> None:
    rows = [*SHORT, *(ask("?", blank) for blank in ("", " ", "\n", ""))]
    found = prepared(section(rows_file(tmp_path, rows)))
    (notice,) = found.notices
    assert notice.id == "data.dropped"
    assert "4 of 24 rows" in notice.message
    assert notice.message.count("rows.jsonl:") == 3


def test_context(tmp_path: Path) -> None:
    path = rows_file(tmp_path, SHORT)
    assert prepared(section(path), context=64).max_length == 64
    assert prepared(section(path, max_length=64), context=64).max_length == 64
    with pytest.raises(BadInput, match="max_length 65 > the 64 positions") as caught:
        prepared(section(path, max_length=65), context=64)
    assert caught.value.id == "model.context-too-short"


def test_rows_whose_mask_is_hidden_by_the_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = rows_file(tmp_path, [{"messages": turns}, {"messages": turns * 2}])
    found = prepared(section(path), tokenizer=tokenizer)
    assert len(found.train) == 1
    assert _ids(found) == ["data.dropped"]
    rows_file(tmp_path, [{"messages": turns * 2}] * 3)
    with pytest.raises(BadInput, match="2 more rows") as caught:
        prepared(section(path), tokenizer=tokenizer)
    assert caught.value.id == "template.inconsistent"
    assert str(caught.value.where) == f"{path}:1"


def test_an_answer_that_does_not_end(tmp_path: Path) -> None:
    tokenizer = base_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    found = prepared(section(rows_file(tmp_path, SHORT)), tokenizer=tokenizer)
    (notice,) = found.notices
    assert notice.id == "data.eos-untrained"
    assert "0 of 20 rows" in notice.message


def test_turns_after_the_last_answer_are_counted(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = rows_file(tmp_path, [{"messages": turns}, {"messages": [*turns, turns[0]]}])
    (notice,) = prepared(section(path)).notices
    assert notice.id == "data.trailing-turns"
    assert "1 of 2 rows of train: turns after the last answer: left out" in notice.message
    assert str(notice.where) == f"{path}:2"
    assert not prepared(section(path, train_on="all")).notices


def test_special_tokens_in_the_data_are_counted(tmp_path: Path) -> None:
    rows = [*SHORT, ask("say <|im_end|> now", "no")]
    found = prepared(section(rows_file(tmp_path, rows)))
    assert _ids(found) == ["data.special-tokens"]
    assert found.train[-1].ids.tolist().count(2) == 2
    text = tiny_tokenizer().decode(found.train[-1].ids)
    assert "say <|im_end|> now" in text


def test_pad_id_has_no_say(tmp_path: Path) -> None:
    """pad = eos, as in most models, hides no end of turn."""
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    found = prepared(section(rows_file(tmp_path, SHORT)), tokenizer=tokenizer)
    assert all(example.labels[-2] == tokenizer.eos_token_id for example in found.train)


def test_a_tokenizer_that_would_cut_or_pad(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=200)
    found = prepared(section(rows_file(tmp_path, [LONG])), tokenizer=tokenizer)
    expected = prepared(section(rows_file(tmp_path, [LONG])))
    assert found.train[0].ids.tolist() == expected.train[0].ids.tolist()


def test_sources_have_weights_formats_and_columns(tmp_path: Path) -> None:
    rows_file(tmp_path, [{"question": "q", "answer": "a", "id": 1}], "one.jsonl")
    rows_file(tmp_path, [{"instruction": "i", "input": "j", "output": "o"}] * 2, "two.jsonl")
    columns = {"prompt": "question", "completion": "answer"}
    sources = [
        {"path": "one.jsonl", "columns": columns, "weight": 2.0},
        {"path": "two.jsonl", "format": "alpaca", "weight": 0.5},
    ]
    data = section("x").model_copy(update={"train": tuple(map(Source.model_validate, sources))})
    found = prepared(data, tmp_path)
    assert found.weights == (2.0, 0.5, 0.5)
    assert list(found.report.sha256) == ["one.jsonl", "two.jsonl"]
    assert "i\n\nj" in tiny_tokenizer().decode(found.train[1].ids)
    assert _ids(found) == ["data.extra-fields"]


@pytest.mark.parametrize(
    ("columns", "id", "parts"),
    [
        ({"promt": "question"}, "recipe.bad-choice", ("promt", "prompt")),
        ({"prompt": "qestion"}, "data.missing-column", ("qestion", "did you mean 'question'")),
    ],
)
def test_a_wrong_mapping(
    tmp_path: Path, columns: dict[str, str], id: str, parts: tuple[str, ...]
) -> None:
    path = rows_file(tmp_path, [{"question": "q", "completion": "a"}])
    data = section("x").model_copy(update={"train": (Source(path=str(path), columns=columns),)})
    with pytest.raises(BadInput) as caught:
        prepared(data)
    assert caught.value.id == id
    assert all(part in f"{caught.value.message} {caught.value.help}" for part in parts)


@given(n=st.integers(2, 60), share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_the_split_is_a_partition_that_the_seed_decides(n: int, share: float, seed: int) -> None:
    conversation = Conversation((Message("assistant", "x"),))
    items = [Item(conversation, Place("rows.jsonl", k), 1.0, "text") for k in range(n)]
    train, held = split(items, share, seed)
    lines = [item.place.line for item in train], [item.place.line for item in held]
    assert sorted(lines[0] + lines[1]) == list(range(n))
    assert lines == (sorted(lines[0]), sorted(lines[1]))
    assert len(held) == min(n - 1, max(1, round(share * n)))
    assert (train, held) == split(items, share, seed)


def test_a_share_is_held_out(tmp_path: Path) -> None:
    path = rows_file(tmp_path, SHORT)
    found = prepared(section(path, eval=0.25))
    assert (len(found.train), len(found.eval), len(found.eval_prompts)) == (15, 5, 5)
    lines = sorted(example.place.line for example in (*found.train, *found.eval))
    assert lines == list(range(1, 21))
    other = prepared(section(path, eval=0.25), seed=1)
    assert [e.place for e in other.eval] != [e.place for e in found.eval]
    alone = prepared(section(path, eval=0.25), only="eval")
    assert not alone.train
    assert [e.place for e in alone.eval] == [e.place for e in found.eval]


def test_eval_prompts_begin_their_rows(tmp_path: Path) -> None:
    rows_file(tmp_path, SHORT[:10])
    rows_file(
        tmp_path, [*SHORT[8:], {"prompt": "p", "completion": " kept as it is\n"}], "eval.jsonl"
    )
    found = prepared(section("rows.jsonl", eval="eval.jsonl"), tmp_path)
    tokenizer = tiny_tokenizer()
    for example, prompt in zip(found.eval, found.eval_prompts, strict=True):
        assert tuple(example.ids[: len(prompt.ids)].tolist()) == prompt.ids
        assert tokenizer.decode(prompt.ids) == prompt.text
        assert prompt.text.endswith("<|im_start|>assistant\n")
        assert prompt.place == example.place
    assert found.eval_prompts[-1].reference == " kept as it is\n"
    assert found.report.overlap == 2
    assert _ids(found) == ["data.overlap"]


def test_eval_sources_take_the_place_of_the_recipes(tmp_path: Path) -> None:
    rows_file(tmp_path, SHORT, "golden.jsonl")
    sources = (Source(path="golden.jsonl", max_samples=3),)
    data = section("not there.jsonl", eval="nor there.jsonl")
    found = prepared(data, tmp_path, eval_sources=sources, only="eval")
    assert len(found.eval) == 3


def test_text_has_no_prompts(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"text": f"the text {k}"} for k in range(4)])
    found = prepared(section(path, eval=0.5), tokenizer=base_tokenizer())
    assert not found.eval_prompts
    assert all(e.labels[1:].tolist() == e.ids[1:].tolist() for e in (*found.train, *found.eval))
    assert found.report.eval is not None
    assert found.report.eval.ends_in_stop == 2


def test_keys_that_plain_text_has_no_use_for(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"text": f"the text {k}"} for k in range(4)])
    keys = {"train_on": "all", "chat_template": "chatml"}
    found = prepared(section(path, **keys), tokenizer=base_tokenizer())
    assert _ids(found) == ["recipe.no-effect"] * 2
    assert [n.message.split()[0] for n in found.notices] == ["data.chat_template", "data.train_on"]
    turns = rows_file(tmp_path, SHORT, "turns.jsonl")
    assert "recipe.no-effect" not in _ids(prepared(section(turns, **keys)))
    mixed = section(path, **keys, eval=str(turns))
    assert "recipe.no-effect" not in _ids(prepared(mixed))


def test_progress(tmp_path: Path) -> None:
    path = rows_file(tmp_path, SHORT * 60)
    heard: list[int] = []
    prepared(section(path, eval=0.5), advance=heard.append)
    assert sum(heard) == 1200
    assert len(heard) > 2


CODE = """
from lorakit.data.formats import Conversation, Message
def row(row): return {"prompt": row["q"], "completion": row["a"]}
def turns(row): return Conversation((Message("user", row["q"]), Message("assistant", row["a"])))
def wrong(row): return [row["q"], row["a"]]
def fails(row): return row["nothing"]
constant = 3
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_format.py").write_text(CODE)
    rows_file(tmp_path, [{"q": "a", "a": "b"}])
    yield lambda name: prepared(section("rows.jsonl", format=name), tmp_path, allow_local_code=True)
    sys.modules.pop("own_format", None)


@pytest.mark.parametrize("name", ["row", "turns"])
def test_a_format_of_the_users_own(own_code: Any, name: str) -> None:
    before = list(sys.path)
    found = own_code(f"own_format:{name}")
    assert len(found.train) == 1
    (notice,) = found.notices
    assert notice.message.startswith(f"runs code: own_format:{name}")
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("own_format:wrong", "data.format-failed"),
        ("own_format:fails", "data.format-failed"),
        ("own_format:absent", "security.import"),
        ("own_format:constant", "security.import"),
        ("absent_module:row", "security.import"),
        ("../own_format:row", "security.import"),
        ("own_format:row.__class__", "security.import"),
    ],
)
def test_code_that_is_no_format(own_code: Any, name: str, id: str) -> None:
    with pytest.raises(BadInput) as caught:
        own_code(name)
    assert caught.value.id == id


def test_messages_for_a_sentencepiece_base(tmp_path: Path) -> None:
    """The first token of an answer has no mark of a text's start that the whole would not have."""
    tokenizer = sentencepiece_like(None, legacy=True)
    found = prepared(section(rows_file(tmp_path, [ask("the ", "an")])), tokenizer=tokenizer)
    ids = found.train[0].ids.tolist()
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁the", "▁", "an", "</s>"]


def test_labels_that_are_numbers_are_read_by_the_function_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    numbers = rows_file(tmp_path, [ask("good?", "yes"), {"prompt": "bad?", "completion": 0}])
    with pytest.raises(BadInput) as caught:
        prepared(section(numbers))
    assert "data.format: module:function with --allow-local-code" in str(caught.value.help)
    page = Path(__file__).parents[2].joinpath("recipes", "REFERENCE.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "labels.py").write_text(code)
    path = rows_file(tmp_path, [{"review": "bad", "label": 0}, {"review": "good", "label": 1}])
    found = prepared(section(path, format="labels:as_text"), allow_local_code=True)
    sys.modules.pop("labels")
    texts = [tiny_tokenizer().decode(example.ids) for example in found.train]
    assert ["negative" in text for text in texts] == [True, False]
    assert ["positive" in text for text in texts] == [False, True]
