"""Numbers that are none: NaN and infinities where they may come up, and clocks that jump."""

import math
import os
import random
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from lorakit.storage import lock
from lorakit.storage.tensors import TensorFile
from lorakit.training import checkpoint, gradients, loop, optim, progress
from lorakit.training import folder as folders
from tests.faults.forked import Child, run
from tests.faults.kills import duration
from tests.faults.subject import RECIPE, STEPS, Subject
from tests.faults.trials import Trial, chance

VALUES = (math.nan, math.inf, -math.inf, 1e38)
PLACES = ("loss", "gradient", "moment", "square", "weight", "result")
DTYPES = ("fp32", "bf16", "fp16")


@cache
def in_dtype(subject: Subject, dtype: str) -> Subject:
    """Return the subject whose base is held in a dtype."""
    if dtype == "fp32":
        return subject
    other = Subject.at(subject.own(dtype))
    recipe = RECIPE | {"model": {"path": "model", "dtype": dtype}}
    (other.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return other


def not_finite(subject: Subject, case: int, folder: Path) -> None:
    rng = chance("e1", case)
    place, value = PLACES[case % 6], VALUES[case // 6 % 4]
    dtype = DTYPES[case // 24 % 3]
    # There are no moments before the first step.
    step = rng.randint(2 if place in ("moment", "square") else 1, STEPS)
    subject, out = in_dtype(subject, dtype), folder / "run"

    def action() -> int:
        spoil(place, value, step, rng)
        return subject.train(out)()

    ended = run(action)
    what = f"{value} in a {place} of step {step} in {dtype}"
    assert ended.code in (0, 3), f"{what}: {ended}"
    for path in out.rglob("*.safetensors"):
        with TensorFile(path, "adapter") as file:
            for name in file.names:
                assert file.read(name).isfinite().all(), f"{what}: {name} in {path.name}"
    if ended.code == 0:
        # A large finite number is clipped, or moves what it is in; that is no fault. In fp16 a
        # gradient that overflows is expected: its step is left out, and the loss scale halved.
        expected = dtype == "fp16" and place == "gradient"
        assert math.isfinite(value) or expected, f"{what}: {ended}"
        return
    assert "error[run.not-finite]" in ended.said, f"{what}: {ended}"
    # What spoils the weights of its step is seen by the next step, or before it is saved.
    assert any(f"step {n}" in ended.said for n in (step, step + 1)), f"{what}: {ended}"
    if place in ("gradient", "loss"):
        assert f"step {step}:" in ended.said, f"{what}: {ended}"
        assert "rows " in ended.said, f"{what}: {ended}"
    assert not (out / "adapter").exists(), what
    if place == "weight" and not math.isfinite(value):
        assert "the adapter's" in ended.said, f"{what}: {ended}"
    found, _ = checkpoint.newest(out / "checkpoints")
    if found and math.isfinite(value) and found.state.step >= step:
        return  # it was saved as any other number, and spoils the run again
    subject.finish(out)


def spoil(place: str, value: float, step: int, rng: random.Random) -> None:
    """Put a value where it does not belong, once, in one step (from 1)."""
    real_rate, real_clip, real_loss = optim.set_rate, gradients.Gradients.clip, loop.token_loss
    real_read = loop.read_numbers
    optimizers: list[torch.optim.Optimizer] = []
    now = 0

    def put(place: str) -> None:
        """Spoil a weight, or one of its moments: the mean of its gradients or of their squares."""
        parameter = rng.choice([p for g in optimizers[-1].param_groups for p in g["params"]])
        state = optimizers[-1].state.get(parameter, {})
        moments = {"moment": "exp_avg", "square": "exp_avg_sq"}
        target = state[moments[place]] if place in moments else parameter
        with torch.no_grad():
            target.view(-1)[rng.randrange(target.numel())] = value

    def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
        nonlocal now
        now += 1
        optimizers.append(optimizer)
        if now == step and place in ("weight", "moment", "square"):
            put(place)
        return real_rate(optimizer, factor)

    def clip(self: gradients.Gradients, longest: float) -> torch.Tensor:
        if now == step and place == "gradient":
            self.flat[rng.randrange(len(self.flat))] = value
        return real_clip(self, longest)

    def token_loss(*arguments: Any) -> torch.Tensor:
        loss = real_loss(*arguments)
        return loss * value if now == step and place == "loss" else loss

    def read_numbers(*arguments: Any, **options: Any) -> bool:
        if now == step and place == "result":
            put("weight")
        return real_read(*arguments, **options)

    optim.set_rate, gradients.Gradients.clip, loop.token_loss = set_rate, clip, token_loss
    loop.read_numbers = read_numbers


def clocks(subject: Subject, case: int, folder: Path) -> None:
    rng = chance("i1", case)
    out = folder / "run"
    child = Child(jumping(subject.train(out), rng))
    try:
        ended = child.ended(patience=rng.uniform(0, 2 * duration(subject, merge=False)))
        assert ended.code == 0, ended
    except AssertionError as error:
        if "no end after" not in str(error):
            raise
    for path in [*out.rglob("*"), *([out] if out.exists() else [])]:
        stamp = rng.uniform(0, 4e9)
        os.utime(path, (stamp, stamp))
    ended = run(jumping(subject.train(out), rng))
    assert ended.code == 0, ended
    subject.check(out)
    for line in (out / "log.txt").read_text().splitlines():
        assert " -" not in line or "tokens/s" not in line, f"a negative rate: {line}"


def jumping(action: Callable[[], int], rng: random.Random) -> Callable[[], int]:
    """Let every look at the clock find another year; the monotonic clock goes on."""

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime(1970, 1, 2, tzinfo=tz) + timedelta(days=rng.uniform(0, 36500))

    def jump() -> int:
        for module in (lock, folders, progress):
            module.datetime = Jumping  # type: ignore[attr-defined]
        return action()

    return jump


TRIALS = [
    Trial(
        "e1",
        "NaN, Inf, 1e38 in a loss, gradient, moment, weight; in fp32, bf16, fp16",
        288,
        8,
        not_finite,
    ),
    Trial("i1", "clocks and file times that jump by decades", 30, 2, clocks),
]
