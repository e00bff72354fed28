"""Merges of adapters that were trained on a base in 4 or 8 bits, into either kind of weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lorakit import adapters
from lorakit.adapters import Saved
from lorakit.data.batches import eval_batches
from lorakit.data.tokens import Example
from lorakit.errors import BadInput, LorakitError, Place
from lorakit.export import blocks, logits
from lorakit.export.losses import TOKENS, few, measure
from lorakit.export.merge import Options, merge, planned
from lorakit.model import base as bases
from lorakit.model.base import Base
from lorakit.model.quantized import Quantization, QuantizedLinear
from lorakit.model.sites import find_sites
from lorakit.model.weights import Weights
from lorakit.runtime import Runtime
from lorakit.scoring import score
from lorakit.storage.tensors import TensorFile
from tests.export.adapters import (
    CPU,
    find_base,
    read_all,
    run,
    save_adapter,
    settings,
)
from tests.model.test_quantized import by_transformers
from tests.tiny import tiny_tokenizer, write_tiny_model

F32 = torch.float32
FORMS = [Quantization("nf4"), Quantization("fp4", False), Quantization("int8")]


def passport(how: Quantization | None, dtype: str = "float32") -> dict[str, Any]:
    return {**Quantization.record(how), "dtype": dtype}


def make(
    folder: Path, how: Quantization | None, family: str = "llama", method: str = "lora", **more: Any
) -> tuple[Base, Saved]:
    """Return a base and an adapter of it that says that it was trained on a quantised one."""
    base = find_base(write_tiny_model(folder / "base", family, shards=more.pop("shards", 1)))
    more = {
        "passport": passport(how, more.pop("dtype", "float32")),
        **settings(method, family),
        **more,
    }
    return base, save_adapter(base, folder / "adapter", method, **more)


def dense_weights(base: Base, how: Quantization, dtype: torch.dtype = F32) -> dict[str, Any]:
    """Return what training on a quantised base multiplies with, by the weights' names."""
    model = bases.load(base, device=CPU, dtype=dtype, quantization=how)
    return {
        f"{name}.weight": module.dense().clone()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def example(seed: int, length: int) -> Example:
    ids = torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[: length // 2] = -100
    return Example(ids.int().numpy(), labels.int().numpy(), Place("rows.jsonl", seed + 1))


@pytest.mark.parametrize("how", FORMS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_merges_are_the_weights_with_the_update(
    tmp_path: Path, how: Quantization, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W + s B A in fp64, of the file's W or of its dequantised self, which q_proj is as well."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1500)
    base, saved = make(tmp_path, how, dtype=dtype)
    for which in ("original", "dequantised"):
        report = run(saved, base, tmp_path / which, base_weights=which)
        assert report["verify"]["ok"]
        assert report["base_weights"] == which
        assert report["trained_on"] == Quantization.record(how)
        assert (report["adapted"], report["changed"]) == (6, 6)
    files, held = read_all(base.where), dense_weights(base, how, getattr(torch, dtype))
    assert len(held) == 14
    found = {which: read_all(tmp_path / which) for which in ("original", "dequantised")}
    for name, weight in files.items():
        update = torch.zeros((), dtype=torch.float64)
        site = name.removesuffix(".weight")
        if f"{site}.lora_A.weight" in saved.tensors:
            A, B = (saved.tensors[f"{site}.lora_{x}.weight"].double() for x in "AB")
            update = saved.passport["scales"][site] * B @ A
        targets = {"original": weight, "dequantised": held.get(name, weight)}
        for which, target in targets.items():
            expected = (target.double() + update).float()
            torch.testing.assert_close(found[which][name], expected, rtol=1e-6, atol=1e-6)
        apart = not torch.allclose(found["original"][name], found["dequantised"][name], atol=1e-3)
        assert apart is (name in held), name


@pytest.mark.parametrize("method", ["dora", "ia3"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_dequantised_merge_is_the_model_that_was_trained(
    tmp_path: Path, family: str, method: str
) -> None:
    how = FORMS[0]
    base, saved = make(tmp_path, how, family, method)
    report = run(saved, base, tmp_path / "merged", base_weights="dequantised")
    assert report["verify"]["ok"]
    model = bases.load(base, device=CPU, dtype=F32, quantization=how)
    adapters.attach_saved(saved, model, find_sites(model))
    merged = bases.load(find_base(tmp_path / "merged"), device=CPU, dtype=F32)
    ids = torch.arange(3, 63).view(2, 30)
    with torch.no_grad():
        expected, found = (one(input_ids=ids, use_cache=False).logits for one in (model, merged))
    assert float((found - expected).norm() / expected.norm()) < 1e-6 * 8**0.5


def test_what_was_never_quantised_is_copied_to_the_byte(tmp_path: Path) -> None:
    base, saved = make(tmp_path, FORMS[0], shards=3)
    run(saved, base, tmp_path / "merged", base_weights="dequantised", max_shard=30_000)
    found = read_all(tmp_path / "merged")
    held = dense_weights(base, FORMS[0])
    for name, tensor in read_all(base.where).items():
        assert torch.equal(found[name], tensor) is (name not in held)


def test_a_reference_of_other_weights_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dequantised merge is compared with the dequantised base, not with the original."""
    base, saved = make(tmp_path, FORMS[0])
    honest = logits.streamed

    def original(base: Base, weights: Weights, **options: Any) -> PreTrainedModel:
        files = {k: one for k, one in weights.sources.items() if isinstance(one, TensorFile)}
        return honest(base, Weights(files), **options)

    monkeypatch.setattr(logits, "streamed", original)
    with pytest.raises(LorakitError, match="not base and adapter in one"):
        run(saved, base, tmp_path / "merged", base_weights="dequantised")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("how", [FORMS[0], FORMS[2]], ids=str)
def test_a_stored_base_is_merged_dequantised_or_into_what_it_was_made_from(
    tmp_path: Path, how: Quantization
) -> None:
    dense = find_base(write_tiny_model(tmp_path / "dense"))
    by_transformers(tmp_path / "dense", how).save_pretrained(tmp_path / "stored")
    tiny_tokenizer().save_pretrained(tmp_path / "stored")
    base = find_base(tmp_path / "stored")
    saved = save_adapter(base, tmp_path / "adapter", "lora", passport=passport(base.stored), rank=4)
    with pytest.raises(BadInput, match="stored as torch") as refused:
        run(saved, base, tmp_path / "merged")
    assert refused.value.id == "adapter.not-mergeable"
    assert "--base-weights dequantised" in (refused.value.help or "")
    assert not (tmp_path / "merged").exists()
    run(saved, base, tmp_path / "merged", base_weights="dequantised")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    merged = read_all(tmp_path / "merged")
    assert {tensor.dtype for tensor in merged.values()} == {F32}
    assert merged.keys() == read_all(dense.where).keys()
    with planned(saved, dense, tmp_path / "original", Options()) as plan:
        (notice,) = plan.notices
        assert notice.id == "adapter.base-unknown"
        assert f"stored as {base.stored}" in notice.message
        assert merge(plan, Runtime(CPU))["verify"]["ok"]
    run(saved, dense, tmp_path / "again", base_weights="dequantised")
    again = read_all(tmp_path / "again")
    assert all(torch.equal(again[name], tensor) for name, tensor in merged.items())


def test_dense_weights_are_not_dequantised(tmp_path: Path) -> None:
    base, saved = make(tmp_path, None)
    with pytest.raises(BadInput, match="was trained on dense weights") as refused:
        run(saved, base, tmp_path / "merged", base_weights="dequantised")
    assert refused.value.id == "usage"
    (saved.folder / "lorakit.json").unlink()
    with pytest.raises(BadInput, match="nothing tells how training held the base"):
        run(adapters.read(saved.folder), base, tmp_path / "merged", base_weights="dequantised")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("chosen", ["original", "dequantised"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_are_those_of_the_models_themselves(
    tmp_path: Path, family: str, chosen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded whole: the quantised base with its adapter, and both merged folders, in bf16."""
    monkeypatch.setattr("lorakit.export.losses.LOGITS_BYTES", 50 * 4 * 320)  # two batches
    how = FORMS[0]
    base, saved = make(tmp_path, how, family, size=0.2)
    rows = [example(seed, length) for seed, length in enumerate((9, 30, 17, 25))]

    def loss(model: Any) -> float:
        scores = score(model, eval_batches(rows, packing=False))
        return sum(one.nll for one in scores) / sum(one.tokens for one in scores)

    model = bases.load(base, device=CPU, dtype=F32, quantization=how)
    adapters.attach_saved(saved, model, find_sites(model))
    expected = {"trained": loss(model)}
    for which in ("original", "dequantised"):
        run(saved, base, tmp_path / which, base_weights=which, dtype="bf16")
        made = find_base(tmp_path / which)
        expected[which] = loss(bases.load(made, device=CPU, dtype=F32))
    done: list[int] = []
    options = Options(base_weights=chosen, dtype="bf16")
    with planned(saved, base, tmp_path / "merged", options) as plan:
        found = measure(plan, rows, Runtime(CPU), done.append)
        report = merge(plan, Runtime(CPU), losses=found.facts())
    assert sum(done) == 3 * len(rows)
    assert found.rows == len(rows)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5)
        assert report["losses"][name] == getattr(found, name)
    assert abs(found.dequantised - found.trained) < abs(found.original - found.trained)
    assert f"{found.trained:.4f} as trained" in str(found)
    assert f"{found.original:.4f} merged into the original" in str(found)


def test_no_more_rows_are_measured_than_the_tokens_allow() -> None:
    long, short = example(0, TOKENS), example(1, 8)
    assert few([long, short]) == [long]
    assert few([short, long]) == [short]
    assert few([short, short]) == [short, short]
    assert len(few([example(0, TOKENS + 1), short])) == 1
