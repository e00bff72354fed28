import os

import pytest


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make fsync free: that it is called, and when, is tested; how long a disk takes is not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
