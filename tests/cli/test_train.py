"""`lorakit train` in processes of its own: several of them, and signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.tiny import write_tiny_model

pytestmark = pytest.mark.slow  # each run starts Python and imports torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, rows of unequal length, and a recipe over both."""
    path = tmp_path_factory.mktemp("train")
    write_tiny_model(path / "model", "llama")
    with (path / "rows.jsonl").open("w") as file:
        for n in range(13):
            row = {"prompt": "ask " * (1 + n % 5), "completion": "answer " * (1 + n % 3)}
            file.write(json.dumps(row) + "\n")
    recipe = {
        "model": {"path": "model", "dtype": "fp32"},
        "adapter": {"rank": 4},
        "data": {"train": "rows.jsonl", "eval": 0.2, "max_length": 64},
        "train": {"epochs": 3, "batch_size": 6, "micro_batch_size": 2, "learning_rate": 0.01},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a run in a process group of its own, as a shell does."""
    return subprocess.Popen(
        [sys.executable, "-m", "lorakit", "train", "recipe.yaml", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def finish(run: subprocess.Popen[str], exit: int = 0) -> tuple[str, str]:
    out, err = run.communicate(timeout=120)
    assert run.returncode == exit, err
    return out, err


def adapter(folder: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(folder / run / "adapter" / "adapter_model.safetensors")


def losses(folder: Path, run: str) -> list[float]:
    rows = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row).get("loss") or json.loads(row)["eval_loss"] for row in rows]


def wait_for_steps(run: subprocess.Popen[str], out: Path) -> None:
    """Wait until a run is well under way."""
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.01)


def test_two_processes_train_what_one_does(folder: Path) -> None:
    """The sums over micro-batches are taken in another order: fp32 rounding, through nine steps."""
    both = [start(folder, "--out", "one"), start(folder, "--out", "two", "--nproc", "2", "--json")]
    (_, _), (out, _) = [finish(run) for run in both]
    assert json.loads(out)["steps"] == 6
    assert losses(folder, "two") == pytest.approx(losses(folder, "one"), rel=1e-5)
    one, two = adapter(folder, "one"), adapter(folder, "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    plan = json.loads((folder / "two" / "run.json").read_text())
    assert plan["processes"] == 2
    assert plan["status"] == "finished"


ONE_OF_TWO_IS_SMALL = """
import os
import torch
from lorakit.training import loop

whole = loop.token_loss

def limited(model, batch):
    if os.environ.get("RANK") == "1" and batch.input_ids.numel() > 30:
        raise torch.OutOfMemoryError("no memory left")
    return whole(model, batch)

loop.token_loss = limited

def row(value):
    return value
"""


def test_processes_halve_their_micro_batches_together(folder: Path) -> None:
    """As above; when one of them runs out of memory, all take the step again."""
    (folder / "small.py").write_text(ONE_OF_TWO_IS_SMALL)
    oom = ["--set", "train.on_oom=halve", "--set", "data.format=small:row", "--allow-local-code"]
    both = [
        start(folder, "--out", "plenty", *oom),
        start(folder, "--out", "halved", "--nproc", "2", *oom),
    ]
    (_, _), (_, err) = [finish(run) for run in both]
    assert losses(folder, "halved") == pytest.approx(losses(folder, "plenty"), rel=1e-5)
    noted = json.loads((folder / "halved" / "run.json").read_text())
    assert noted["micro_batch_limit"] == 1
    assert "memory ran out; again in micro-batches" in err


def test_a_run_that_fails_in_every_process_gives_its_own_exit_code(folder: Path) -> None:
    run = start(folder, "--out", "refused", "--nproc", "2", "--set", "data.max_length=8")
    _, err = finish(run, exit=2)
    assert err.count("error[data.") == 1
    assert not (folder / "refused").exists()


def test_sigterm_saves_and_exits_75_and_the_resumed_run_is_bit_equal(folder: Path) -> None:
    slow = ["--set", "train.epochs=60", "--set", "train.log_every=1"]
    finish(start(folder, "--out", "whole", *slow))
    cut = start(folder, "--out", "cut", *slow)
    wait_for_steps(cut, folder / "cut")
    cut.send_signal(signal.SIGTERM)
    _, err = finish(cut, exit=75)
    assert "error[run.interrupted]: stopped by SIGTERM after step" in err
    assert "--resume" in err
    assert json.loads((folder / "cut" / "run.json").read_text())["status"] == "interrupted"
    finish(start(folder, "--out", "cut", "--resume", *slow))
    whole, resumed = adapter(folder, "whole"), adapter(folder, "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len(json.loads((folder / "cut" / "run.json").read_text())["resumes"]) == 1


SLOW_STEP = """
import os
import time
from pathlib import Path
from lorakit.training import loop

def slow(model, batch):
    if os.environ.get("RANK", "0") == "0":
        Path("under way").touch()
    for _ in range(6000):
        time.sleep(0.01)

loop.token_loss = slow

def row(value):
    return value
"""


@pytest.mark.parametrize("more", [("--quiet",), ("--nproc", "2")])
def test_ctrl_c_is_answered_within_a_step_and_a_second_one_is_written_down(
    folder: Path, more: tuple[str, ...]
) -> None:
    """A step may take minutes, and nothing tells a run that ends one from a run that hangs."""
    (folder / "slow.py").write_text(SLOW_STEP)
    (folder / "under way").unlink(missing_ok=True)
    name = "-".join(["slow", *more])
    given = ["--out", name, "--set", "data.format=slow:row", "--allow-local-code"]
    given += [
        "--set",
        "data.eval=null",
        "--set",
        "train.micro_batch_size=6",
        "--set",
        "train.compile=false",
    ]
    run = start(folder, *given, *more)
    deadline = time.monotonic() + 60
    while not (folder / "under way").exists():
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)
    said = "finishing step 1, then saving; Ctrl-C again stops without saving\n"
    log = folder / name / "log.txt"
    while said not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)
    _, err = finish(run, exit=-signal.SIGINT)
    lost = "stopped by SIGINT without saving: nothing was saved; start again with: lorakit train"
    assert err.count(said) == (0 if "--quiet" in more else 1)
    assert err.count(lost) == 1
    assert " --overwrite" in err
    assert "Traceback" not in err
    facts = json.loads((folder / name / "run.json").read_text())
    assert (facts["status"], facts["ended_by"]) == ("interrupted", "a second SIGINT")


def test_ctrl_c_reaches_every_process_once(folder: Path) -> None:
    long = ["--nproc", "2", "--set", "train.epochs=2000", "--set", "train.log_every=1"]
    run = start(folder, "--out", "both", *long)
    wait_for_steps(run, folder / "both")
    os.killpg(run.pid, signal.SIGINT)  # what a terminal does
    _, err = finish(run, exit=75)
    assert "stopped by SIGINT after step" in err


def test_a_process_that_is_killed_ends_the_run_with_one_document(folder: Path) -> None:
    long = ["--nproc", "2", "--set", "train.epochs=2000", "--set", "train.log_every=1"]
    run = start(folder, "--out", "killed", *long, "--json")
    wait_for_steps(run, folder / "killed")
    holder = (folder / "killed" / ".lock").read_text().split()
    os.kill(int(holder[1]), signal.SIGKILL)
    out, err = finish(run, exit=3)
    assert "process 0 of 2 was ended by SIGKILL" in err
    assert json.loads(out)["error"]["id"] == "run.worker-died"


def test_processes_take_no_module_from_the_working_folder(folder: Path) -> None:
    (folder / "here").mkdir()
    (folder / "here" / "types.py").write_text("raise RuntimeError('the wrong types')")
    program = "from lorakit.processes import launch; print(launch(['--version'], 2))"
    ended = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=folder / "here",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.stdout.splitlines()[-1] == "0", ended.stderr


def test_more_processes_than_rows_in_a_step(folder: Path) -> None:
    few = ["--set", "train.batch_size=1", "--set", "train.micro_batch_size=1", "--max-steps", "2"]
    finish(start(folder, "--out", "few", "--nproc", "2", *few))
    finish(start(folder, "--out", "alone", *few))
    one, two = adapter(folder, "alone"), adapter(folder, "few")
    assert all(torch.equal(one[name], two[name]) for name in one)
