"""What a run has of its machine: a device, processes, threads and memory.

The only place that asks which device is there or how many processes take part. One process is
the path of eight: a sum over one process is the value itself.
"""

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Event

import torch
import torch.distributed

from lorakit import environment
from lorakit.devices import CopyQueue, HostCopy
from lorakit.errors import BadInput, EnvironmentLacks, RunFailed
from lorakit.host import (
    available_bytes,
    highest_bytes,
    reset_highest,
    resident_bytes,
    usable_cores,
)

# Of <malloc.h>: sizes from which memory is mapped apart, and from which it is given back.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
# The workspaces with which cuBLAS gives equal bits. torch itself takes as much on a Hopper GPU and
# 24 MiB less on older ones.
WORKSPACES = (":4096:8", ":16:8")
# A collective that takes longer means that another process hangs.
PATIENCE = timedelta(minutes=30)
# How often a process that others wait for says that it is at work.
MOMENT = 1.0


@dataclass(frozen=True)
class Runtime:
    """One process of a run: its device, its number, how many there are and how many of them here.

    `local_processes` are those on this machine: they share its cores and the host's memory.
    """

    device: torch.device
    process: int = 0
    processes: int = 1
    local_processes: int = 1

    @property
    def is_main(self) -> bool:
        return self.process == 0

    @property
    def is_gpu(self) -> bool:
        """Tell whether a GPU computes; reading a number from it makes the host wait."""
        return self.device.type != "cpu"

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor over all processes, in place.

        Raises:
            RunFailed: when another process has died or hangs.
        """
        if self.processes > 1:
            try:
                torch.distributed.all_reduce(tensor)
            except RuntimeError as error:
                raise lost_another(self.process, self.processes, error) from error
        return tensor

    def anywhere(self, holds: bool) -> bool:
        """Tell whether something holds in any process; all of them ask.

        On the host, where one that has ended is noticed at once.
        """
        return bool(self.sum(torch.tensor([float(holds)])).item())

    def wait(self) -> None:
        """Wait until every process has come here."""
        self.anywhere(False)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process run the block before the others: they find what it has made.

        They wait as long as that takes: while it runs, the main process says that it is there.

        Raises:
            RunFailed: when another process has died or hangs.
        """
        if self.processes == 1:
            yield
        elif self.is_main:
            done = Event()
            with ThreadPoolExecutor(1) as beside:
                said = beside.submit(self._say_at_work, done)
                try:
                    yield
                except BaseException:
                    # It says more than that others have ended, of a signal that all have had too.
                    with suppress(RunFailed):
                        self._let_go(done, said)
                    raise
                self._let_go(done, said)
        else:
            while self.anywhere(False):
                pass
            yield

    def from_main(self, digest: Callable[[], str]) -> str:
        """Return a SHA-256, in hex, that the main process alone works out while the others wait.

        Raises:
            RunFailed: when another process has died or hangs.
        """
        found = ""
        with self.main_first():
            if self.is_main:
                found = digest()
        numbers = torch.tensor(list(bytes.fromhex(found)) or [0] * 32)
        return bytes(self.sum(numbers).tolist()).hex()

    def _say_at_work(self, done: Event) -> None:
        while not done.wait(MOMENT):
            self.anywhere(True)

    def _let_go(self, done: Event, said: Future[None]) -> None:
        """End what `_say_at_work` says, and let those go on that wait."""
        done.set()
        said.result()
        self.anywhere(False)

    def peak_bytes(self) -> int:
        """Return the most memory in use since `reset_peak`.

        Of a GPU's allocator, or resident on a CPU.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return highest_bytes()

    def reset_peak(self) -> None:
        """Let the peak be that of what comes now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_highest()

    def used_bytes(self) -> int:
        """Return the memory in use now: of the GPU's allocator, or resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return resident_bytes()

    def free_bytes(self) -> int:
        """Return the memory that can still be had on the device, which is the host on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return available_bytes()

    def least_free_bytes(self) -> int:
        """Return the memory that every process can have on its device, all at once."""
        free = torch.zeros(self.processes, dtype=torch.int64, device=self.device)
        sharing = 1 if self.is_gpu else self.local_processes
        free[self.process] = self.free_bytes() // sharing
        return int(self.sum(free).min())

    def release(self) -> None:
        """Give back what the allocator of a GPU keeps of freed memory."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def to_host(self, tensor: torch.Tensor) -> HostCopy:
        """Begin to copy a tensor to the host, behind all that was asked of the device before."""
        if self.device.type != "cuda":
            return HostCopy(tensor)
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        return HostCopy(host, torch.cuda.current_stream(self.device).record_event())

    def copy_queue(self) -> CopyQueue | None:
        """Return a second queue of work for copies, None where the device has none."""
        return CopyQueue(self.device) if self.device.type == "cuda" else None

    def product_rate(self, dtype: torch.dtype, seconds: float = 0.025, most: float = 1.0) -> float:
        """Time a layer's products forward and backward; return their FLOP/s.

        For `seconds` at least; those of a model's size where they end within `most` seconds. Of a
        dtype without fast kernels they take minutes, and a smaller one tells more of its layers.
        """
        rate = 0.0
        for rows, width in (
            ((64, 512), (256, 2048)) if self.device.type == "cpu" else ((4096, 4096),)
        ):
            flops = 4 * rows * width * width
            if rate and 5 * flops / rate > most:
                break
            x = torch.ones(rows, width, dtype=dtype, device=self.device)
            weight = torch.full((width, width), 1 / width, dtype=dtype, device=self.device)
            for times in (1, 4, 16, 64, 256):  # the first warms up
                began = time.perf_counter()
                for _ in range(times):
                    # The two differ: fp16 on a CPU is 6 times slower backward.
                    y = (x @ weight.T) @ weight
                y[0, 0].item()  # waits for a GPU
                spent = time.perf_counter() - began
                rate = flops * times / spent
                if (spent > seconds and times > 1) or 4 * spent > most:
                    break
        return rate

    def seed_step(self, seed: int, step: int) -> None:
        """Seed the generators for one step: dropout is a function of seed, step and process.

        So a resumed run needs no saved generator, and evaluation between steps moves nothing.
        """
        number = (seed * 1_000_003 + step * self.processes + self.process) % 2**63
        # Not `torch.manual_seed`: it formats the stack for each kind of device that is not there.
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def describe(self) -> str:
        """Name the device for people and for `run.json`."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def start() -> Runtime:
    """Choose the device, set the threads, and join the other processes where a launcher made some.

    Raises:
        BadInput: `usage`, when a launcher's variables make no sense.
        EnvironmentLacks: when there are more processes on this machine than GPUs.
    """
    processes = environment.count("WORLD_SIZE", 1, least=1)
    process, local = environment.count("RANK", 0), environment.count("LOCAL_RANK", 0)
    here = environment.count("LOCAL_WORLD_SIZE", processes, least=1)
    if process >= processes:
        message = f"this is process {process} of {processes} (the variables RANK and WORLD_SIZE)"
        raise BadInput("usage", message, help="start several processes with --nproc, or torchrun")
    if not environment.variable("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, usable_cores() // here))
    _keep_freed_memory()
    _take_equal_workspaces()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise EnvironmentLacks(
                "env.missing-device",
                f"process {process} wants GPU {local}, "
                f"this machine has {torch.cuda.device_count()}",
                help="lower --nproc",
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if processes > 1 and not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            torch.distributed.init_process_group(
                backend, rank=process, world_size=processes, timeout=PATIENCE
            )
        except RuntimeError as error:
            raise lost_another(process, processes, error) from error
        except ValueError as error:  # where the others are is not said
            message = f"WORLD_SIZE is {processes}, but {error}"
            help = "start several processes with --nproc, or torchrun"
            raise BadInput("usage", message, help=help) from error
    return Runtime(device, process, processes, here)


def lost_another(process: int, processes: int, error: RuntimeError) -> RunFailed:
    """Return the error of a process that waited for another in vain."""
    hangs = "timed out" in str(error).lower() or "timeout" in str(error).lower()
    what = f"waited {PATIENCE} for another one, which hangs" if hangs else "lost another one"
    return RunFailed(
        "run.worker-died",
        f"process {process} of {processes} {what}",
        help="the last checkpoint is intact: run the same command with --resume",
    )


def make_deterministic() -> None:
    """Ask every kernel for bit-equal results; kernels that have none raise."""
    _take_equal_workspaces()
    torch.use_deterministic_algorithms(True)


def _take_equal_workspaces() -> None:
    """Let cuBLAS give equal bits, unless a user's own setting does so already.

    torch reads it at the first product, such as that which `plan` times, and remembers: set after
    that, deterministic products are refused.
    """
    if environment.variable("CUBLAS_WORKSPACE_CONFIG") not in WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = WORKSPACES[0]


def _keep_freed_memory() -> None:
    """Let the C library keep what is freed, where it is glibc.

    Every step frees and takes the same tensors. Given back, their pages are cleared by the kernel
    each time anew (measured: gates and norms 4 to 5 times slower, a step of 135M about a tenth).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
