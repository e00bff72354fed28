"""Streams that are closed, full, or read by nobody, in real processes of quick commands."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = {"list": (["recipes", "list"], 0), "bad": (["plan", "absent.yaml"], 2)}


def run(redirected: str, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run lorakit with its streams as a shell redirects them."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirected}', "sh", sys.executable, "-m", "lorakit", *arguments],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["recipes", "list"], ["--help"], ["--version"]])
def test_a_result_that_cannot_be_written_is_a_failure(arguments: list[str], tmp_path: Path) -> None:
    ended = run(">/dev/full", arguments, tmp_path)
    assert ended.returncode == 3
    assert ended.stderr.startswith("error[storage.io]: the result could not be written: No space")
    assert ended.stderr.count("error[") == 1
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("redirected", [">&-", "2>&-", "2>/dev/full", ">&- 2>&-", "<&-"])
def test_whether_anybody_hears_it_changes_no_exit_code(
    redirected: str, command: str, tmp_path: Path
) -> None:
    arguments, code = COMMANDS[command]
    ended = run(redirected, arguments, tmp_path)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr


def test_a_reader_that_has_gone_has_read_all_it_wanted(tmp_path: Path) -> None:
    ended = run("| true", ["recipes", "schema"], tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
