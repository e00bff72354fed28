"""Do the same to lorakit and to transformers' Trainer: kill them, flip bits, spoil a gradient.

    python scripts/bench/faults.py [--cases 100] [--out FILE]

Both train the same kind of adapter (rank 4, dropout 0.1) on the same tiny Llama, four steps, a
checkpoint every two. A case fails when the run cannot go on by the same command, when it ends with
other bits than an uninterrupted run, or when damage goes unseen. The Trainer's script is the usual
one: it resumes from `get_last_checkpoint`. What is done to lorakit is what `tests/faults` does.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.conftest import pytest_configure  # noqa: E402

pytest_configure()  # before torch is imported, which reads the environment

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402
from transformers.utils import logging  # noqa: E402

from tests.faults import syscalls  # noqa: E402
from tests.faults.damage import damage  # noqa: E402
from tests.faults.forked import Child, run  # noqa: E402
from tests.faults.subject import Subject  # noqa: E402
from tests.faults.syscalls import Call  # noqa: E402
from tests.faults.trials import all_trials  # noqa: E402
from tests.tiny import tiny_model  # noqa: E402

STEPS = 4
TENSORS = "adapter_model.safetensors"
SEEN = "the damage was said"

Case = Callable[[int, Path], str | None]  # how it failed, if it did


class Rows(Dataset):  # type: ignore[type-arg]
    """Rows of tokens that are made up, the same each time."""

    def __len__(self) -> int:
        """Return their number."""
        return 24

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """Return one row, all of it trained."""
        ids = torch.randint(3, 320, (16,), generator=torch.Generator().manual_seed(row))
        return {"input_ids": ids, "labels": ids.clone()}


@dataclass(frozen=True)
class Peer:
    """A script around transformers' Trainer, as its documentation shows it."""

    whole: Path

    def train(self, out: Path, spoil: Callable[[Trainer], None] | None = None) -> Callable[[], int]:
        """Return the action: train, or go on from the last checkpoint, and save the adapter."""

        def action() -> int:
            logging.disable_progress_bar()
            torch.manual_seed(0)
            config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"])
            model = get_peft_model(tiny_model("llama"), config)
            settings = TrainingArguments(
                output_dir=str(out / "run"),
                max_steps=STEPS,
                save_steps=2,
                save_total_limit=2,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=3,
                learning_rate=1e-2,
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=0,
            )
            trainer = Trainer(model=model, args=settings, train_dataset=Rows())
            if spoil:
                spoil(trainer)
            last = get_last_checkpoint(str(out / "run")) if (out / "run").is_dir() else None
            trainer.train(resume_from_checkpoint=last)
            trainer.save_model(str(out / "adapter"))
            return 0

        return action

    def finish(self, out: Path) -> str | None:
        """Run the same command again; return what is wrong with its end."""
        ended = run(self.train(out))
        if ended.code:
            return f"cannot go on: {ended.said.strip().splitlines()[-1][:160]}"
        return None if digest(out) == digest(self.whole) else "other bits"


def digest(out: Path) -> str:
    """Return the digest of the adapter that a run has saved."""
    return sha256((out / "adapter" / TENSORS).read_bytes()).hexdigest()


def kills_of_a_save(peer: Peer, place: Path) -> tuple[int, Case]:
    """Return SIGKILL before each call with which the Trainer changes a checkpoint."""
    below = place / "listed"
    below.mkdir()
    calls: list[Call] = [
        call
        for call in syscalls.listed(peer.train(below), below, place / "trace")
        if "checkpoint-" in call.paths[0]
    ]

    def case(number: int, folder: Path) -> str | None:
        ended = syscalls.killed_before(calls[number], peer.train(folder))
        return peer.finish(folder) if ended.code == -signal.SIGKILL else None

    return len(calls), case


def kills_at_random(peer: Peer, seconds: float) -> Case:
    """Return SIGKILL at some moment."""

    def case(number: int, folder: Path) -> str | None:
        child = Child(peer.train(folder))
        time.sleep(random.Random(number).uniform(0, seconds))
        child.send(signal.SIGKILL)
        child.ended()
        return peer.finish(folder)

    return case


def flips(peer: Peer) -> Case:
    """Return one flipped bit somewhere in the last checkpoint but one, from which a run goes on."""

    def case(number: int, folder: Path) -> str | None:
        source = peer.whole / "run" / "checkpoint-2"
        target = Path(shutil.copytree(source, folder / "run" / "checkpoint-2"))
        what = damage(target, random.Random(number), flips_only=True)
        wrong = peer.finish(folder)
        return None if wrong is None or wrong.startswith("cannot") else f"{what}: {wrong}, unseen"

    return case


def spoilt_gradients(peer: Peer) -> Case:
    """Return a NaN in one gradient of one step."""

    def case(number: int, folder: Path) -> str | None:
        step = 1 + number % (STEPS - 1)

        class Spoil(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **rest):  # type: ignore[no-untyped-def]
                if state.global_step == step:
                    next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = math.nan

        ended = run(peer.train(folder, lambda trainer: trainer.add_callback(Spoil())))
        if ended.code:
            return None
        saved = load_file(folder / "adapter" / TENSORS)
        bad = sum(not tensor.isfinite().all() for tensor in saved.values())
        return f"exit 0, {bad} of {len(saved)} tensors are NaN" if bad else None

    return case


def tried(case: Case, count: int, of: int, place: Path) -> dict[str, object]:
    """Carry out some cases, spread over all of them; sum up how they failed."""
    failures: dict[str, int] = {}
    count = min(count, of)
    for number in range(count):
        folder = place / "case"
        folder.mkdir()
        try:
            wrong = case(number * of // count, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if wrong:
            kind = wrong.split(": ")[-1] if "unseen" in wrong else re.sub(r"/\S*/", "", wrong)
            kind = re.sub(r"checkpoint-\d+", "checkpoint-N", kind)
            failures[kind] = failures.get(kind, 0) + 1
    return {"cases": count, "failures": sum(failures.values()), "how": failures}


def of_lorakit(id: str, subject: Subject) -> tuple[int, Case]:
    """Return a trial of `tests/faults` as a case."""
    trial = next(trial for trial in all_trials() if trial.id == id)

    def case(number: int, folder: Path) -> str | None:
        try:
            trial.body(subject, number, folder)
        except Exception as error:
            return str(error)[:160]
        return None

    return trial.count(subject), case


def main() -> None:
    """Try both and write a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100, help="of each trial, at most")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="faults-", dir="/dev/shm"))
    try:
        subject = Subject.at(place / "subject")
        peer = Peer(place / "whole")
        began = time.monotonic()
        ended = run(peer.train(peer.whole))
        if ended.code:
            sys.exit(str(ended))
        seconds = time.monotonic() - began
        rows = {
            "a1": ("SIGKILL before each call of a save", kills_of_a_save(peer, place)),
            "a3": ("SIGKILL at random times", (1000, kills_at_random(peer, seconds))),
            "d1": ("one flipped bit in a checkpoint", (10_000, flips(peer))),
            "e1": ("NaN in a gradient", (12, spoilt_gradients(peer))),
        }
        found = {}
        for id, (what, (of, case)) in rows.items():
            theirs = tried(case, options.cases, of, place)
            all_of_ours, our_case = of_lorakit(id, subject)
            ours = tried(our_case, options.cases, all_of_ours, place)
            found[id] = {"what": what, "lorakit": ours, "trainer": theirs}
            print(json.dumps({id: found[id]}), flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    if options.out:
        options.out.write_text(json.dumps({"versions": versions, "trials": found}, indent=2) + "\n")
    print(
        "| trial | lorakit: cases, failures | Trainer: cases, failures | how the Trainer failed |"
    )
    print("|---|---|---|---|")
    for row in found.values():
        ours, theirs = row["lorakit"], row["trainer"]
        how = "; ".join(f"{count} x {kind}" for kind, count in theirs["how"].items())
        print(
            f"| {row['what']} | {ours['cases']}, {ours['failures']} "
            f"| {theirs['cases']}, {theirs['failures']} | {how} |"
        )


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main()
