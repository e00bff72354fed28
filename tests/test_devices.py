"""Dtypes that a device computes in."""

import pytest
import torch

from lorakit.devices import best_dtype, has_fast_kernels, resolve_dtype
from lorakit.errors import EnvironmentLacks

CPU = torch.device("cpu")


def test_dtypes_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype("fp32", CPU) is torch.float32
    assert resolve_dtype("bf16", CPU) is torch.bfloat16
    assert resolve_dtype("auto", CPU) is best_dtype(CPU)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert best_dtype(CPU) is torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "Tesla T4")
    assert resolve_dtype("auto", torch.device("cuda")) is torch.float16
    with pytest.raises(EnvironmentLacks, match=r"Tesla T4 \(sm_75\) has no native bf16"):
        resolve_dtype("bf16", torch.device("cuda"))


@pytest.mark.parametrize("supported", [False, True])
def test_fp16_is_slow_on_a_cpu_without_kernels_for_it(
    monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    library = torch.ops.mkldnn
    monkeypatch.setattr(library, "_is_mkldnn_fp16_supported", lambda: supported, raising=False)
    assert has_fast_kernels(torch.float16, CPU) is supported
    for dtype, device in ((torch.float32, CPU), (torch.float16, torch.device("cuda"))):
        assert has_fast_kernels(dtype, device)
