"""Tiny models and a tokenizer, built in milliseconds: real architectures, no downloads."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from lorakit.model.attention import NAME

FAMILIES = ("llama", "qwen2", "gpt2")
VOCABULARY = 320
SIZES = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim
    num_key_value_heads max_position_embeddings bos_token_id eos_token_id pad_token_id
    sliding_window
"""
SMALL: dict[str, Any] = {  # widths of a Llama, as most families call them
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
UNKNOWN, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXT = (
    "the system helps the user and the assistant answers\n",
    "what is the capital of france? the capital of france is paris.\n",
)


def tiny_config(family: str, *, tied: bool = False, **changes: Any) -> PretrainedConfig:
    """Return the settings of a model with 2 layers, 32 hidden units and 4 heads (2 for keys)."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    common = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied, **ids, **changes}
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
        return GPT2Config(**{**sizes, **common})
    sizes = SMALL | {"max_position_embeddings": 256}
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**{**sizes, **common})


def tiny_model(
    family: str, *, seed: int = 0, tied: bool = False, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return a tiny model in eval mode; the caller's random state stays as it was.

    Weights are drawn larger than usual, so that logits and gradients are far from zero.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, tied=tied))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.2)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def known_model(family: str, **changes: Any) -> PreTrainedModel:
    """Return a tiny fp64 model of a known family, with our own attention."""
    if family in FAMILIES:
        config = tiny_config(family, **changes)
    else:
        sizes = tiny_config("llama").to_dict() | {"head_dim": 8} | changes
        config = AutoConfig.for_model(
            family, **{name: sizes[name] for name in SIZES.split() if name in sizes}
        )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).double().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, 0, 0.3)
    model.set_attn_implementation(NAME)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of at most 320 ids with a ChatML template.

    Ids 0 to 2 are `<|endoftext|>`, `<|im_start|>` and `<|im_end|>`, the end of a turn and of text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(name, special=True) for name in (UNKNOWN, START, END)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=256,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_wide_model(folder: Path) -> int:
    """Write a model that is mostly linear layers, in some nine files; return its bytes."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 10}
    model = AutoModelForCausalLM.from_config(tiny_config("llama", **sizes))
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 8)
    tiny_tokenizer().save_pretrained(folder)
    return size


def write_tiny_model(
    folder: Path, family: str = "llama", *, seed: int = 0, tied: bool = False, shards: int = 1
) -> Path:
    """Write a tiny model and its tokenizer as an ordinary model folder; returns the folder.

    More than one shard means at least so many files with an index.
    """
    model = tiny_model(family, seed=seed, tied=tied)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1)
    tiny_tokenizer().save_pretrained(folder)
    return folder
