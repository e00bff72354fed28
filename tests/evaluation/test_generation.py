from collections.abc import Sequence

import pytest
import torch

from lorakit.errors import BadInput
from lorakit.evaluation import generation
from lorakit.evaluation.generation import Decoding, generate, stop_ids
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

NEW = 12
FREE = frozenset[int]()
END = frozenset({2})


def prompts(count: int = 7, seed: int = 5) -> list[list[int]]:
    """Return rows of different lengths, neither sorted nor starting alike."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [9, 3, 20, 1, 14, 3, 8][:count]
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]


def stops_of(model: torch.nn.Module, rows: Sequence[Sequence[int]]) -> frozenset[int]:
    """Return stop ids that end some of the rows early: tokens that a first look generates."""
    found = generate(model, tiny_tokenizer(), rows, Decoding(NEW), stops=FREE)
    return frozenset(found[row].tokens[2 * row] for row in (1, 2, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_each_row_alone(family: str):
    model, tokenizer, rows = tiny_model(family), tiny_tokenizer(), prompts()
    stops = stops_of(model, rows)
    together = generate(model, tokenizer, rows, Decoding(NEW), stops=stops)
    alone = [generate(model, tokenizer, [row], Decoding(NEW), stops=stops)[0] for row in rows]
    assert together == alone
    assert len({len(answer.tokens) for answer in together}) > 2, (
        "rows should leave at several steps"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_prompts_begin_with_goes_through_the_model_once(
    family: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(generation, "SHARED_TOKENS", 4)
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    rows = [[11, 12, 13, 14, 15, *row] for row in prompts()]
    stops = stops_of(model, rows)
    alone = [generate(model, tokenizer, [row], Decoding(NEW), stops=stops)[0] for row in rows]
    seen: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, given, __: seen.append(tuple(given[0].shape))
    )
    assert generate(model, tokenizer, rows, Decoding(NEW), stops=stops) == alone
    longest = max(map(len, rows))
    if seen[0][0] == 1:
        assert seen[:2] == [(1, 5), (len(rows), longest - 5)]
    else:  # a cache of another kind, or positions that the model counts itself
        assert seen[0] == (len(rows), longest)


def test_a_prompt_that_is_the_beginning_of_the_others_keeps_a_token_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(generation, "SHARED_TOKENS", 4)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    rows = [[11, 12, 13, 14, 15], [11, 12, 13, 14, 15, 16], [11, 12, 13, 14, 15]]
    alone = [generate(model, tokenizer, [row], Decoding(NEW), stops=FREE)[0] for row in rows]
    assert generate(model, tokenizer, rows, Decoding(NEW), stops=FREE) == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_a_forward_pass_without_cache_would_choose(family: str):
    model, rows = tiny_model(family), prompts(3)
    answers = generate(model, tiny_tokenizer(), rows, Decoding(NEW), stops=FREE)
    for row, answer in zip(rows, answers, strict=True):
        ids = torch.tensor([[*row, *answer.tokens]])
        with torch.no_grad():
            best = model(input_ids=ids, use_cache=False).logits[0].argmax(-1).tolist()
        assert list(answer.tokens) == best[len(row) - 1 : -1]


def test_the_stop_token_ends_an_answer_and_is_no_part_of_it():
    model, tokenizer, rows = tiny_model("llama"), tiny_tokenizer(), prompts()
    free = generate(model, tokenizer, rows, Decoding(NEW), stops=FREE)
    stops = stops_of(model, rows)
    for open_ended, answer in zip(
        free, generate(model, tokenizer, rows, Decoding(NEW), stops=stops), strict=True
    ):
        cut = next((k for k, id in enumerate(open_ended.tokens) if id in stops), NEW)
        assert answer.tokens == open_ended.tokens[:cut]
        assert answer.stopped is (cut < NEW)
        assert answer.text == tokenizer.decode(answer.tokens, skip_special_tokens=True)


def test_stops_come_from_tokenizer_and_generation_settings():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.eos_token_id = [7, 9]
    assert stop_ids(model, tokenizer) == {7, 9, tokenizer.eos_token_id}
    model.generation_config.eos_token_id = 7
    assert stop_ids(model, tokenizer) == {7, tokenizer.eos_token_id}


def test_the_order_of_rows_and_the_size_of_batches_change_nothing(monkeypatch: pytest.MonkeyPatch):
    model, tokenizer, rows = tiny_model("llama"), tiny_tokenizer(), prompts()
    expected = generate(model, tokenizer, rows, Decoding(NEW), stops=END)
    assert generate(model, tokenizer, rows[::-1], Decoding(NEW), stops=END) == expected[::-1]
    monkeypatch.setattr(generation, "ROWS", 2)
    done: list[int] = []
    assert (
        generate(model, tokenizer, rows, Decoding(NEW), stops=END, advance=done.append) == expected
    )
    assert done == [2, 2, 2, 1]
    monkeypatch.setattr(generation, "TOKENS", 1)
    assert generate(model, tokenizer, rows, Decoding(NEW), stops=END) == expected


def test_sampling_depends_on_seed_and_row_alone():
    model, tokenizer, rows = tiny_model("llama"), tiny_tokenizer(), prompts()
    hot = Decoding(NEW, temperature=1.5, seed=1)
    first = generate(model, tokenizer, rows, hot, stops=FREE)
    torch.manual_seed(99)
    assert generate(model, tokenizer, rows, hot, stops=FREE) == first
    assert generate(model, tokenizer, rows[:2], hot, stops=FREE) == first[:2]
    other = Decoding(NEW, temperature=1.5, seed=1000)
    assert generate(model, tokenizer, rows, other, stops=FREE) != first
    repeated = generate(model, tokenizer, [rows[0]] * 3, hot, stops=FREE)
    assert len({answer.tokens for answer in repeated}) == 3


def test_sampling_follows_the_probabilities_within_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, -1)
    draws = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    for top_p, expected in ((1.0, [0.5, 0.3, 0.15, 0.05]), (0.7, [0.625, 0.375, 0, 0])):
        chosen = generation._choose(logits, Decoding(temperature=1.0, top_p=top_p), draws)
        shares = torch.bincount(chosen, minlength=4) / 4000
        # Four standard errors of a share of one half over 4,000 draws.
        torch.testing.assert_close(shares, torch.tensor(expected), atol=0.032, rtol=0)
        assert all(share == 0 for share, wanted in zip(shares, expected, strict=True) if not wanted)


def test_a_low_temperature_is_greedy():
    model, tokenizer, rows = tiny_model("llama"), tiny_tokenizer(), prompts()
    cold = generate(model, tokenizer, rows, Decoding(NEW, temperature=1e-4), stops=END)
    assert cold == generate(model, tokenizer, rows, Decoding(NEW), stops=END)


def test_answers_end_where_the_model_has_no_more_positions():
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    long, short = [5] * 250, [5] * 3
    found = generate(model, tokenizer, [short, long], Decoding(NEW), stops=FREE)
    assert [len(answer.tokens) for answer in found] == [NEW, 6]
    with pytest.raises(BadInput, match="256 tokens, the model has 256") as caught:
        generate(model, tokenizer, [[5] * 256], Decoding(NEW), stops=END)
    assert caught.value.id == "model.context-too-short"


def test_positions_that_the_adapter_takes_are_none_for_tokens():
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    (found,) = generate(model, tokenizer, [[5] * 230], Decoding(30), stops=FREE, taken=20)
    assert len(found.tokens) == 6
    with pytest.raises(BadInput, match="240 tokens, the model has 236"):
        generate(model, tokenizer, [[5] * 240], Decoding(NEW), stops=END, taken=20)


def test_nothing_to_answer_gives_nothing():
    assert generate(tiny_model("llama"), tiny_tokenizer(), [], Decoding(), stops=END) == []
