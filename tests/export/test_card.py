from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from lorakit.adapters import Saved
from lorakit.export.card import card, write_card
from tests.export.adapters import find_base, save_adapter
from tests.tiny import tiny_config, write_tiny_model

HOME = "/home/ann/secret"
PASSPORT: dict[str, Any] = {
    "recipe_name": "support",
    "recipe": {
        "model": {"path": f"{HOME}/models/tiny"},
        "data": {
            "train": [{"path": f"{HOME}/train.jsonl"}, {"path": "org/questions"}],
            "system": "Be brief.",
        },
        "train": {"epochs": 2.0, "max_steps": None, "learning_rate": 2e-4},
    },
    "data": {
        "train": {"rows": 400, "tokens": 40_000, "trained": 9_000},
        "eval": None,
        "sha256": {f"{HOME}/train.jsonl": "ab12"},
    },
    "metrics": {"loss": 1.25, "best_eval_loss": None},
    "versions": {"torch": "2.13.0"},
    "trained_tokens": 18_000,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("card")
    base = find_base(write_tiny_model(folder / "tiny"))
    targets = ("q_proj", "v_proj")
    return save_adapter(
        base, folder / "adapter", "lora", rank=6, target_modules=targets, passport=PASSPORT
    )


def front_matter(text: str) -> dict[str, Any]:
    _, block, _ = text.split("---\n", 2)
    return yaml.safe_load(block)


def test_the_front_matter_is_yaml_that_a_hub_reads(saved: Saved):
    found = front_matter(card(saved))
    assert found["library_name"] == "peft"
    assert found["base_model"] == "tiny"
    assert found["base_model_relation"] == "adapter"
    assert found["pipeline_tag"] == "text-generation"
    assert found["datasets"] == ["org/questions"]
    assert {"lora", "lorakit", "transformers"} <= set(found["tags"])
    assert not any(tag.startswith("base_model:") for tag in found["tags"]), "a folder is no hub id"


def test_a_base_of_the_hub_is_named_with_its_commit(saved: Saved):
    base = {"name": "org/model", "revision": "abc123"}
    text = card(replace(saved, passport={**(saved.passport or {}), "base": base}))
    assert front_matter(text)["base_model"] == "org/model"
    assert "base_model:adapter:org/model" in front_matter(text)["tags"]
    assert "`org/model` at `abc123`" in text


def test_snippets_for_other_programs_say_where_a_base_must_be_put(saved: Saved):
    """No other program finds a folder by its name alone, as lorakit does in its cache."""

    def of(**base: str | None) -> str:
        return card(replace(saved, passport={**(saved.passport or {}), "base": base}))

    local = of(name="tiny", revision=None)
    assert "put the place of `tiny` on your machine where it says `path/to/tiny`" in local
    assert 'AutoModelForCausalLM.from_pretrained("path/to/tiny")' in local
    assert "vllm serve path/to/tiny --enable-lora" in local
    file = of(name="tiny-Q4_1.gguf", revision=None)
    assert 'from_pretrained("path/to", gguf_file="tiny-Q4_1.gguf")' in file
    on_hub = of(name="org/model", revision="abc123")
    assert 'AutoModelForCausalLM.from_pretrained("org/model")' in on_hub
    assert "vllm serve org/model --enable-lora" in on_hub
    assert "path/to" not in on_hub


def test_the_card_says_what_was_done_and_with_what(saved: Saved):
    text = card(saved)
    for wanted in (
        "# support\n",
        "`tiny`",
        "| train | 400 | 40,000 | 9,000 |",
        "`train.jsonl`, sha256 `ab12`",
        "| rank | 6 |",
        "| learning_rate | 0.0002 |",
        "| training loss, last | 1.25 |",
        "| torch | 2.13.0 |",
        "PeftModel.from_pretrained",
        "vllm serve path/to/tiny --enable-lora --lora-modules adapter=adapter\n",
        "| vLLM | yes |",
        "lorakit merge adapter --out merged",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>",
    ):
        assert wanted in text, wanted


def test_no_absolute_path_and_no_none_is_in_the_card(saved: Saved, tmp_path: Path):
    text = card(saved)
    assert HOME not in text
    assert str(saved.folder.parent) not in text
    assert "None" not in text
    bare = card(replace(saved, passport=None))
    assert "None" not in bare
    assert "base_model:" not in bare


@pytest.mark.parametrize(
    ("rank", "targets", "verdict"),
    [
        (4, ("lm_head", "q_proj"), "no: it takes embeddings and heads only in part"),
        (20, ("q_proj",), "yes, with --max-lora-rank 32"),
        (600, ("q_proj",), "no: rank 600 is above its 512"),
    ],
)
def test_what_serves_the_adapter_is_what_the_plan_said(
    tmp_path: Path, rank: int, targets: tuple[str, ...], verdict: str
):
    wide = tiny_config("llama", hidden_size=640, intermediate_size=32, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "tiny")
    base = find_base(tmp_path / "tiny")
    one = save_adapter(base, tmp_path / "adapter", "lora", rank=rank, target_modules=targets)
    text = card(one)
    assert f"| vLLM | {verdict} |" in text
    command = "vllm serve path/to/tiny --enable-lora --lora-modules adapter=adapter"
    assert (command in text) is verdict.startswith("yes")
    assert (f"{command} --max-lora-rank 32\n" in text) is ("32" in verdict)
    of_peft = card(replace(one, passport=None))
    assert "vllm" not in of_peft.lower(), "what it needs is not known of a base that is not named"


def test_the_prompt_format_is_that_of_the_training(saved: Saved):
    """A tokenizer may have a chat template that the training did not use."""
    counts = {**PASSPORT["data"]["train"], "formats": {"text": 400}}
    passport = {**PASSPORT, "data": {"train": counts}}
    text = card(replace(saved, passport=passport))
    assert "Plain text: the training used no chat template." in text
    assert "<|im_start|>" not in text


def test_write_card_replaces_an_older_one(saved: Saved):
    (saved.folder / "README.md").write_text("old")
    write_card(saved.folder)
    assert (saved.folder / "README.md").read_text() == card(saved)
