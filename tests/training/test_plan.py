"""What a plan says before any weight is read, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lorakit import adapters
from lorakit.cli.train_run import as_begun
from lorakit.data.template import TEMPLATES
from lorakit.errors import BadInput
from lorakit.model import base as base_models
from lorakit.recipe.reader import dump, read
from lorakit.recipe.sections import Recipe
from lorakit.runtime import Runtime
from lorakit.training import memory, passports, summary
from lorakit.training import plan as plans
from lorakit.training.checkpoint import Checkpoint, State
from lorakit.training.folder import RunFolder
from lorakit.training.plan import Permissions, Plan, make
from tests.tiny import known_model, tiny_config, tiny_tokenizer, write_tiny_model

ALONE = Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan")
    write_tiny_model(path / "model", "llama", tied=True)
    short = AutoModelForCausalLM.from_config(tiny_config("gpt2", n_positions=64))
    short.save_pretrained(path / "short")
    tiny_tokenizer().save_pretrained(path / "short")
    row = '{{"prompt": "the capital {n}", "completion": "of france"}}\n'
    (path / "rows.jsonl").write_text("".join(row.format(n=n) for n in range(10)))
    row = '{{"prompt": "{long}", "completion": "of france"}}\n'
    long = [row.format(long="the capital " * (1 + 30 * (n % 2))) for n in range(10)]
    (path / "long.jsonl").write_text("".join(long))
    (path / "t.jinja").write_text(TEMPLATES["chatml"])
    return path


def written(folder: Path, **sections: Any) -> Recipe:
    file = folder / "recipe.yaml"
    recipe = {"model": {"path": "model", "dtype": "fp32"}, "data": {"train": "rows.jsonl"}}
    for name, section in sections.items():
        recipe[name] = recipe.get(name, {}) | section
    file.write_text(yaml.safe_dump(recipe))
    return read(str(file), adapters.settings_for, [], environ={})


def planned(folder: Path, **sections: Any) -> Plan:
    return make(written(folder, **sections), ALONE, Permissions(offline=True))


def decided(recipe: Recipe) -> Any:
    """Return all that a plan of a recipe decides, or how it is refused."""
    try:
        plan = make(recipe, ALONE, Permissions(offline=True))
    except BadInput as error:
        return error.id, error.message, error.help
    facts = summary.facts(plan)
    del facts["free_bytes"], facts["disk"], facts["data"]["sha256"]  # by what the files are called
    notices = [(notice.id, notice.message, notice.help) for notice in plan.notices]
    return facts, notices, plan.packing, plan.lean, passports.pinned(plan, ALONE)


SHORT, PREFIX, LONG = {"path": "short"}, {"method": "prefix"}, {"train": "long.jsonl"}


@pytest.mark.parametrize(
    ("sections", "refused"),
    [
        ({}, None),
        ({"adapter": PREFIX}, None),
        ({"adapter": PREFIX, "data": {"packing": True}}, "recipe.conflict"),
        ({"adapter": PREFIX, "data": {"packing": False}}, None),
        ({"model": SHORT}, None),
        ({"model": SHORT, "data": {"packing": "dense"}}, None),
        ({"model": SHORT, "data": {"max_length": 65}}, "model.context-too-short"),
        ({"model": SHORT, "data": LONG}, "data.too-long"),
        ({"model": SHORT, "data": LONG | {"too_long": "drop"}}, None),
        ({"data": LONG | {"max_length": 48}}, "data.too-long"),
        ({"data": {"eval": ["long.jsonl"], "chat_template": "t.jinja"}}, None),
    ],
    ids=str,
)
def test_a_recipe_written_out_decides_as_the_recipe_itself(
    folder: Path, tmp_path: Path, sections: dict[str, Any], refused: str | None
) -> None:
    """What a run leaves as resolved.yaml names every key, and is the same recipe."""
    recipe = written(folder, **sections)
    out = tmp_path / "resolved.yaml"
    out.write_text(dump(recipe))
    found = decided(recipe)
    assert (found[0] if refused else None) == refused
    assert decided(read(out, adapters.settings_for, environ={})) == found


def test_every_row_fits_behind_a_prefix(folder: Path) -> None:
    row = {"prompt": "the capital", "completion": "of france " * 30}
    (folder / "eval.jsonl").write_text(f"{json.dumps(row)}\n")
    data = {"eval": "eval.jsonl", "too_long": "truncate"}
    plan = planned(folder, model=SHORT, adapter=PREFIX, data=data)
    assert plan.dataset.max_length == 64 - 20
    assert plan.dataset.eval.lengths.tolist() == [64 - 20]
    with pytest.raises(BadInput, match="max_length 64 > the 44 positions"):
        planned(folder, model=SHORT, adapter=PREFIX, data={"max_length": 64})


def test_a_dense_pack_is_no_longer_than_the_context(folder: Path) -> None:
    plan = planned(folder, model=SHORT, data={"packing": "dense"})
    assert plan.steps.longest <= 64


@pytest.mark.parametrize(
    "adapter",
    [
        {"rank": 4, "target_modules": ["q_proj", "v_proj"]},
        {"rank": 4, "modules_to_save": ["embed_tokens", "norm"]},
        {"method": "dora", "rank": 2},
        {"method": "ia3"},
        {"method": "prefix"},
    ],
    ids=str,
)
def test_the_counts_of_a_plan_are_those_of_the_adapted_model(
    folder: Path, adapter: dict[str, Any]
) -> None:
    plan = planned(folder, adapter=adapter)
    model = base_models.load(plan.base, device=ALONE.device, dtype=plan.dtype)
    assert plan.shape.parameters == sum(p.numel() for p in model.parameters())
    adapters.attach(plan.method, model, list(plan.sites), seed=0)
    assert plan.shape.trainable == sum(p.numel() for p in adapters.trainable(model).values())
    facts = summary.facts(plan)
    assert sum(group.sites for group in plan.groups) == len(facts["sites"])
    assert facts["memory"]["total"] == sum(plan.memory.parts.values())
    assert facts["tokens"] == sum(plan.steps.tokens_of(n)[0] for n in range(plan.steps.total))
    assert all(label or text for label, text in summary.lines(plan))


def test_the_files_of_a_base_are_read_by_the_main_process_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(folder)
    alone = passports.pinned(plan, ALONE)
    monkeypatch.setattr(Runtime, "from_main", lambda *_: "of the main process")
    for name in ("weights_sha256", "tokenizer_sha256"):
        monkeypatch.setattr(base_models.Base, name, "never called")
    told = passports.pinned(plan, Runtime(ALONE.device, 1, 2))
    differs = {key for key in alone if alone[key] != told[key]}
    assert differs == {"base", "tokenizer", "processes"}


def test_the_host_holds_what_every_process_of_the_machine_takes(folder: Path) -> None:
    plan = planned(folder)
    alone, four = (replace(plan, local_processes=number) for number in (1, 4))
    assert summary.host_bytes(alone) == plan.memory.total
    assert summary.host_bytes(four) == 4 * plan.memory.total
    waiting = replace(plan.setup, gpu=True, optimizer="paged_adamw_32bit")
    alone, four = (replace(one, setup=waiting) for one in (alone, four))
    each = memory.OVERHEAD + plan.memory.parts["optimizer"]
    assert summary.host_bytes(four) - summary.host_bytes(alone) == 3 * each
    assert "beside the GPU" in dict(summary.lines(alone))["Host"]
    assert "beside 4 GPUs" in dict(summary.lines(four))["Host"]


def test_a_merge_that_cannot_be_is_refused_before_training(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"merge\.enabled: prefix") as caught:
        planned(folder, adapter={"method": "prefix"}, merge={"enabled": True})
    assert caught.value.id == "recipe.conflict"
    assert caught.value.where is not None
    assert caught.value.where.line


def test_packing_goes_where_it_was_not_asked_for_and_is_an_error_where_it_was(
    folder: Path,
) -> None:
    plan = planned(folder, adapter={"method": "prefix"})
    assert plan.packing is False
    assert "run.packing-off" in [notice.id for notice in plan.notices]
    with pytest.raises(BadInput, match=r"data\.packing"):
        planned(folder, adapter={"method": "prefix"}, data={"packing": True})


def test_kernels_are_compiled_where_that_pays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(folder)
    assert not plan.compiled  # a short run
    assert planned(folder, train={"compile": True}).compiled
    flops = 4 * plan.shape.parameters * plan.steps.tokens
    monkeypatch.setattr("lorakit.training.plan.WORTH_COMPILING", flops)
    monkeypatch.setattr("lorakit.training.plan.which", lambda name: f"/usr/bin/{name}")
    assert not plan.compiled  # in fp32
    plan = replace(plan, shape=replace(plan.shape, dtype=torch.bfloat16))
    assert plan.compiled
    assert not planned(folder, train={"compile": False}).compiled
    other = replace(plan, base=replace(plan.base, config=tiny_config("gpt2")))
    assert not other.compiled
    assert passports.pinned(plan, ALONE)["compiled"] is True
    monkeypatch.setattr("lorakit.training.plan.which", lambda _: None)
    assert not plan.compiled
    assert replace(plan, setup=replace(plan.setup, gpu=True)).compiled


@pytest.mark.parametrize(
    ("family", "attention", "said"),
    [
        ("llama", "auto", ", kernels compiled"),
        ("llama", "sdpa", ", the loss compiled"),
        ("gpt2", "auto", ", the loss compiled"),
    ],
)
def test_what_is_compiled_is_said_as_it_is(
    tmp_path: Path, family: str, attention: str, said: str
) -> None:
    write_tiny_model(tmp_path / "model", family)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the capital of", "completion": "France"}\n')
    plan = planned(tmp_path, train={"compile": True}, model={"attention": attention})
    assert any(line.endswith(said) for _, line in summary.lines(plan))
    whole = replace(plan, shape=replace(plan.shape, way="whole"))
    assert any(line.endswith("compiled") for _, line in summary.lines(whole)) is plan.lean


def test_a_run_that_goes_on_keeps_its_automatic_choices(folder: Path) -> None:
    plan = planned(folder)
    assert plan.setup.recomputed == 0
    choices = {"recomputed_layers": 1, "micro_batch_limit": 40}
    begun = RunFolder(folder, True, {}, choices)
    assert as_begun(plan, begun) is plan
    resumed = replace(begun, resume=Checkpoint(folder, State(), {}))
    gone_on = as_begun(plan, resumed)
    assert (gone_on.setup.recomputed, gone_on.steps.limit) == (1, 40)
    assert gone_on.setup.tokens == gone_on.steps.micro_batch_tokens < plan.steps.micro_batch_tokens
    changed = {"recipe.train.gradient_checkpointing": ("auto", False)}
    assert as_begun(plan, replace(resumed, changed=changed)).setup.recomputed == 0


@pytest.mark.parametrize("window", [None, 8])
def test_flash_attention_is_planned_with_the_layers_own_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """It is transformers' own, which is given no documents: no twin runs, and norms are kept."""
    monkeypatch.setattr(base_models, "is_flash_attn_2_available", lambda: True)
    known_model("mistral", sliding_window=window).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the capital of", "completion": "France"}\n')
    plan = planned(tmp_path, model={"dtype": "bf16", "attention": "flash"}, adapter={"rank": 4})
    text = plan.base.config
    d, f, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
    kv = d // heads * text.num_key_value_heads
    kept = plan.shape.trace.layers[1].saved.slope
    assert kept == 16 * d + 8 * f + 4 * kv + 4 * heads + 14 * 4 + 8
    assert kept > planned(tmp_path, model={"dtype": "bf16"}).shape.trace.layers[1].saved.slope


def test_a_model_that_cannot_be_traced_is_planned_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = planned(folder)
    assert "plan.rough-estimate" not in [notice.id for notice in exact.notices]
    monkeypatch.setattr(plans, "trace", lambda *_, **__: torch.zeros(1, device="meta").item())
    rough = planned(folder)
    assert "plan.rough-estimate" in [notice.id for notice in rough.notices]
    assert rough.memory.total == pytest.approx(exact.memory.total, rel=0.5)
