"""No check is an `assert`: under `python -O` everything is as without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.subject import Subject, copied, result

pytestmark = pytest.mark.slow  # starts two interpreters


def optimised(subject: Subject, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-O", "-m", "lorakit", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=subject.folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        timeout=120,
    )


def test_without_asserts_a_run_is_the_same_and_damage_is_found(tmp_path: Path) -> None:
    subject = Subject.at(tmp_path / "subject")
    out = tmp_path / "run"
    train = ("train", "recipe.yaml", "--out", str(out), "--set", "merge.enabled=true")
    done = optimised(subject, *train)
    assert done.returncode == 0, done.stderr
    assert result(out) == subject.wanted
    adapter = copied(out / "adapter", tmp_path / "damaged")
    content = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (adapter / "adapter_model.safetensors").write_bytes(content)
    refused = optimised(subject, "merge", str(adapter), "--out", str(tmp_path / "merged"))
    assert refused.returncode == 3, refused
    assert "error[adapter.damaged]" in refused.stderr, refused
    assert not (tmp_path / "merged").exists()
