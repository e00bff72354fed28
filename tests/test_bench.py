"""The benchmark harness: its arms agree on loss and gradients, and it writes what it says."""

import doctest
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import fields
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

from lorakit.model import quantizer
from lorakit.model.quantized import Quantization
from lorakit.training import speed
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


def test_the_shares_that_plan_expects_are_those_of_the_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of lorakit as it is; the roof is that of products as torch multiplies them by itself."""
    compare = script("compare", monkeypatch)
    found: dict[float, list[float]] = {}
    for path in sorted(BENCH.glob("results/cpu-*.json")):
        results = json.loads(path.read_text())
        amx = "amx_bf16" in results["machine"]["flags"]
        for config in results["configs"]:
            if config["id"] not in ("C1", "C2", "C3", "C4", "A3", "A4"):
                continue
            for arm in config["arms"]:
                words = arm["name"].removesuffix(" (again)").split()
                if words[0] == "lorakit" and len(words) < 3 and arm.get("timed"):
                    dtype = arm["dtype"]
                    needs = compare.flops_a_token(results["sizes"], config)
                    rate = needs * arm["tokens_per_second"]["median"] / 1e9
                    key = speed.SHARE_AMX if amx else speed.SHARE_BF16
                    shares = found.setdefault(speed.SHARE_FP32 if dtype == "fp32" else key, [])
                    shares.append(rate / results["roof"][dtype]["gflops"])
    assert set(found) == {speed.SHARE_FP32, speed.SHARE_BF16, speed.SHARE_AMX}
    for expected, shares in found.items():
        assert len(shares) >= 7
        assert median(shares) == pytest.approx(expected, abs=0.02)


def test_what_4_bit_steps_cost_is_told_as_the_results_have_it() -> None:
    """The notice on a CPU and the README: A5 are steps of 64 tokens, A6 of 512."""
    results = json.loads((BENCH / "results/cpu-2026-11-27-epyc-2.json").read_text())
    ratios = {}
    for config in results["configs"]:
        if config["id"] in ("A5", "A6"):
            dense, nf4, again = (arm["tokens_per_second"]["median"] for arm in config["arms"])
            ratios[config["id"]] = [round(one / nf4, 1) for one in sorted((dense, again))]
    assert ratios["A5"][-1] == 1.0
    low, high = ratios["A6"]
    how, model = Quantization("nf4"), cast(PreTrainedModel, torch.nn.Linear(2, 2))
    (notice,) = quantizer.notices_of(model, how, torch.device("cpu"))
    readme = " ".join((ROOT / "README.md").read_text().split())
    for text in (notice.message, readme):
        assert f"{low} to {high} times as long at 512" in text


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


def test_a_table_of_some_configurations_takes_the_place_of_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = script("run", monkeypatch)
    for given, place in (([], BENCH / "README.md"), (["--only", "C2", "C3"], None)):
        monkeypatch.setattr(sys, "argv", ["run.py", *given])
        assert run.arguments().readme == place


def test_the_roof_of_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over products as tall as a micro-batch, many between two events, without a wait for each."""
    roof, configs = script("roof", monkeypatch), script("configs", monkeypatch)
    calls, waits = 0, []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = calls

        def synchronize(self) -> None:
            waits.append(self.at)

        def elapsed_time(self, later: "Event") -> float:
            return 2.0 * (later.at - self.at)  # milliseconds

    def call() -> None:
        nonlocal calls
        calls += 1

    monkeypatch.setattr(roof.torch.cuda, "Event", Event)
    assert roof.fastest_in_series(call, 0.1) == pytest.approx(0.002)
    assert waits[0] == 2
    assert waits[1] - waits[0] == roof.SERIES
    calls, waits = 0, []
    assert roof.fastest_in_series(call, 0.01) == pytest.approx(0.002)
    assert waits[1] - waits[0] == 5  # no longer than was asked for
    g1 = next(config for config in configs.GPU if config.id == "G1")
    assert g1.micro_batch_tokens == 4 * 2048
    sizes = {"hidden": 8, "mlp": 12, "keys": 4, "layers": 2, "vocabulary": 20}
    tall = [
        shape["shape"][0] for shape in roof.rate(sizes, torch.float32, "cpu", 1e-3, 6)["shapes"]
    ]
    assert tall == [6, 6, 6, 6, roof.HEAD_TOKENS]


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


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"error": "did not run: bitsandbytes is not installed", "arms": []}, "bitsandbytes"),
        ({"grid": "memory", "rows": [{"measured": 1}, {"error": "not run"}]}, "rows 2: not run"),
        ({"not_equal": [], "pytest": {"error": "pytest is not installed"}}, "pytest is not"),
        ({"pytest": {"code": 5, "passed": 0}}, "exit code 5"),
        ({"pytest": {"code": 0, "passed": 0}}, "0 passed"),
        ({"pytest": {"code": 1, "passed": 9}}, "exit code 1"),
        ({"not_equal": ["paged"], "pytest": {"code": 0, "passed": 9}}, "paged"),
        ({"configs": [{"arms": [{"name": "peer", "error": "no trl"}]}]}, "no trl"),
        ({"rows": [{"measured": 1}], "not_equal": [], "pytest": {"code": 0, "passed": 9}}, ""),
    ],
)
def test_a_section_of_which_nothing_ran_is_not_green(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: dict[str, Any], named: str
) -> None:
    gpu = script("gpu", monkeypatch)
    failed = gpu.failures(found)
    assert (len(failed) == 1 and named in failed[0]) if named else not failed
    monkeypatch.setattr(gpu, "TINY", True)
    monkeypatch.setattr(gpu, "SECTIONS", {"tests": lambda _: found})
    monkeypatch.setattr(gpu.report, "gpu", str)
    arguments = ["gpu.py", "tests", "--out", str(tmp_path), "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu.main() == bool(named)


def test_the_gpu_section_runs_every_test_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = script("gpu", monkeypatch)
    asked: list[str] = []

    def run(command: list[str], *_: Any, **__: Any) -> SimpleNamespace:
        asked.extend(command)
        return SimpleNamespace(
            code=0, out="..s\n2 passed, 1 skipped in 0.1s\n", error="", seconds=1
        )

    monkeypatch.setattr(gpu.machine, "run", run)
    assert gpu.pytest_gpu(Path(), 60.0)["passed"] == 2
    files = list((ROOT / "tests").rglob("test_*.py"))
    marked = {str(path) for path in files if "\n    pytest.mark.gpu," in path.read_text()}
    assert marked
    assert {name for name in asked if name.endswith(".py")} == marked


def test_the_memory_grid_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = script("gpu", monkeypatch)
    grid, ran = gpu.memory_grid, []

    def child(job: dict[str, Any]) -> dict[str, Any]:
        if not job.get("write"):
            ran.append(job["way"]["length"])
        return {} if job.get("write") else {"estimated": 2, "measured": 2, "device": "H100"}

    monkeypatch.setattr(grid, "child", child)
    monkeypatch.setattr(grid.time, "monotonic", iter([0, *range(100)]).__next__)
    options = SimpleNamespace(device="cpu", work=tmp_path, earlier=tmp_path, minutes=0.2)
    for calls in range(1, 4):
        found = gpu.memory(options)
        (tmp_path / "memory.json").write_text(json.dumps(found))
        good = [row["number"] for row in found["rows"] if "measured" in row]
        assert [row["number"] for row in found["rows"]] == list(range(1, 33))
        assert good == list(range(1, 1 + len(ran)))
        assert len(ran) > 8 * calls, "each call gets further"
        assert found["device"] == "H100"


def test_wheels_lie_over_what_the_interpreter_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a machine whose interpreter is itself one of an environment: what it has is seen."""
    wheels = script("wheels", monkeypatch)
    for name in ("pydantic", "extra_one"):
        info = f"{name}-99.0.dist-info"
        with zipfile.ZipFile(tmp_path / f"{name}-99.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "__version__ = '99.0'\n")
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    assert wheels.missing() == []
    with pytest.raises(FileNotFoundError, match="no wheel of datasets"):
        wheels.chosen(["datasets", "pydantic"], tmp_path)
    python = wheels.overlay(tmp_path / "own", wheels.chosen(["pydantic", "extra_one"], tmp_path))
    code = "import pydantic, extra_one, torch; print(pydantic.__version__, torch.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "99.0"


def test_the_script_for_a_gpu_can_be_read() -> None:
    """Its header, which it shows, names every wheel that may be needed."""
    script = ROOT / "scripts" / "gpu_check.sh"
    subprocess.run(["bash", "-n", script], check=True)
    text = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert text.returncode == 2
    wheels = (ROOT / "scripts" / "bench" / "wheels.py").read_text()
    for name in re.findall(r'^    "(\w+)",$', wheels, re.MULTILINE):
        assert re.search(name.replace("_", "[-_]"), text.stdout), name


def test_the_memory_grid_is_the_one_that_was_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases x lengths x micro-batches x recomputation x weights x targets, and how near is near."""
    grid = script("memory_grid", monkeypatch)
    assert grid.GOALS == {"cpu": 0.15, "cuda": 0.10}
    for device in grid.GOALS:
        rows = grid.grid(device)
        assert len(rows) >= 24
        assert len({shape.name for shape, _ in rows}) == 4
        for key in ("length", "rows", "recomputed", "quantization", "targets"):
            assert len({getattr(way, key) for _, way in rows}) > 1, key


def test_the_memory_table_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of the grid, misses too: a cell of the table in the README for each."""
    grid = script("memory_grid", monkeypatch)
    found = json.loads((BENCH / "results" / "memory-cpu.json").read_text())
    assert found["goal"] == grid.GOALS["cpu"]
    settled = [(n, shape.name, way) for n, (shape, way) in enumerate(grid.grid("cpu"), 1)]
    keys = [field.name for field in fields(grid.Way)]
    rows = [
        (row["number"], row["shape"], grid.Way(**{key: row[key] for key in keys}))
        for row in found["rows"]
    ]
    assert rows == settled
    ratios: dict[str, list[str]] = {}
    for row in found["rows"]:
        assert row["ratio"] == round(row["estimated"] / row["measured"], 3)
        ratios.setdefault(f"{row['shape']}, {row['dtype']}", []).append(f"{row['ratio']:.2f}")
    shown = [f"| {' | '.join([name, *cells])} |" for name, cells in ratios.items()]
    lines = (BENCH / "README.md").read_text().splitlines()
    first = lines.index(shown[0])
    assert lines[first : first + len(shown)] == shown
    good = sum(abs(row["ratio"] - 1) <= found["goal"] for row in found["rows"])
    assert f"**On a CPU all {good} rows keep within 15 %.**" in " ".join(lines)
    assert good == len(rows)
