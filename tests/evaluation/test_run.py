"""The whole evaluation on a tiny model: the adapter, and its base in the same process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lorakit import adapters
from lorakit.data.batches import eval_batches
from lorakit.data.tokens import Example, Prompt
from lorakit.errors import BadInput, Place
from lorakit.evaluation.generation import Decoding, generate
from lorakit.evaluation.results import Results
from lorakit.evaluation.run import Task, evaluate
from lorakit.model import base as bases
from lorakit.model.base import Base
from lorakit.model.sites import find_sites
from lorakit.recipe.sections import Eval, Generate
from lorakit.scoring import score
from tests.export.adapters import CPU, find_base, save_adapter
from tests.tiny import tiny_tokenizer, write_tiny_model

METRICS = ("loss", "perplexity", "token_accuracy", "exact_match", "json_valid", "stop_rate")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ("q_proj", "v_proj"), "rank": 4},
    "prefix": {"tokens": 4, "init": "random"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return find_base(write_tiny_model(tmp_path_factory.mktemp("base")))


def adapted(base: Base, folder: Path, method: str = "lora") -> PreTrainedModel:
    saved = save_adapter(base, folder / "adapter", method, size=0.3, **METHODS[method])
    model = bases.load(base, device=CPU, dtype=torch.float32)
    adapters.attach_saved(saved, model, find_sites(model))
    return model


def task(metrics: tuple[str, ...] = METRICS, packing: bool = True) -> Task:
    generator = torch.Generator().manual_seed(4)
    examples, prompts = [], []
    for row, (asked, answered) in enumerate([(5, 4), (12, 2), (3, 9), (7, 7), (9, 1)]):
        place = Place("eval.jsonl", row + 1)
        ids = torch.randint(3, 300, (asked + answered,), generator=generator).numpy()
        labels = np.where(np.arange(len(ids)) < asked, -100, ids)
        examples.append(Example(ids.astype(np.int32), labels.astype(np.int32), place))
        prompts.append(Prompt(tuple(ids[:asked].tolist()), f"prompt {row}", "answer", place))
    section = Eval(metrics=metrics, generate=Generate(max_new_tokens=6))
    return Task(examples, prompts, section, stops=frozenset({17, 250}), packing=packing)


def values(results: Results) -> dict[str, tuple[float, float]]:
    assert results.adapter is not None
    return {
        name: (results.adapter.metrics[name].value, base.value)
        for name, base in results.base.metrics.items()
    }


def test_twice_gives_the_same_bits(base: Base, tmp_path: Path):
    model = adapted(base, tmp_path)
    first = evaluate(model, tiny_tokenizer(), task())
    torch.manual_seed(7)
    again = evaluate(model, tiny_tokenizer(), task())
    assert first.facts({}) == again.facts({})
    assert first.samples() == again.samples()
    assert tuple(first.base.metrics) == METRICS


@pytest.mark.parametrize("method", METHODS)
def test_the_base_is_measured_as_a_model_without_adapter(base: Base, tmp_path: Path, method: str):
    packs = adapters.get(method).packs
    found = evaluate(adapted(base, tmp_path, method), tiny_tokenizer(), task(packing=packs))
    plain = bases.load(base, device=CPU, dtype=torch.float32)
    alone = evaluate(plain, tiny_tokenizer(), task(packing=packs), base_only=True)
    assert alone.adapter is None
    for name, tally in alone.base.metrics.items():
        assert torch.equal(tally.parts, found.base.metrics[name].parts)
    assert [a.tokens for a in alone.base.answers] == [a.tokens for a in found.base.answers]
    assert all(a != b for name, (a, b) in values(found).items() if name in METRICS[:2])


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_generates_as_it_scores(base: Base, tmp_path: Path, method: str):
    """What is generated with the adapter on is what its forward pass without a cache prefers."""
    model = adapted(base, tmp_path, method)
    rows = [list(prompt.ids) for prompt in task().prompts]
    answers = generate(model, tiny_tokenizer(), rows, Decoding(8), stops=frozenset({17}))
    alone = [
        generate(model, tiny_tokenizer(), [r], Decoding(8), stops=frozenset({17})) for r in rows
    ]
    assert answers == [one for (one,) in alone]
    for row, answer in zip(rows, answers, strict=True):
        ids = torch.tensor([[*row, *answer.tokens]])
        with torch.no_grad():
            best = model(input_ids=ids, use_cache=False).logits[0].argmax(-1).tolist()
        assert list(answer.tokens) == best[len(row) - 1 : len(row) - 1 + len(answer.tokens)]


def test_loss_is_the_sum_over_trained_tokens_divided_once(base: Base, tmp_path: Path):
    model, todo = adapted(base, tmp_path), task(("loss", "token_accuracy"))
    found = evaluate(model, tiny_tokenizer(), todo)
    rows = [score(model, eval_batches([example]))[0] for example in todo.examples]
    loss = sum(row.nll for row in rows) / sum(row.tokens for row in rows)
    assert values(found)["loss"][0] == pytest.approx(loss, rel=1e-6)
    assert found.base.answers == []
    assert [row.tokens for row in rows] == [4, 2, 9, 7, 1]


def test_answers_are_marked_by_the_recipe(base: Base, tmp_path: Path):
    model, todo = adapted(base, tmp_path), task(("exact_match", "stop_rate"))
    first = evaluate(model, tiny_tokenizer(), todo)
    assert first.adapter is not None
    asked = [
        Prompt(p.ids, p.text, f"  {a.text} ", p.place)
        for p, a in zip(todo.prompts, first.adapter.answers, strict=True)
    ]
    again = evaluate(model, tiny_tokenizer(), Task(todo.examples, asked, todo.section, todo.stops))
    assert values(again)["exact_match"][0] == 1.0
    stopped = [answer.stopped for answer in first.adapter.answers]
    assert values(first)["stop_rate"][0] == sum(stopped) / 5
    assert first.samples()[0]["scores"] == {"exact_match": False, "stop_rate": stopped[0]}


def test_progress_counts_every_row_of_both_measurements(base: Base, tmp_path: Path):
    done: list[int] = []
    evaluate(adapted(base, tmp_path), tiny_tokenizer(), task(), advance=done.append)
    assert sum(done) == 2 * task().size == 20


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_no_rows_are_an_error(base: Base, metric: str):
    model = bases.load(base, device=CPU, dtype=torch.float32)
    empty = Task([], [], Eval(metrics=(metric,)), frozenset())
    with pytest.raises(BadInput) as caught:
        evaluate(model, tiny_tokenizer(), empty)
    assert caught.value.id == "eval.no-data"
