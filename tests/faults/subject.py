"""What the faults happen to: a tiny model and four steps, planned once and carried out often."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from transformers.utils.logging import disable_progress_bar

from lorakit import adapters
from lorakit.cli import train_run
from lorakit.cli.app import main
from lorakit.recipe.reader import read
from lorakit.runtime import start
from lorakit.storage.publish import is_aside, publish_file
from lorakit.training.plan import Permissions, Plan, make
from tests.faults.forked import run
from tests.tiny import write_tiny_model

STEPS = 4
RECIPE = {
    "model": {"path": "model", "dtype": "fp32"},
    "adapter": {"rank": 4, "dropout": 0.1, "target_modules": ["q_proj"], "layers": [0]},
    "data": {"train": "rows.jsonl", "eval": 0.2, "max_length": 64},
    "train": {
        "epochs": 2,
        "batch_size": 6,
        "micro_batch_size": 2,
        "learning_rate": 0.01,
        "eval_every": 3,
        "save_every": 2,
        "log_every": 1,
    },
}


MERGED = ("--set", "merge.enabled=true")


@dataclass(frozen=True)
class Subject:
    """A folder with a model, rows and a recipe; `lorakit` is run in it without a new Python."""

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> "Subject":
        """Write the model, the rows and the recipe; other accounts may read them."""
        disable_progress_bar()  # the library redraws it by the clock: no two runs would be alike
        write_tiny_model(folder / "model", "llama")
        with (folder / "rows.jsonl").open("w") as file:
            for n in range(13):
                row = {"prompt": "ask " * (1 + n % 5), "completion": "answer " * (1 + n % 3)}
                file.write(json.dumps(row) + "\n")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
        for path in (folder.parent, folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        return cls(folder)

    @cached_property
    def plan(self) -> Plan:
        """The plan of the recipe, made before the children are forked."""
        recipe = read(self.folder / "recipe.yaml", adapters.settings_for, [], environ={})
        plan = make(recipe, start(), Permissions(offline=True))
        plan.base.fingerprint  # noqa: B018  # cached for the children
        return plan

    @cached_property
    def whole(self) -> Path:
        """A run that nothing happened to."""
        out, imported = self.folder / "whole", self.folder / "imported"

        def action() -> int:
            code = self.train(out, merge=True)()
            imported.write_text("\n".join(sys.modules))
            return code

        ended = run(action)
        assert ended.code == 0, ended
        # What the child had to import, every other one has: so all make the same calls.
        for name in imported.read_text().splitlines():
            with suppress(ImportError):
                import_module(name)
        return out

    @cached_property
    def wanted(self) -> dict[str, str]:
        """The digests of what an uninterrupted run leaves behind."""
        return result(self.whole)

    def own(self, name: str) -> Path:
        """Return the place of something that each process makes once and keeps."""
        return self.folder / f"{name}-{os.getpid()}"

    def train(
        self, out: Path, mode: str = "--resume-or-start", *more: str, merge: bool = False
    ) -> Callable[[], int]:
        """Return the action `lorakit train`, by the plan that was made before."""
        plan = self.plan

        def action() -> int:
            train_run.make = lambda recipe, *_: replace(plan, recipe=recipe)
            # The text of a card comes out of another process, which takes longer than the run.
            train_run.write_card = lambda at: publish_file(at / "README.md", b"card", replace=True)
            return self.lorakit(
                "train", "recipe.yaml", "--out", str(out), mode, *more, *(MERGED if merge else ())
            )

        return action

    def lorakit(self, *arguments: str) -> int:
        """Run the command line in this process; return its exit code."""
        os.chdir(self.folder)
        sys.argv = ["lorakit", *arguments]
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    def finish(self, out: Path, *, merge: bool = False) -> None:
        """Run the same command again: nothing may need repair, and the result is the whole's."""
        ended = run(self.train(out, merge=merge))
        assert ended.code == 0, ended
        self.check(out, merge=merge)

    def check(self, out: Path, *, merge: bool = False) -> None:
        """Check that a run is bit-equal to an uninterrupted one and left nothing beside."""
        wanted = {k: v for k, v in self.wanted.items() if merge or not k.startswith("merged")}
        assert result(out) == wanted, "other bits than those of an uninterrupted run"
        assert json.loads((out / "run.json").read_text())["status"] == "finished"
        left = [path.name for path in out.rglob(".*") if is_aside(path.name)]
        assert not left, f"left behind: {left}"
        steps = [row["step"] for row in rows(out) if "loss" in row and not row.get("superseded")]
        assert steps == list(range(1, STEPS + 1)), f"steps in metrics.jsonl: {steps}"


def result(out: Path) -> dict[str, str]:
    """Return the digests of a run's tensors: the adapter and the merged model."""
    found = sorted([*out.glob("adapter/*.safetensors"), *out.glob("merged/*.safetensors")])
    return {str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest() for path in found}


def rows(out: Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl`; a torn last one does not count."""
    found = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def tree(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder, and the mark of each folder."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def copied(source: Path, target: Path) -> Path:
    """Copy a folder, links as links."""
    return Path(shutil.copytree(source, target, symlinks=True))
