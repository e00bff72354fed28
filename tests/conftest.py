"""What holds for every test: no network, one thread, the same examples each time."""

import ipaddress
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from lorakit import environment

SMOLLM2 = "SmolLM2-135M-Instruct-Q4_1"

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
UNSET = ("FORCE_COLOR", "NO_COLOR", "GITHUB_STEP_SUMMARY", "HF_TOKEN")

hypothesis.settings.register_profile("lorakit", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lorakit")


_own_cache = tempfile.TemporaryDirectory(prefix="lorakit-tests-")


def pytest_configure() -> None:
    """Set what libraries read when they are imported: no test file is imported yet.

    The cache folder is the tests' own, with the user's models in it: nothing that an earlier run
    has tokenised is found, and nothing is left there.
    """
    os.environ.update(ENVIRONMENT)
    for variable in UNSET:
        os.environ.pop(variable, None)
    models = environment.cache_folder() / "models"
    Path(_own_cache.name, "models").symlink_to(models.absolute())
    os.environ["LORAKIT_CACHE"] = _own_cache.name


def pytest_unconfigure() -> None:
    """Remove the tests' cache folder."""
    _own_cache.cleanup()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sockets reach this machine only: processes of one run still find each other."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_here(address[0]):
            raise AssertionError(f"a test reached for the network: {address}")
        connect(self, address)

    def no_lookup(host: Any, *arguments: Any, **options: Any) -> Any:
        if not _is_here(host):
            raise AssertionError(f"a test looked up a host: {host}")
        return lookup(host, *arguments, **options)

    lookup = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(socket, "getaddrinfo", no_lookup)


def _is_here(host: Any) -> bool:
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, fetched before the tests.

    Without it a test fails, unless the user says OFFLINE=1: then it is skipped.
    """
    folder = environment.cache_folder() / "models" / SMOLLM2
    if not (folder / "config.json").is_file():
        if os.environ.get("OFFLINE") == "1":
            pytest.skip(f"OFFLINE=1 and {SMOLLM2} is not in lorakit's cache folder")
        pytest.fail(f"{SMOLLM2} is missing: run scripts/fetch_smollm2.py, or set OFFLINE=1")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no GPU; torch is asked only when there is such a test."""
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
