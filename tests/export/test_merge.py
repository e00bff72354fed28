import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit import adapters
from lorakit.adapters import Saved
from lorakit.errors import BadInput, CheckFailed, LorakitError, RunFailed
from lorakit.export import blocks
from lorakit.export import merge as merging
from lorakit.export.merge import Options, merge, planned
from lorakit.model import base as bases
from lorakit.model.base import Base
from lorakit.model.sites import find_sites
from lorakit.model.weights import Weights
from lorakit.runtime import Runtime
from lorakit.storage.tensors import TensorFile, write_tensors
from tests.export.adapters import (
    CPU,
    find_base,
    read_all,
    run,
    save_adapter,
    settings,
)
from tests.tiny import write_tiny_model

METHODS = ("lora", "rslora", "dora", "ia3")


def make(
    folder: Path, family: str = "llama", method: str = "lora", **options: Any
) -> tuple[Base, Saved]:
    base = find_base(write_tiny_model(folder / "base", family, **options))
    return base, save_adapter(base, folder / "adapter", method, **settings(method, family))


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 63).view(2, 30)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def adapted_logits(saved: Saved, base: Base) -> torch.Tensor:
    model = bases.load(base, device=CPU, dtype=torch.float32)
    adapters.attach_saved(saved, model, find_sites(model))
    return logits(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "tied llama", "qwen2", "gpt2"])
def test_the_merged_model_is_base_and_adapter(tmp_path: Path, family: str, method: str):
    kind, tied = family.split()[-1], family.startswith("tied")
    base, saved = make(tmp_path, kind, method, tied=tied)
    report = run(saved, base, tmp_path / "merged", verify=False)
    assert report["changed"] > 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected, found = adapted_logits(saved, base), logits(plain)
    # Four products in each of two layers, each 1e-6 (reliability 8.1), adding up like random ones.
    assert float((found - expected).norm() / expected.norm()) < 1e-6 * 8**0.5
    assert plain.config.tie_word_embeddings is tied
    assert set(read_all(tmp_path / "merged")) == set(read_all(tmp_path / "base"))


def test_the_tokenizer_and_the_template_come_along(tmp_path: Path):
    base, saved = make(tmp_path)
    (saved.folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    run(saved, base, tmp_path / "merged", verify=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    turn = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False) == "Hi!"
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"generation_config.json", "merge_report.json"} <= names
    assert not {"lorakit.json", "adapter_config.json", "adapter_model.safetensors"} & names


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_merge_that_lost_a_bit_or_a_file_is_not_loaded(tmp_path: Path, name: str, missing: bool):
    base, saved = make(tmp_path)
    run(saved, base, tmp_path / "merged", verify=False)
    path = tmp_path / "merged" / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.unlink() if missing else path.write_bytes(content)
    with pytest.raises(LorakitError) as caught:
        bases.load(find_base(tmp_path / "merged"), device=CPU, dtype=torch.float32)
    assert caught.value.id in ("model.damaged", "model.not-found")
    assert missing or "wrong checksum" in caught.value.message


@pytest.mark.parametrize("where", ["embed_tokens", "lm_head"])
def test_a_tie_stays_a_tie_when_one_end_is_adapted(tmp_path: Path, where: str):
    base = find_base(write_tiny_model(tmp_path / "base", tied=True))
    saved = save_adapter(base, tmp_path / "adapter", "lora", target_modules=(where,), rank=4)
    report = run(saved, base, tmp_path / "merged")
    assert report["verify"]["ok"]
    assert (report["adapted"], report["changed"]) == (1, 1)
    names = set(read_all(tmp_path / "merged"))
    assert "lm_head.weight" not in names
    assert names == set(read_all(tmp_path / "base"))


def test_whole_copies_replace_the_base_tensors(tmp_path: Path):
    base = find_base(write_tiny_model(tmp_path / "base"))
    more = {"target_modules": ("q_proj",), "rank": 2, "modules_to_save": ("lm_head", "model.norm")}
    saved = save_adapter(base, tmp_path / "adapter", "lora", **more)
    report = run(saved, base, tmp_path / "merged")
    assert report["verify"]["ok"]
    merged = read_all(tmp_path / "merged")
    assert torch.equal(merged["lm_head.weight"], saved.tensors["lm_head.weight"])
    assert torch.equal(merged["model.norm.weight"], saved.tensors["model.norm.weight"])


def test_files_of_a_bare_decoder_keep_their_names(tmp_path: Path):
    """GPT-2's published files lack the first part of each path, and hold mask buffers."""
    base, saved = make(tmp_path, "gpt2")
    run(saved, base, tmp_path / "merged")
    bare = tmp_path / "bare"
    shutil.copytree(tmp_path / "base", bare)
    (bare / "model.safetensors").unlink()
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in read_all(tmp_path / "base").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    write_tensors(bare / "model.safetensors", tensors)
    again = find_base(bare)
    other = save_adapter(again, tmp_path / "other", "lora", **settings("lora", "gpt2"))
    report = run(other, again, tmp_path / "merged-bare")
    assert report["verify"]["ok"]
    found = read_all(tmp_path / "merged-bare")
    assert found.keys() == tensors.keys()
    for name, tensor in read_all(tmp_path / "merged").items():
        assert torch.equal(found[name.removeprefix("transformer.")], tensor)


def test_shards_of_base_and_result_change_no_bit(tmp_path: Path):
    base, saved = make(tmp_path)
    assert len(run(saved, base, tmp_path / "one")["shards"]) == 1
    expected = read_all(tmp_path / "one")
    sharded = find_base(write_tiny_model(tmp_path / "sharded", shards=3))
    with sharded.weights() as weights:
        assert len(weights.files) >= 3
    report = run(saved, sharded, tmp_path / "many", max_shard=30_000)
    assert len(report["shards"]) > 3
    found = read_all(tmp_path / "many")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for shard in report["shards"]:
        path = tmp_path / "many" / shard["file"]
        assert path.stat().st_size == shard["bytes"]
        with TensorFile(path, "model") as file:
            assert len(file.names) == 1 or shard["bytes"] <= 30_000 + 4096
    assert (
        float(
            (
                logits(AutoModelForCausalLM.from_pretrained(tmp_path / "many"))
                - logits(AutoModelForCausalLM.from_pretrained(tmp_path / "one"))
            )
            .abs()
            .max()
        )
        == 0
    )


def test_files_that_may_stay_as_they_are_differ_from_the_base_in_adapted_rows_alone(tmp_path: Path):
    """Names, headers and places stay, so that copied blocks can be shared on the disk."""
    base = find_base(write_tiny_model(tmp_path / "base", shards=3))
    saved = save_adapter(base, tmp_path / "adapter", "lora", target_modules=("v_proj",), rank=2)
    report = run(saved, base, tmp_path / "merged", verify=False)
    adapted = changed = 0
    for shard in report["shards"]:
        path, original = tmp_path / "merged" / shard["file"], base.where / shard["file"]
        found, expected = (bytearray(file.read_bytes()) for file in (path, original))
        assert shard["sha256"] == hashlib.sha256(found).hexdigest()
        with TensorFile(original, "model") as file:
            for name, entry in file.layout.entries.items():
                if "v_proj" in name:
                    adapted += 1
                    changed += found[entry.start : entry.end] != expected[entry.start : entry.end]
                    found[entry.start : entry.end] = expected[entry.start : entry.end]
        assert found == expected
    assert adapted == changed == report["changed"] == 2
    assert {path.name for path in base.where.iterdir()} < {
        path.name for path in (tmp_path / "merged").iterdir()
    }


@pytest.mark.parametrize("options", [{}, {"max_shard": 30_000}, {"dtype": "bf16"}])
def test_threads_change_no_bit(tmp_path: Path, options: dict[str, Any], monkeypatch: Any):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)
    base, saved = make(tmp_path, "qwen2")
    before = torch.get_num_threads()
    files = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            report = run(saved, base, tmp_path / str(threads), verify=False, **options)
            files.append([shard["sha256"] for shard in report["shards"]])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert files[0] == files[1]


def test_small_blocks_give_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, saved = make(tmp_path, method="dora")
    run(saved, base, tmp_path / "whole", verify=False)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    largest = 0
    read = Weights.read

    def spy(self: Weights, name: str, rows: slice = slice(None)) -> torch.Tensor:
        nonlocal largest
        tensor = read(self, name, rows)
        largest = max(largest, tensor.numel() * 4)
        return tensor

    monkeypatch.setattr(Weights, "read", spy)
    run(saved, base, tmp_path / "blocks", verify=False)
    assert 0 < largest <= 1000
    whole, found = read_all(tmp_path / "whole"), read_all(tmp_path / "blocks")
    for name, tensor in whole.items():
        # A product of fewer rows may add up in another order.
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_each_weight_is_rounded_once(tmp_path: Path, dtype: str):
    """Compared with the update in float64, rounded to the output's dtype."""
    base, saved = make(tmp_path)
    report = run(saved, base, tmp_path / "merged", dtype=dtype)
    assert report["verify"]["ok"]
    target = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    original, found = read_all(base.where), read_all(tmp_path / "merged")
    exact = close = total = 0
    for name, weight in original.items():
        assert found[name].dtype == target
        site = name.removesuffix(".weight")
        wide = weight.double()
        if f"{site}.lora_A.weight" in saved.tensors:
            A, B = (saved.tensors[f"{site}.lora_{x}.weight"].double() for x in "AB")
            wide = wide + saved.passport["scales"][site] * B @ A
        rounded = wide.to(target)
        exact += int((found[name] == rounded).sum())
        # One unit in the last place; in fp32 of the terms, whose sum may cancel.
        unit = torch.finfo(target).eps * (rounded if dtype != "fp32" else weight).double().abs()
        error = (found[name].double() - rounded.double()).abs()
        close += int((error <= unit + (1e-6 if dtype == "fp32" else 0)).sum())
        total += weight.numel()
    assert close == total
    assert exact >= (0.8 if dtype == "fp32" else 0.999) * total
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == str(target).removeprefix("torch.")


def test_half_of_an_adapter_lies_half_way(tmp_path: Path):
    base, saved = make(tmp_path)
    whole = run(saved, base, tmp_path / "whole")
    half = run(saved, base, tmp_path / "half", scale=0.5)
    nothing = run(saved, base, tmp_path / "nothing", scale=0.0)
    assert "max_abs" in whole["verify"]
    assert "scale 0.5" in half["verify"]["skipped"]
    assert nothing["changed"] == 0
    base_tensors = read_all(base.where)
    merged, halved = read_all(tmp_path / "whole"), read_all(tmp_path / "half")
    for name, tensor in base_tensors.items():
        torch.testing.assert_close(halved[name], (tensor + merged[name]) / 2)


def test_an_untrained_adapter_merges_to_the_base(tmp_path: Path):
    base = find_base(write_tiny_model(tmp_path / "base"))
    saved = save_adapter(base, tmp_path / "adapter", "lora", size=0.0, target_modules=("q_proj",))
    report = run(saved, base, tmp_path / "merged")
    assert report["changed"] == 0
    found = read_all(tmp_path / "merged")
    assert all(torch.equal(found[name], tensor) for name, tensor in read_all(base.where).items())


def test_a_merge_that_equals_the_base_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, saved = make(tmp_path)
    layer = type(
        next(iter(adapters.merge_layers(saved, find_sites(bases.skeleton(base))).values()))
    )
    monkeypatch.setattr(layer, "merged", lambda self, base, rows: dict(base))
    with pytest.raises(CheckFailed, match="none of 6 adapted tensors differs") as caught:
        run(saved, base, tmp_path / "merged", verify=False)
    assert (caught.value.id, caught.value.exit_code) == ("check.merge", 1)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_lost_in_rounding_fails(tmp_path: Path):
    base = find_base(write_tiny_model(tmp_path / "base"))
    saved = save_adapter(base, tmp_path / "adapter", "lora", size=1e-12, target_modules=("q_proj",))
    with pytest.raises(CheckFailed, match="lost in rounding"):
        run(saved, base, tmp_path / "merged", dtype="bf16")


def test_a_wrong_byte_on_the_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, saved = make(tmp_path)
    checked = merging.check_written

    def damaged(tensors: Any, folder: Path, *rest: Any) -> Any:
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        return checked(tensors, folder, *rest)

    monkeypatch.setattr(merging, "check_written", damaged)
    with pytest.raises(CheckFailed, match="does not hold what was merged") as caught:
        run(saved, base, tmp_path / "merged", verify=False)
    assert caught.value.id == "check.merge"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_logits_that_differ_fail_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A layer whose forward and merge disagree: the files are right, the model is not."""
    base, saved = make(tmp_path)
    layer = type(
        next(iter(adapters.merge_layers(saved, find_sites(bases.skeleton(base))).values()))
    )
    honest = layer.merged
    monkeypatch.setattr(
        layer,
        "merged",
        lambda self, base, rows: {"weight": honest(self, base, rows)["weight"] * 1.01},
    )
    with pytest.raises(CheckFailed, match="not base and adapter in one") as caught:
        run(saved, base, tmp_path / "merged")
    assert caught.value.id == "check.merge"
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_an_effect_that_is_lost_or_doubled_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
):
    """So light an adapter that the bound alone, made for bf16, would let anything pass."""
    base = find_base(write_tiny_model(tmp_path / "base"))
    light = {"size": 1e-3, "target_modules": ("down_proj",)}
    saved = save_adapter(base, tmp_path / "adapter", "lora", **light)
    kept = run(saved, base, tmp_path / "merged")["verify"]["effect_kept"]
    assert kept == pytest.approx(1, abs=1e-3)
    layer = type(
        next(iter(adapters.merge_layers(saved, find_sites(bases.skeleton(base))).values()))
    )
    honest = layer.merged

    def wrong(self: Any, base: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
        merged = honest(self, base, rows)["weight"]
        return {"weight": torch.lerp(base["weight"], merged, factor) + 1e-9}

    monkeypatch.setattr(layer, "merged", wrong)
    monkeypatch.setattr("lorakit.export.logits.BOUNDS", {torch.float32: 1.0})
    with pytest.raises(CheckFailed, match=rf"\({factor:.0%} of it kept\)"):
        run(saved, base, tmp_path / "wrong")


def test_the_second_check_is_skipped_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, saved = make(tmp_path)
    monkeypatch.setattr(Runtime, "free_bytes", lambda self: 1000)
    logits_check = run(saved, base, tmp_path / "merged")["verify"]
    assert "needs 0.0 GiB" in logits_check["skipped"]


def test_an_end_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, saved = make(tmp_path)
    with planned(saved, base, tmp_path / "merged", Options()) as plan:
        count = 0

        def stop(_: int) -> None:
            nonlocal count
            count += 1
            if count == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge(plan, Runtime(CPU), stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    run(saved, base, tmp_path / "merged", verify=False)


def test_numbers_beyond_the_dtype_are_refused(tmp_path: Path):
    base = find_base(write_tiny_model(tmp_path / "base"))
    saved = save_adapter(base, tmp_path / "adapter", "lora", size=500.0, target_modules=("q_proj",))
    before = {path.name: path.read_bytes() for path in base.where.iterdir()}
    with pytest.raises(RunFailed, match="not finite as float16") as caught:
        run(saved, base, tmp_path / "merged", dtype="fp16")
    assert caught.value.id == "model.not-finite"
    assert not (tmp_path / "merged").exists()
    assert {path.name: path.read_bytes() for path in base.where.iterdir()} == before


def test_another_base_is_refused(tmp_path: Path):
    _, saved = make(tmp_path)
    other = find_base(write_tiny_model(tmp_path / "other", seed=9))
    with pytest.raises(BadInput) as caught:
        run(saved, other, tmp_path / "merged")
    assert caught.value.id == "adapter.wrong-base"


def test_what_does_not_merge_says_so(tmp_path: Path):
    base = find_base(write_tiny_model(tmp_path / "base"))
    saved = save_adapter(base, tmp_path / "adapter", "prefix", tokens=4, init="random")
    with pytest.raises(BadInput) as caught:
        run(saved, base, tmp_path / "merged")
    assert caught.value.id == "adapter.not-mergeable"


def test_the_output_is_neither_an_input_nor_something_else(tmp_path: Path):
    base, saved = make(tmp_path)
    for out in (base.where, saved.folder, tmp_path, base.where / ".." / "adapter"):
        with pytest.raises(BadInput) as caught:
            run(saved, base, out, overwrite=True)
        assert caught.value.id == "output.is-input"
    out = tmp_path / "merged"
    out.mkdir()
    run(saved, base, out, verify=False)
    with pytest.raises(BadInput, match="earlier merge") as caught:
        run(saved, base, out)
    assert caught.value.id == "output.not-empty"
    run(saved, base, out, verify=False, overwrite=True, dtype="bf16")
    assert read_all(out)["lm_head.weight"].dtype is torch.bfloat16
    (out / "merge_report.json").unlink()
    with pytest.raises(BadInput, match="no merge") as caught:
        run(saved, base, out, overwrite=True)
    assert caught.value.id == "output.not-empty"


def test_too_small_a_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, saved = make(tmp_path)
    monkeypatch.setattr("lorakit.storage.disk.free_space", lambda path: 1 << 20)
    with pytest.raises(RunFailed) as caught:
        run(saved, base, tmp_path / "merged")
    assert caught.value.id == "storage.full"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_quantised_base_is_refused(tmp_path: Path):
    base, saved = make(tmp_path)
    with base.weights() as weights:
        sites = find_sites(bases.skeleton(base))
        layers = adapters.merge_layers(saved, sites)
        monkey = weights.dtype
        weights.dtype = lambda name: torch.uint8 if "q_proj" in name else monkey(name)  # type: ignore[method-assign]
        with pytest.raises(BadInput) as caught:
            blocks.MergedTensors(weights, layers, sites)
    assert caught.value.id == "adapter.not-mergeable"
