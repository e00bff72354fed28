"""The benchmark harness: its arms agree on loss and gradients, and it writes what it says."""

import doctest
import importlib.util
import json
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from tests.source_tree import ROOT
from tests.tiny import write_tiny_model

BENCH = ROOT / "scripts" / "bench"
MARKS = "<!-- results: written by the harness -->", "<!-- end of results -->"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import one of the harness's scripts; they find each other in their own folder."""
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Measure the equality configuration on a tiny model; return the results and the README."""
    folder = tmp_path_factory.mktemp("bench")
    write_tiny_model(folder / "model")
    (folder / "README.md").write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    options = {
        "--only": "C4",
        "--shrink": "8",
        "--threads": "1",
        "--roof": "0.001",
        "--model": folder / "model",
        "--work": folder / "work",
        "--peers": sys.executable,
        "--out": folder / "out.json",
        "--readme": folder / "README.md",
    }
    command = [sys.executable, str(BENCH / "run.py"), "--busy"]
    command += [str(part) for option in options.items() for part in option]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text()), (folder / "README.md").read_text()


@pytest.mark.slow  # three processes import torch, one of them PEFT
def test_lorakit_and_peft_agree_on_losses_and_gradients(
    harness: tuple[dict[str, Any], str],
) -> None:
    ours, theirs = harness[0]["configs"][0]["arms"]
    assert len(ours["losses"]) == len(theirs["losses"]) == 20
    assert len(set(ours["losses"])) == 20, "each step trains on other rows"
    assert ours["loss"]["relative"] < 1e-5
    assert ours["gradients"]["tensors"] == 2 * 2 * 7
    assert ours["gradients"]["relative"] < 1e-5
    assert ours["equal"]
    assert theirs["equal"]


@pytest.mark.slow  # as above
def test_the_results_hold_what_the_table_shows(harness: tuple[dict[str, Any], str]) -> None:
    results, readme = harness
    assert results["roof"]["fp32"]["gflops"] > 0
    for arm in results["configs"][0]["arms"]:
        assert len(arm["seconds"]) == arm["warm"] + arm["timed"]
        assert arm["memory"]["peak"] >= arm["loaded"]["resident"] > 1 << 20
        assert arm["versions"]["torch"]
        assert arm["name"] in readme
    assert readme.startswith(f"before\n{MARKS[0]}\n")
    assert readme.endswith(f"{MARKS[1]}\nafter\n")
    assert "old" not in readme
    assert not re.search(r"/tmp|/root|/home", json.dumps(results["configs"]))


def test_an_arm_with_other_losses_is_disqualified(monkeypatch: pytest.MonkeyPatch) -> None:
    compare, report = script("compare", monkeypatch), script("report", monkeypatch)
    arms = [
        {"name": "peer", "dtype": "fp32", "losses": [2.0, 1.0]},
        {"name": "same", "dtype": "fp32", "losses": [2.0, 1.00005]},
        {"name": "off", "dtype": "fp32", "losses": [2.0, 1.001]},
        {"name": "peer bf16", "dtype": "bf16", "losses": [2.0, 1.0]},
        {"name": "bf16", "dtype": "bf16", "losses": [2.004, 0.996]},
        {"name": "bf16 off", "dtype": "bf16", "losses": [2.0, 1.03]},
        {"name": "failed", "dtype": "fp32", "error": "no such package"},
    ]
    compare.losses(arms, "peer")
    assert [arm.get("equal") for arm in arms] == [True, True, False, True, True, False, None]
    goal = script("configs", monkeypatch).Goal("C1", "off", "peer", 1.0, 1.0)
    row = report._goal(goal, {arm["name"]: arm for arm in arms}, "fp32")
    assert "disqualified" in row


def test_the_floor_is_four_flops_a_weight_and_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = script("compare", monkeypatch)
    sizes = {"body": 1000, "head": 100, "attention": 10}
    rows = [30, 10]
    counts = {"tokens": 40, "trained": 20, "squares": sum(n * n for n in rows)}
    attention = sum(3.5 * 2 * n * n * sizes["attention"] for n in rows)
    expected = 40 * 4 * 1000 + 20 * 4 * 100 + attention
    assert compare.flops_a_token(sizes, counts) * 40 == pytest.approx(expected)


def test_the_configurations_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = script("configs", monkeypatch)
    assert doctest.testmod(configs).failed == 0
    named = {config.id: {arm.name for arm in config.arms} for config in configs.CPU + configs.GPU}
    for config, arms in configs.GPU_PEERS.items():
        named[config] |= {arm.name for arm in arms}
    for goal in (*configs.CPU_GOALS, *configs.GPU_GOALS):
        assert goal.theirs in named[goal.config]
        assert goal.ours == "best" or goal.ours in named[goal.config]
    lengths = configs.INSTRUCTIONS
    assert sum(lengths[7:9]) / 2 == pytest.approx(90, rel=0.02)
    assert max(lengths) <= 512


def test_runs_on_4_bits_agree_to_the_bit_or_within_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = script("quantised", monkeypatch)
    names = {arm.name for arm in quantised.ARMS}
    assert {arm.like for arm in quantised.ARMS if arm.like} < names
    whole = {"name": "whole", "losses": [2.0, 1.0], "adapter_sha256": "a"}
    near = {"losses": [2.0, 1.0005], "adapter_sha256": "b"}
    assert quantised.agreement(whole, whole, 0.0)["equal"]
    assert not quantised.agreement(near, whole, 0.0)["equal"]
    assert quantised.agreement(near, whole, 1e-3)["equal"]
    assert not quantised.agreement(near, whole, 1e-4)["equal"]
    row = {"name": "near", "tokens_per_second": 12, "peak": 3 << 29, **near}
    lost = {"name": "lost", "error": "Traceback\nwhat | went wrong"}
    shown = quantised.table({"arms": [row, lost], "merge": {"original": {}}}).splitlines()
    assert shown[2].startswith("| near | 12 | 1.50 | 1.0005 |")
    assert shown[3].endswith("| what / went wrong |")
