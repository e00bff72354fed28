"""What the shell is told that a word may become, in a process that never imports torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import sys
sys.argv = ["lorakit"]
from lorakit.cli.app import main
try:
    main()
finally:
    print(*{"torch", "transformers", "datasets"} & set(sys.modules), file=sys.stderr)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a recipe of the user's and a run."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").touch()
    adapter = tmp_path / "runs" / "first" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").touch()
    for name in ("recipe.yaml", "resolved.yaml"):
        (adapter.parent / name).touch()
    return tmp_path


def completed(folder: Path, line: str) -> list[str]:
    """Return what the last word of a line may become, as bash asks."""
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=folder,
        env=os.environ | asked | {"_LORAKIT_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "\n", "nothing heavy"
    return done.stdout.split()


@pytest.mark.slow  # a process each
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lorakit train quick", ["quickstart"]),
        ("lorakit plan r", ["recipes/mine.yaml", "runs/first"]),
        ("lorakit eval runs/", ["runs/first"]),
        ("lorakit data check recipes/", ["recipes/mine.yaml"]),
        ("lorakit train x.yaml -s train.l", ["train.learning_rate=", "train.log_every="]),
        ("lorakit plan x.yaml --set adapter.met", ["adapter.method="]),
        ("lorakit merge runs/", ["runs/first", "runs/first/adapter"]),
        ("lorakit generate runs/first/a", ["runs/first/adapter"]),
        ("lorakit recipes copy gsm", ["gsm8k-smollm2"]),
    ],
)
def test_what_a_word_may_become(folder: Path, line: str, words: list[str]) -> None:
    assert completed(folder, line) == words
