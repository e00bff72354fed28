"""Rows, recipes' data sections and tokenizers for the tests of the data room."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lorakit.data.items import Request
from lorakit.data.prepare import Dataset, prepare
from lorakit.recipe.sections import Data
from tests.tiny import tiny_tokenizer

# How Llama 3 and Qwen split text before they merge bytes.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if loop.index0 % 2 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
STRIPPING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] | trim) }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# As reasoning models do: earlier answers lose what the last one shows.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rows_file(folder: Path, rows: Iterable[Any], name: str = "rows.jsonl") -> Path:
    """Write rows as JSONL."""
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def section(path: Path | str, **keys: Any) -> Data:
    return Data.model_validate({"train": str(path), **keys})


def prepared(
    data: Data,
    folder: Path = Path(),
    *,
    context: int | None = None,
    tokenizer: Any = None,
    advance: Callable[[int], None] = lambda _: None,
    **more: Any,
) -> Dataset:
    request = Request(data, folder, **{"seed": 0, **more})
    return prepare(request, tokenizer or tiny_tokenizer(), context, advance)


def ask(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def byte_level(specials: list[str], template: str | None, **names: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with these special tokens; a bos_token is put first."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("Ġ", "the"),
        ("Ċ", "Ċ"),
        ("a", "n"),
        ("Ġ", "an"),
        ("Ġ", "Ġ"),
    ]
    merges += [("<", "|"), ("|", ">"), ("i", "n"), (".", "Ċ"), ("=", "=")]
    words = [*specials, *letters, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({word: id for id, word in enumerate(words)}, merges))
    words_and_spaces = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words_and_spaces, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    return _finished(tokenizer, template, names)


def sentencepiece_like(template: str | None, *, legacy: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer that marks word starts and falls back to bytes, as Llama 2's does."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(33, 127)]
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("a", "n"),
        ("▁", "an"),
        ("▁", "▁"),
        ("▁", "["),
    ]
    vocabulary = {word: id for id, word in enumerate([*pieces, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in pieces[:3]])
    return _finished(tokenizer, template, {"bos_token": "<s>", "eos_token": "</s>"})


def _finished(
    tokenizer: Tokenizer, template: str | None, names: dict[str, str]
) -> PreTrainedTokenizerFast:
    if bos := names.get("bos_token"):
        id = tokenizer.token_to_id(bos)
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, id)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    return fast


def llama3_like() -> PreTrainedTokenizerFast:
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_level(names, LLAMA3, bos_token=names[0], eos_token=names[3])


def stripping() -> PreTrainedTokenizerFast:
    return byte_level(["<|im_start|>", "<|im_end|>"], STRIPPING, eos_token="<|im_end|>")


def base_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer as base models have: no template, a token that begins texts."""
    return byte_level(["<s>", "</s>"], None, bos_token="<s>", eos_token="</s>")
