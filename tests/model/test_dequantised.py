"""Weights that were quantised and are made dense again, read from a base as from its files."""

from pathlib import Path

import pytest
import torch

from lorakit.model.base import load
from lorakit.model.dequantised import dequantised
from lorakit.model.quantized import Quantization, QuantizedLinear, Scratch
from lorakit.model.quantizer import quantizable
from lorakit.model.streamed import streamed
from lorakit.threads import Threads
from tests.export.adapters import CPU, find_base
from tests.model.test_quantized import FORMS, by_transformers
from tests.model.test_streamed import logits, write_model
from tests.tiny import tiny_tokenizer, write_tiny_model


@pytest.mark.parametrize("how", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(40, 64), (37, 48), (64, 2), (3, 10), (7, 192)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_are_those_of_the_whole(
    shape: tuple[int, int], how: Quantization, dtype: torch.dtype
) -> None:
    """Whatever the rows, and however blocks of 64 values lie across them."""
    module = QuantizedLinear(shape, dtype, how, Scratch())
    module.take(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    whole = module.dense().clone()
    assert torch.equal(module.dense_rows(slice(None)), whole)
    for start in range(shape[0]):
        for stop in (start + 1, start + 5, shape[0]):
            assert torch.equal(module.dense_rows(slice(start, stop)), whole[start:stop])


@pytest.mark.parametrize("how", FORMS, ids=str)
@pytest.mark.parametrize("family", ["llama", "tied llama", "qwen2", "gpt2", "mixtral"])
def test_logits_are_those_of_the_quantised_model(
    tmp_path: Path, family: str, how: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtral's experts are made one tensor of while it is loaded; its attention is quantised."""
    monkeypatch.setattr("lorakit.model.streamed.BLOCK", 300)
    base = find_base(write_model(tmp_path, family))
    expected = load(base, device=CPU, dtype=torch.float32, quantization=how)
    plain = load(base, device=CPU, dtype=torch.float32)
    with dequantised(base, how, torch.float32) as weights, Threads() as threads:
        found = logits(streamed(base, weights, device=CPU, dtype=torch.float32, threads=threads))
    torch.testing.assert_close(found, logits(expected), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, logits(plain), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", [FORMS[0], FORMS[2], FORMS[3]], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folder_that_is_stored_quantised_reads_as_a_dense_one(
    tmp_path: Path, family: str, how: Quantization
) -> None:
    dense = find_base(write_tiny_model(tmp_path / "model", family))
    by_transformers(tmp_path / "model", how).save_pretrained(tmp_path / "stored")
    tiny_tokenizer().save_pretrained(tmp_path / "stored")
    base = find_base(tmp_path / "stored")
    assert base.stored
    quantised = {f"{site.name}.weight" for site in quantizable(load(dense, device=CPU, dtype=F32))}
    with (
        dequantised(base, base.stored, F32) as found,
        dequantised(dense, how, F32) as expected,
        dense.weights() as files,
    ):
        assert set(found.names) == set(files.names)
        for name in files.names:
            assert found.shape(name) == files.shape(name)
            assert found.dtype(name) == files.dtype(name)
            assert torch.equal(found.read(name), expected.read(name))
            same = torch.equal(found.read(name), files.read(name))
            assert same is (name not in quantised), name


F32 = torch.float32
