"""A model that reads its weights when it needs them gives the logits of one that holds them."""

from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorakit.model.base import load
from lorakit.model.streamed import RowByRow, Stored, held_bytes, streamed
from lorakit.model.weights import Weights
from lorakit.threads import Threads
from tests.export.adapters import find_base
from tests.tiny import SMALL, tiny_tokenizer, write_tiny_model

CPU = torch.device("cpu")
IDS = torch.arange(3, 35).view(2, 16)
# What each is here for: a scaled embedding, positions looked up by a class of its own, a recurrence
# with parameters of its own, experts that transformers makes one tensor of while it loads.
MORE = {
    "gemma2": SMALL | {"head_dim": 8},
    "opt": {
        "vocab_size": 320,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "mamba": {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mixtral": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def write_model(folder: Path, family: str) -> Path:
    if family not in MORE:
        return write_tiny_model(
            folder, family.split()[-1], tied=family.startswith("tied"), shards=2
        )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **MORE[family]))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in ("llama", "tied llama", "qwen2", "gpt2", *MORE)]
    + [("llama", torch.float64)],
)
def test_logits_are_those_of_a_loaded_model(
    tmp_path: Path, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.model.streamed.BLOCK", 300)  # a few rows at a time
    base = find_base(write_model(tmp_path, family))
    expected = logits(load(base, device=CPU, dtype=dtype))
    with base.weights() as weights, Threads() as threads:
        model = streamed(base, weights, device=CPU, dtype=dtype, threads=threads)
        assert all(parameter.is_meta for parameter in model.parameters())
        found = logits(model)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_what_is_held_is_the_whole_model_where_transformers_converts_it(tmp_path: Path) -> None:
    for family, share in (("llama", 0), ("mixtral", 1)):
        base = find_base(write_model(tmp_path / family, family))
        loaded = load(base, device=CPU, dtype=torch.float32)
        with base.weights() as weights:
            held = held_bytes(base, weights)
        assert held == share * sum(parameter.nbytes for parameter in loaded.parameters())


def test_no_more_than_a_few_rows_of_a_matrix_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.model.streamed.BLOCK", 256)
    base, read, largest = find_base(write_tiny_model(tmp_path)), Weights.read, 0

    def spy(self: Weights, name: str, rows: slice = slice(None)) -> torch.Tensor:
        nonlocal largest
        tensor = read(self, name, rows)
        largest = max(largest, tensor.numel())
        return tensor

    monkeypatch.setattr(Weights, "read", spy)
    with base.weights() as weights, Threads() as threads:
        logits(streamed(base, weights, device=CPU, dtype=torch.float32, threads=threads))
    assert 0 < largest <= 256


def test_a_tensor_that_is_put_in_place_is_used_and_one_put_back_is_forgotten(
    tmp_path: Path,
) -> None:
    base = find_base(write_tiny_model(tmp_path))
    with base.weights() as weights, Threads() as threads:
        model = streamed(base, weights, device=CPU, dtype=torch.float32, threads=threads)
        head = model.get_submodule("lm_head")
        x, own = torch.ones(1, head.in_features), torch.ones(head.out_features, head.in_features)
        before = head(x)
        assert isinstance(head, RowByRow)
        changed = functional_call(head, {"weight": own}, (x,))
        assert torch.equal(changed, torch.full_like(changed, head.in_features))
        assert isinstance(head._parameters, Stored)
        assert next(iter(head.parameters())).is_meta
        assert torch.equal(head(x), before)
        assert torch.equal(head.weight, weights.read("lm_head.weight"))
