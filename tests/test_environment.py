import os
import subprocess
import sys
from itertools import chain, repeat

import pytest
import torch

from lorakit import environment


@pytest.mark.parametrize(
    ("threads", "busy", "spins"),
    [
        ("4", 0.0, environment.SPINS),
        ("4", 0.4, environment.SPINS),
        ("4", 1.0, environment.SPINS_SHARED),
        ("2", 2.0, environment.SPINS),
        ("2", 3.0, environment.SPINS_SHARED),
        (None, 1.0, environment.SPINS_SHARED),
    ],
)
def test_threads_spin_long_where_each_has_a_core(
    threads: str | None, busy: float, spins: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": threads} if threads else {})
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    # What the cores did from one look to the next, which are 0.05 s apart.
    looks = chain([10.0], repeat(10.0 + 0.05 * busy))
    monkeypatch.setattr(environment, "_busy_seconds", lambda: next(looks))
    environment.quiet_libraries(offline=False)
    assert os.environ["GOMP_SPINCOUNT"] == str(spins)


def test_what_the_user_says_about_waiting_threads_stays(monkeypatch: pytest.MonkeyPatch):
    for said in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}):
        monkeypatch.setattr(os, "environ", dict(said))
        environment.quiet_libraries(offline=False)
        assert said.items() <= os.environ.items()
        assert "GOMP_SPINCOUNT" in said or "GOMP_SPINCOUNT" not in os.environ


def test_what_the_user_says_about_kept_kernels_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", {"LRU_CACHE_CAPACITY": "7"})
    environment.quiet_libraries(offline=False)
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "256"


SHAPES = """
from lorakit import environment
environment.quiet_libraries(offline=True)
import torch
from lorakit.host import resident_bytes
torch.set_num_threads(1)
x, w = torch.ones(1200, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
x[:9] @ w
before = resident_bytes()
for rows in range(100, 1100):
    x[:rows] @ w
print(resident_bytes() - before)
"""


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN multiplies no bf16 here"
)
def test_memory_does_not_grow_with_the_shapes_of_a_run():
    ours = {name: value for name, value in os.environ.items() if name not in environment.KERNELS}
    bounded, unbounded = (
        int(subprocess.check_output([sys.executable, "-c", SHAPES], env=given, text=True))
        for given in (ours, ours | dict.fromkeys(environment.KERNELS, "1024"))
    )
    assert 2 * bounded < unbounded


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="as Linux counts")
def test_the_time_of_the_cores_grows_with_work():
    before = environment._busy_seconds()
    began = os.times().user
    while os.times().user - began < 0.1:
        pass
    assert environment._busy_seconds() - before >= 0.05
