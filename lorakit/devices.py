"""What a device can compute, how tensors come to it and back, and what its driver says."""

import re
import subprocess
from dataclasses import dataclass

import torch

from lorakit.errors import EnvironmentLacks

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NATIVE_BF16 = (8, 0)  # from which compute capability on a GPU is fast at it


def best_dtype(device: torch.device) -> torch.dtype:
    """Choose what `model.dtype: auto` means: bf16 where the device is fast at it.

    Else fp16 on a GPU, fp32 on a CPU.
    """
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= NATIVE_BF16
        return torch.bfloat16 if native else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or has_amx()
    return torch.bfloat16 if fast else torch.float32


def has_amx() -> bool:
    """Tell whether the CPU multiplies tiles of matrices."""
    return torch.cpu._is_amx_tile_supported()


def has_fast_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether products in a dtype are fast on a device: fp16 is not on most CPUs."""
    if device.type != "cpu" or dtype is not torch.float16:
        return True
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_fp16_supported())


def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a GPU, None for a device that is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on a device; on CUDA through pinned memory, without waiting."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def has_flash_kernels() -> bool:
    """Tell whether torch was built with its flash attention for GPUs."""
    return torch.backends.cuda.is_flash_attention_available()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn `model.dtype` into a dtype this device can compute in.

    Raises:
        EnvironmentLacks: when an explicit dtype is not supported.
    """
    if name == "auto":
        return best_dtype(device)
    dtype = DTYPES[name]
    if dtype is torch.bfloat16 and device.type == "cuda" and best_dtype(device) is not dtype:
        major, minor = torch.cuda.get_device_capability(device)
        raise EnvironmentLacks(
            "env.dtype",
            f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}) has no native bf16",
            help="set model.dtype to fp16 or auto",
        )
    return dtype


@dataclass(frozen=True)
class Gpu:
    """What stands between torch and an NVIDIA GPU; what is not there is None or empty.

    `toolkit` is the CUDA version that torch was built with, `capabilities` what it has kernels for
    (`sm_90`), `devices` the capability of each GPU that torch sees, by name.
    """

    driver: str | None
    toolkit: str | None
    capabilities: tuple[str, ...]
    devices: dict[str, tuple[int, int]]


def gpu() -> Gpu:
    """Ask the driver and torch what they are; a driver is there although torch cannot use it."""
    devices = {
        torch.cuda.get_device_name(number): torch.cuda.get_device_capability(number)
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    }
    kernels = [name for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    return Gpu(_driver(), torch.version.cuda, tuple(kernels), devices)


def _driver() -> str | None:
    """Return the version of the NVIDIA driver: of its kernel module, else by its own tool (WSL)."""
    try:
        with open("/proc/driver/nvidia/version", encoding="ascii", errors="replace") as file:
            told = file.read()
    except OSError:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            told = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", told)
    return found[0] if found else None


@dataclass(frozen=True)
class HostCopy:
    """Numbers in host memory, there since the moment `copied`; None where they always were."""

    numbers: torch.Tensor
    copied: "torch.cuda.Event | None" = None

    def read(self) -> list[float]:
        """Return the numbers, a list; wait for their copy, and for nothing asked for later."""
        if self.copied is not None:
            self.copied.synchronize()
        found: list[float] = self.numbers.tolist()
        return found


class CopyQueue:
    """A second queue of a GPU's work, for copies that run beside the first."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return host memory for a tensor's values, which copies reach without waiting."""
        return torch.empty_like(tensor, device="cpu", pin_memory=True)

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        """Copy once all that was asked for before is done; return the moment when it is copied."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            moment: torch.cuda.Event = self._stream.record_event()
        return moment

    def wait_for(self, moment: torch.cuda.Event) -> None:
        """Let all that is asked for from now on wait for a moment; the host does not wait."""
        torch.cuda.current_stream(self._stream.device).wait_event(moment)
