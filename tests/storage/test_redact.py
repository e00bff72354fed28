import doctest
import json
from urllib.parse import quote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lorakit.storage import redact as module
from lorakit.storage.redact import HIDDEN, is_secret, printable, redact


@given(st.text(min_size=6, max_size=40), st.text(), st.text())
def test_the_value_of_a_secret_variable_never_stays(secret: str, before: str, after: str) -> None:
    assume(len(secret.strip()) >= 6)
    environment = {"MY_API_KEY": secret, "PATH": "/usr/bin"}
    forms = {secret, secret.strip(), json.dumps(secret)[1:-1], quote(secret, errors="replace")}
    for form in forms:
        shown = redact(before + form + after, environment)
        hidden = shown.replace(HIDDEN, "\0")
        assert all(other not in hidden for other in forms if other not in before + after + "\0")


@given(st.text())
def test_without_secrets_text_stays(text: str) -> None:
    assume("://" not in text)
    assert redact(text, {"HOME": "/home/ada", "TOKEN": "1", "KEYBOARD": "us"}) == text


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 8,
        "sk-proj-" + "Zz9_-" * 5,
        "ghp_" + "a1" * 18,
        "github_pat_" + "a1" * 18,
        "AKIA" + "ABCDEFGH12345678",
    ],
)
def test_tokens_are_known_by_their_form(secret: str) -> None:
    for text in (secret, f"x={secret}", f'"{secret}"', f"({secret})."):
        assert secret not in redact(text, {})
        assert HIDDEN in redact(text, {})


def test_headers_and_addresses_keep_all_but_the_secret() -> None:
    assert (
        redact("Authorization: Bearer abc.def-123, then", {})
        == f"Authorization: Bearer {HIDDEN}, then"
    )
    assert redact("from https://ada:pw@host/x?y=1", {}) == f"from https://{HIDDEN}@host/x?y=1"
    assert redact("https://host/a@b", {}) == "https://host/a@b"


def test_harmless_words_stay() -> None:
    for text in ("task-specific-fine-tuning-recipes", "risk-free-and-more-than-that", "hf_short"):
        assert redact(text, {}) == text


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "wandb_api_key", "DB_PASSWORD", "AWS_SECRET", "X_CREDENTIALS"]
)
def test_secret_names(name: str) -> None:
    assert is_secret(name)
    assert not is_secret("HOME")


@given(st.text(st.characters(codec=None)), st.integers(1, 100))
def test_shown_text_cannot_move_the_cursor(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
    shown.encode()
    if text.isprintable() and len(text) <= limit:
        assert shown == text


def test_bidirectional_marks_become_code_points() -> None:
    for mark in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2069\u200f":
        assert printable(f"a{mark}b") == f"a\\u{ord(mark):04x}b"


def test_a_long_text_is_not_escaped_whole() -> None:
    assert len(printable("\x1b" * 10_000_000)) == 80


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0
