"""Cores and memory of the machine, and what one process makes of a sum."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lorakit.host import available_bytes, highest_bytes, resident_bytes, usable_cores
from lorakit.runtime import Runtime, start

CPU = torch.device("cpu")


def test_one_process_is_the_sum_of_itself() -> None:
    alone = Runtime(CPU)
    tensor = torch.arange(3.0)
    assert torch.equal(alone.sum(tensor), torch.arange(3.0))
    assert alone.is_main
    assert alone.peak_bytes() >= alone.used_bytes() * 0.5 > 0
    assert 0 < alone.free_bytes() == pytest.approx(available_bytes(), rel=0.2)


def test_a_gpus_peak_can_be_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    Runtime(CPU).reset_peak()
    assert not asked
    Runtime(torch.device("cuda", 0)).reset_peak()
    assert asked == [torch.device("cuda", 0)]


class Slow(torch.Tensor):
    """A tensor whose products take a time of their own; the clock stands still otherwise."""

    now, seconds_a_flop = 0.0, 0.0

    def __matmul__(self, other: torch.Tensor) -> "Slow":
        type(self).now += 2 * len(self) * other.numel() * self.seconds_a_flop
        return torch.zeros(len(self), other.shape[1]).as_subclass(Slow)


@pytest.mark.parametrize("rate", [1e8, 5e9, 1e12])
def test_the_rate_of_products_is_found_within_a_second_whatever_it_is(
    monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    """fp16 was timed with a product that took a hundred seconds, and told nothing of a step."""
    ones = torch.ones
    monkeypatch.setattr(Slow, "now", 0.0)
    monkeypatch.setattr(Slow, "seconds_a_flop", 1 / rate)
    monkeypatch.setattr(torch, "ones", lambda *size, **_: ones(*size).as_subclass(Slow))
    monkeypatch.setattr("lorakit.runtime.time.perf_counter", lambda: Slow.now)
    assert Runtime(CPU).product_rate(torch.float16) == pytest.approx(rate)
    assert 0.025 < Slow.now < 1.5


def test_the_main_process_goes_first_whatever_becomes_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    monkeypatch.setattr(Runtime, "wait", lambda self: events.append(f"{self.process} waits"))
    with Runtime(CPU, 0, 2).main_first():
        events.append("0 works")
    with Runtime(CPU, 1, 2).main_first():
        events.append("1 works")
    with pytest.raises(KeyError), Runtime(CPU, 0, 2).main_first():
        raise KeyError
    assert events == ["0 works", "0 waits", "1 waits", "1 works", "0 waits"]


def test_dropout_is_a_function_of_seed_step_and_process() -> None:
    def drawn(seed: int, step: int, process: int = 0) -> torch.Tensor:
        Runtime(CPU, process, 2).seed_step(seed, step)
        return torch.rand(4)

    assert torch.equal(drawn(1, 5), drawn(1, 5))
    others = [drawn(1, 6), drawn(2, 5), drawn(1, 5, process=1)]
    assert not any(torch.equal(drawn(1, 5), other) for other in others)


class OnDevice(torch.Tensor):
    """A tensor whose values nobody may ask for: the host would wait for all work that is queued."""

    def tolist(self) -> list[float]:
        raise AssertionError("waits for the device")


def test_the_host_waits_for_a_copy_and_not_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.arange(3.0).as_subclass(OnDevice)
    assert Runtime(CPU).to_host(torch.arange(3.0)).read() == [0, 1, 2]
    asked: list[str] = []
    event = SimpleNamespace(synchronize=lambda: asked.append("waited"))
    stream = SimpleNamespace(record_event=lambda: asked.append("recorded") or event)

    def empty_like(tensor: torch.Tensor, *, device: str, pin_memory: bool) -> torch.Tensor:
        asked.append(f"{device}, pinned: {pin_memory}")
        return torch.empty(tensor.shape)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    copy = Runtime(torch.device("cuda")).to_host(numbers)
    assert asked == ["cpu, pinned: True", "recorded"]
    assert copy.read() == [0, 1, 2]
    assert asked[2:] == ["waited"]


@pytest.mark.parametrize(
    ("said", "taken"), [(None, ":4096:8"), (":0:0", ":4096:8"), (":16:8", ":16:8")]
)
def test_products_can_have_equal_bits_from_the_first_one_on(
    monkeypatch: pytest.MonkeyPatch, said: str | None, taken: str
) -> None:
    others = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    monkeypatch.setattr(os, "environ", others | ({"CUBLAS_WORKSPACE_CONFIG": said} if said else {}))
    start()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == taken


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_the_highest_mark_of_memory_is_not_the_parents() -> None:
    ours = torch.ones(400 << 20, dtype=torch.uint8)  # pages of its own, as a notebook may have
    code = "from lorakit.host import highest_bytes; print(highest_bytes())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert highest_bytes() >= resident_bytes() > ours.nbytes
    assert 0 < int(said.stdout) < 2 * ours.nbytes
    assert int(said.stdout) < highest_bytes() - ours.nbytes / 2
