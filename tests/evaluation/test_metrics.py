import math

import pytest
import torch

from lorakit.evaluation.metrics import (
    Tally,
    bootstrap,
    from_marks,
    from_scores,
    is_json,
    matches,
)
from lorakit.scoring import RowScore

SCORES = [RowScore(0, 2.0, 1, 0), RowScore(1, 3.0, 3, 3), RowScore(2, 1.0, 4, 2)]


def test_a_value_is_a_total_over_a_total_and_not_a_mean_of_means():
    loss = from_scores("loss", SCORES)
    assert loss.value == pytest.approx(6 / 8)
    assert loss.value != pytest.approx((2 / 1 + 3 / 3 + 1 / 4) / 3)
    assert from_scores("perplexity", SCORES).value == pytest.approx(math.exp(6 / 8))
    assert from_scores("token_accuracy", SCORES).value == pytest.approx(5 / 8)
    assert from_marks([True, False, True, True]).value == 0.75


def test_a_perplexity_beyond_floats_is_infinite_and_not_an_error():
    assert from_scores("perplexity", [RowScore(0, 1e6, 1, 0)]).value == math.inf


def test_standard_error_of_equal_weights_is_the_textbook_one():
    marks = [True, False, True, True, False, True]
    sample = torch.tensor(marks, dtype=torch.float64)
    assert from_marks(marks).stderr == pytest.approx(float(sample.std() / math.sqrt(len(marks))))


def test_standard_error_agrees_with_the_bootstrap():
    generator = torch.Generator().manual_seed(1)
    weights = torch.randint(1, 50, (400,), generator=generator).double()
    parts = weights * (1 + torch.rand(400, generator=generator, dtype=torch.float64))
    for exponential in (False, True):
        tally = Tally(parts, weights, exponential)
        assert float(bootstrap(tally.over, 400).std()) == pytest.approx(tally.stderr, rel=0.1)


def test_bootstrap_draws_the_same_rows_every_time():
    tally = from_marks([True, False, False, True])
    assert torch.equal(bootstrap(tally.over, 4), bootstrap(tally.over, 4))


def test_a_paired_difference_of_equal_rows_is_exactly_zero():
    one, two = from_scores("loss", SCORES), from_scores("loss", list(SCORES))
    assert bootstrap(lambda rows: one.over(rows) - two.over(rows), 3).abs().max() == 0


@pytest.mark.parametrize(
    ("output", "reference", "normalize", "equal"),
    [
        (" yes\n", "yes", ["strip"], True),
        ("yes", " yes", [], False),
        ("Straße", "STRASSE", ["casefold"], True),
        ("“Yes”, it  is!", "Yes it is", ["punctuation"], True),
        ("so 3 + 4 = 7.", "#### 7", ["number"], True),
        ("costs $1,234,567.50 in all", "1234567.5", ["number"], True),
        ("it is -5", "5", ["number"], False),
        ("from 9-5", "5", ["number"], True),
        ("007", "7", ["number"], True),
        ("-0", "0.00", ["number"], True),
        ("no answer", "0", ["number"], False),
        ("no answer", "no answer", ["number"], True),
        ('{"a": 1, "b": [1.0]}', '{"b":[1],"a":1}', ["json"], True),
        ('{"a": true}', '{"a": 1}', ["json"], False),
        ('{"a": "1"}', '{"a": 1}', ["json"], False),
        ("[1, 2]", "[2, 1]", ["json"], False),
        ('{"a": 1', '{"a": 1}', ["json"], False),
        (' {"A": 1} ', '{"a":1}', ["casefold", "json"], True),
    ],
)
def test_exact_match_compares_after_the_named_normalisations(output, reference, normalize, equal):
    assert matches(output, reference, normalize) is equal


@pytest.mark.parametrize("text", ["{}", ' {"a": [1, 2.5, null]}\n', '"text"', "-1e5"])
def test_what_is_json(text):
    assert is_json(text)


@pytest.mark.parametrize(
    "text",
    ["", "{", "{'a': 1}", "NaN", '{"a": Infinity}', "{} {}", "```json\n{}\n```", "[" * 100_000],
)
def test_what_is_no_json(text):
    assert not is_json(text)
