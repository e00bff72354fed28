"""Cores and memory of the machine, and what one process makes of a sum."""

import hashlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lorakit import runtime as runtimes
from lorakit.host import available_bytes, highest_bytes, resident_bytes, usable_cores
from lorakit.runtime import Runtime, start
from tests.faults.forked import Child

CPU = torch.device("cpu")


def test_one_process_is_the_sum_of_itself() -> None:
    alone = Runtime(CPU)
    tensor = torch.arange(3.0)
    assert torch.equal(alone.sum(tensor), torch.arange(3.0))
    assert alone.is_main
    assert alone.peak_bytes() >= alone.used_bytes() * 0.5 > 0
    assert 0 < alone.free_bytes() == pytest.approx(available_bytes(), rel=0.2)


def test_the_peak_can_be_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    Runtime(torch.device("cuda", 0)).reset_peak()
    assert asked == [torch.device("cuda", 0)]
    loading = 300 << 20

    def load() -> None:
        # Pages of its own, given back at once: freed tensors may stay with the process.
        with mmap.mmap(-1, loading) as pages:
            for at in range(0, loading, mmap.PAGESIZE):
                pages[at] = 1

    load()
    highest = Runtime(CPU).peak_bytes()
    Runtime(CPU).reset_peak()
    before = Runtime(CPU).peak_bytes()
    assert before < highest - loading / 2
    load()
    assert Runtime(CPU).peak_bytes() > before + loading / 2


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


def two(action: Callable[[Runtime], None]) -> list[Child]:
    """Start two processes that lose patience with each other after two seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def process(number: int) -> None:
        places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in places.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        runtimes.PATIENCE, runtimes.MOMENT = timedelta(seconds=2), 0.2
        action(start())

    return [Child(partial(process, number)) for number in range(2)]


@pytest.mark.slow  # one process has to lose patience
def test_the_others_wait_while_the_main_process_is_at_work() -> None:
    def action(runtime: Runtime) -> None:
        began = time.monotonic()
        with runtime.main_first():
            if runtime.is_main:
                time.sleep(5)
            sys.stdout.write(f"{time.monotonic() - began:.1f}")
        runtime.wait()

    ends = [child.ended(20) for child in two(action)]
    assert [ended.code for ended in ends] == [0, 0], ends[1]
    assert all(float(ended.said) > 4 for ended in ends), ends


@pytest.mark.slow  # one process has to lose patience
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_nobody_waits_for_a_main_process_that_is_gone(number: signal.Signals) -> None:
    def action(runtime: Runtime) -> None:
        with runtime.main_first():
            sys.stdout.write("at work")
            if runtime.is_main:
                time.sleep(1)  # the other waits by then
                os.kill(os.getpid(), number)

    main, other = two(action)
    try:
        ended = other.ended(10)
    finally:
        main.send(signal.SIGKILL)
        main.ended()
    assert "RunFailed: process 1 of 2" in ended.said, ended
    assert "at work" not in ended.said


@pytest.mark.slow  # starts two processes
def test_the_others_go_on_whatever_becomes_of_the_work_of_the_main_process() -> None:
    def action(runtime: Runtime) -> None:
        with runtime.main_first():
            if runtime.is_main:
                raise KeyError
            sys.stdout.write("found nothing")

    main, other = (child.ended(20) for child in two(action))
    assert "KeyError" in main.said, main
    assert (other.code, other.said) == (0, "found nothing")


@pytest.mark.slow  # starts two processes
def test_a_signal_that_all_have_had_ends_the_main_process_by_itself() -> None:
    """The others leave at once, while it is still at work."""

    def action(runtime: Runtime) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with runtime.main_first():
            if runtime.is_main:
                time.sleep(30)

    main, other = two(action)
    time.sleep(2)  # until they have met
    other.send(signal.SIGINT)
    assert "KeyboardInterrupt" in other.ended(10).said
    main.send(signal.SIGINT)
    ended = main.ended(10)
    assert ended.said.rstrip().endswith("KeyboardInterrupt"), ended


def test_processes_with_gpus_meet_on_the_host_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **_: asked.append(backend)
    )
    runtime = start()
    assert (runtime.device, asked) == (torch.device("cuda", 1), ["cpu:gloo,cuda:nccl"])
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda one: devices.append(one.device))
    runtime.wait()
    assert devices == [CPU]


@pytest.mark.slow  # starts two processes
def test_a_digest_is_worked_out_once_and_told_to_all(tmp_path: Path) -> None:
    def action(runtime: Runtime) -> None:
        def digest() -> str:
            (tmp_path / f"by {runtime.process}").touch()
            return hashlib.sha256(b"a base").hexdigest()

        sys.stdout.write(runtime.from_main(digest))

    ends = [child.ended(20) for child in two(action)]
    assert [ended.said for ended in ends] == 2 * [hashlib.sha256(b"a base").hexdigest()], ends
    assert [path.name for path in tmp_path.iterdir()] == ["by 0"]


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


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes on two machines, each with 1,000 bytes free on its device."""
    monkeypatch.setattr(Runtime, "free_bytes", lambda _: 1000)
    monkeypatch.setattr(Runtime, "sum", lambda self, free: free + (1000 - free) * (free == 0))
    assert Runtime(CPU).least_free_bytes() == 1000
    assert Runtime(CPU, 3, 4, local_processes=2).least_free_bytes() == 500
    monkeypatch.setattr(Runtime, "is_gpu", True)
    assert Runtime(CPU, 3, 4, local_processes=2).least_free_bytes() == 1000


def test_a_launcher_says_how_many_processes_are_on_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr("lorakit.runtime.usable_cores", lambda: 32)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in (("RANK", "9"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "16")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start().local_processes == 16, "else all of them are"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert start() == Runtime(CPU, 9, 16, local_processes=8)
    assert threads == [2, 4]


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


GIB = 1 << 30
ROWS = {
    2: ("0::{}", "", "memory.max", "memory.current", "inactive_file"),
    1: (
        "4:cpu,memory:{}\n0::/",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def group(root: Path, version: int, path: str, limit: str, used: int, cached: int) -> None:
    """Write what the kernel says of the memory of a control group."""
    _, top, *names, row = ROWS[version]
    folder = root / "sys/fs/cgroup" / top / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, str(used)), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"active_file {5 * GIB}\n{row} {cached}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return the root of a machine with 64 GiB to spare."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemFree: 1 kB\nMemAvailable: {64 << 20} kB\n")
    return tmp_path


@pytest.mark.parametrize("version", [1, 2])
def test_cached_files_are_memory_that_can_be_had(root: Path, version: int) -> None:
    row = ROWS[version][0]
    assert available_bytes(root) == 64 * GIB, "no control groups"
    (root / "proc/self/cgroup").write_text(row.format("/"))
    assert available_bytes(root) == 64 * GIB, "none that limits memory"
    group(root, version, "", str(16 * GIB), 15 * GIB, 14 * GIB)
    assert available_bytes(root) == 15 * GIB
    (root / "proc/self/cgroup").write_text(row.format("/docker/of-the-host"))
    assert available_bytes(root) == 15 * GIB, "a container's own group, by the host's name for it"
    group(root, version, "", str(16 * GIB), 17 * GIB, 0)
    assert available_bytes(root) == 0


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_upwards_limits_memory(root: Path, version: int) -> None:
    (root / "proc/self/cgroup").write_text(ROWS[version][0].format("/jobs/ours"))
    unlimited = {1: "9223372036854771712", 2: "max"}[version]
    group(root, version, "jobs/ours", unlimited, 2 * GIB, 0)
    assert available_bytes(root) == 64 * GIB
    group(root, version, "jobs", str(8 * GIB), 6 * GIB, 1 * GIB)
    assert available_bytes(root) == 3 * GIB
    group(root, version, "jobs/ours", str(4 * GIB), 2 * GIB, 0)
    assert available_bytes(root) == 2 * GIB
    group(root, version, "jobs/others", str(1 * GIB), 1 * GIB, 0)
    assert available_bytes(root) == 2 * GIB


def test_the_highest_mark_of_memory_is_not_the_parents() -> None:
    ours = torch.ones(400 << 20, dtype=torch.uint8)  # pages of its own, as a notebook may have
    code = "from lorakit.host import highest_bytes; print(highest_bytes())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    resident = resident_bytes()  # before the mark: to read it takes memory as well
    assert highest_bytes() >= resident > ours.nbytes
    assert 0 < int(said.stdout) < 2 * ours.nbytes
    assert int(said.stdout) < highest_bytes() - ours.nbytes / 2
