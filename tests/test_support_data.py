"""The packaged data set is what its generator writes, and its test split is really unseen."""

import json
from collections import Counter
from pathlib import Path

import pytest

from lorakit.recipe import reader, schema
from scripts import make_support_data as support

VALUES = {
    "category": {"billing", "delivery", "defect", "account", "question"},
    "urgency": {"low", "normal", "high"},
    "refund": {True, False},
}


def read(split: str) -> list[tuple[str, dict[str, object]]]:
    """Return message and parsed answer of each row of the file."""
    rows = []
    for line in (support.FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"]
        user, answer = (message["content"] for message in messages)
        rows.append((user, json.loads(answer)))
    return rows


def sentences(wording: support.Wording) -> set[str]:
    """Return everything a split can say, without end marks and capitals."""
    lists = (
        *wording.problems.values(),
        *wording.hurry.values(),
        wording.refund,
        wording.no_refund,
        wording.greetings,
        wording.closings,
    )
    return {sentence.rstrip(".!?").casefold() for each in lists for sentence in each}


def test_files_are_what_the_generator_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert support.main(["--check"]) == 0
    monkeypatch.setattr(support, "FOLDER", tmp_path)
    assert support.main(["--check"]) == 1
    assert support.main([]) == support.main([]) == support.main(["--check"]) == 0


@pytest.mark.parametrize("split", support.ROWS)
def test_answers_can_be_read_off_the_message(split: str) -> None:
    rows = read(split)
    assert len({message for message, _ in rows}) == len(rows) == support.ROWS[split]
    for message, answer in rows:
        assert list(answer) == ["category", "urgency", "product", "refund"]
        assert answer["product"] in message
        assert all(answer[key] in values for key, values in VALUES.items())
    for key, values in VALUES.items():
        share = Counter(answer[key] for _, answer in rows)
        assert all(share[value] >= len(rows) / 10 for value in values)


@pytest.mark.parametrize("name", ["quickstart", "llama7b-qv"])
def test_the_system_message_names_every_key_and_value(name: str) -> None:
    system = reader.read(name, schema.settings_for, environ={}).data.system
    for key, values in VALUES.items():
        named = system.split(f"{key} (")[1].split(")")[0].split(", ")
        assert set(named) == {str(value).lower() for value in values}
    assert "product" in system


def test_test_rows_say_nothing_that_train_rows_say() -> None:
    train = read("train")
    makers = set(support.TRAIN.makers)
    seen = sentences(support.TRAIN)
    assert not makers & set(support.TEST.makers)
    assert not set(support.TRAIN.things) & set(support.TEST.things)
    assert not {answer["product"] for _, answer in train} & {a["product"] for _, a in read("test")}
    for message, answer in read("test"):
        text = message.replace(str(answer["product"]), "{}").casefold()
        assert not makers & set(message.split())
        assert not [sentence for sentence in seen if sentence in text and len(sentence) > 3]
