"""`lorakit doctor`: what it finds amiss, and what it never shows."""

import importlib.metadata
import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from lorakit.cli import conflicts, doctor
from lorakit.cli.app import app
from lorakit.devices import Gpu
from lorakit.model.hub import has_token

runner = CliRunner()
TOKEN = "hf_" + "b" * 30
NO_GPU = Gpu(None, "13.0", ("sm_90",), {})


def test_a_machine_that_is_whole_has_no_problems() -> None:
    ended = runner.invoke(app, ["doctor", "--json"])
    assert ended.exit_code == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert document["facts"]["torch"] == importlib.metadata.version("torch")
    assert document["facts"]["conflicts"] == "none known"
    assert document["facts"]["token cache"].endswith("data sets")
    assert document["problems"] == []


def test_it_fits_into_an_issue() -> None:
    lines = runner.invoke(app, ["doctor"]).stdout.splitlines()
    assert {line.split()[0] for line in lines} >= {"lorakit", "driver", "CUDA", "conflicts"}
    assert all(line == line.rstrip() and len(line) < 100 for line in lines)


def test_the_line_that_installs_an_extra_is_the_same_for_people_and_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"no_such_module": "eval"})
    line = 'pip install "lorakit[eval]"'
    assert line in runner.invoke(app, ["doctor"]).stdout
    extras = json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)["facts"]["extras"]
    assert extras == {"no_such_module": line}


def test_a_conflict_is_a_problem_and_strict_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {**conflicts.installed(), "peft": "0.17.1", "transformers": "5.0.0"}
    monkeypatch.setattr(conflicts, "installed", lambda: versions)
    shown = runner.invoke(app, ["doctor"])
    assert shown.exit_code == 0
    (told,) = [line for line in shown.stdout.splitlines() if "HybridCache" in line]
    assert told.startswith("problem")
    assert "peft 0.17.1 and transformers 5.0.0" in told
    ended = runner.invoke(app, ["doctor", "--strict"])
    assert ended.exit_code == 1
    assert "HybridCache" in ended.stderr


@pytest.mark.parametrize("pair", conflicts.PAIRS, ids=lambda pair: str(pair.first))
def test_every_pair_has_its_reason_and_its_source(
    pair: conflicts.Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: None)
    assert pair.reason
    assert pair.source.startswith("https://github.com/")
    limit, other = (text.split()[1] for text in (pair.versions, pair.others))
    inside = {"<": "0.0.1", ">=": limit}[pair.versions.split()[0]]
    outside = {"<": limit, ">=": "0.0.1"}[pair.versions.split()[0]]
    others = {">=": other, "<": "5.0.0"}[pair.others.split()[0]]
    both = {pair.first: inside, pair.second: others}
    assert [pair.source in told for told in conflicts.between_packages(both, ())] == [True]
    assert not list(conflicts.between_packages({**both, pair.first: outside}, ()))


def test_a_requirement_that_was_broken_later_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {
        "torchvision": ["torch==2.13.0", "numpy<3", "scipy; extra == 'scipy'", "not a name!"],
        "jupyter": ["numpy<2"],
    }
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked.get(name))
    versions = {"torchvision": "0.28.0", "jupyter": "1", "torch": "2.12.1", "numpy": "2.4.6"}
    assert list(conflicts.between_packages(versions, ["torch"])) == [
        "torchvision 0.28.0 asks for torch==2.13.0, 2.12.1 is installed"
    ]
    # A build of the version that was asked for is that version.
    assert not list(conflicts.between_packages({**versions, "torch": "2.13.0+cu130"}, ["torch"]))


@pytest.mark.parametrize(
    ("gpu", "told"),
    [
        (NO_GPU, ()),
        (Gpu("580.82.07", "13.0", ("sm_90",), {}), ()),
        (Gpu("550.54.14", "13.0", ("sm_90",), {}), ("CUDA 13.0", "driver 580", "550.54.14")),
        (Gpu("470.82.01", "12.8", ("sm_90",), {}), ("driver 525",)),
        (Gpu("550.54.14", "13.0", ("sm_90",), {"H100": (9, 0)}), ()),  # forward compatibility
        (Gpu("550.54.14", None, (), {}), ("without CUDA", "pytorch.org")),
        (Gpu("580.82.07", "13.0", ("sm_75", "sm_100f"), {"V100": (7, 0)}), ()),
        (Gpu("580.82.07", "13.0", ("sm_80", "sm_90a"), {"V100": (7, 0)}), ("V100 (sm_70)",)),
        (Gpu("580.82.07", "13.0", ("sm_80", "sm_120a"), {"B": (12, 1)}), ()),
    ],
)
def test_torch_and_the_gpu(gpu: Gpu, told: tuple[str, ...]) -> None:
    found = list(conflicts.with_gpu(gpu, "2.13.0"))
    assert len(found) == bool(told)
    assert all(part in found[0] for part in told)


def test_a_token_is_found_in_its_file_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert not has_token()
    (tmp_path / "token").write_text("\n")
    assert not has_token()
    (tmp_path / "token").write_text(TOKEN)
    ended = runner.invoke(app, ["doctor", "--debug"])
    assert "hub token     found\n" in ended.stdout
    assert TOKEN not in ended.stdout + ended.stderr
    (tmp_path / "token").unlink()
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
    assert has_token()


def test_four_bit_is_asked_of_a_real_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_four_bit", lambda _: "fails: no backend")
    document = json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)
    assert document["problems"] == ["4-bit: fails: no backend"]
