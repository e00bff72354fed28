"""What a method may do besides its layers: share tensors, add to the loss, remember its schedule.

No method of the folder needs all of it yet, so plain LoRA is taught to.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit import adapters
from lorakit.adapters import trainable
from lorakit.errors import Interrupted
from lorakit.training import checkpoint
from tests.training.test_loop import carry_out, folder, largest_difference

__all__ = ["folder"]  # a fixture
STRENGTH = 0.05


@pytest.fixture
def penalised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let LoRA pull its tensors towards zero, ever more with the steps that it has seen."""
    lora = adapters.get("lora")

    def penalty(self: Any, model: Any) -> Tensor:
        strength = STRENGTH * (1 + len(getattr(self, "seen", [])))
        squares = [tensor.square().sum() for tensor in trainable(model).values()]
        return strength * torch.stack(squares).sum()

    def after_step(self: Any, model: Any, step: int, total: int) -> None:
        assert all(tensor.grad.any() for tensor in trainable(model).values())
        self.seen = [*getattr(self, "seen", []), f"{step} of {total}"]
        self.refresh(model)

    monkeypatch.setattr(lora, "penalty", penalty)
    monkeypatch.setattr(lora, "after_step", after_step)
    monkeypatch.setattr(lora, "state", lambda self: {"seen": self.seen})
    monkeypatch.setattr(lora, "load_state", lambda self, state: vars(self).update(state))


def test_a_penalty_counts_once_a_step_whatever_the_split(
    folder: Path, tmp_path: Path, penalised: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, whole = carry_out(folder, tmp_path / "whole", max_steps=3)
    _, _, split = carry_out(folder, tmp_path / "split", max_steps=3, micro_batch_size=1)
    assert largest_difference(split, whole) < 1e-4
    monkeypatch.undo()
    _, _, free = carry_out(folder, tmp_path / "free", max_steps=3)
    assert largest_difference(free, whole) > 1e-2


def test_what_a_method_remembers_is_in_every_checkpoint(
    folder: Path, tmp_path: Path, penalised: None
) -> None:
    _, _, whole = carry_out(folder, tmp_path / "whole")
    with pytest.raises(Interrupted):
        carry_out(folder, tmp_path / "cut", stop_after=2)
    cut, _ = checkpoint.newest(tmp_path / "cut" / "checkpoints")
    assert cut is not None
    assert cut.state.method == {"seen": ["0 of 6", "1 of 6"]}
    _, _, resumed = carry_out(folder, tmp_path / "cut", "resume")
    assert largest_difference(resumed, whole) == 0
    done, _ = checkpoint.newest(tmp_path / "cut" / "checkpoints")
    assert done is not None
    assert len(done.state.method["seen"]) == 6


def test_every_layer_is_given_what_the_sites_share(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, given = adapters.get("lora"), []
    make = lora.layer

    def layer(self: Any, site: Any, shared: Any) -> Any:
        given.append((site.name, shared["v"]))
        return make(self, site, shared)

    monkeypatch.setattr(lora, "shared", lambda self, sites: {"v": torch.ones(len(sites))})
    monkeypatch.setattr(lora, "layer", layer)
    carry_out(folder, tmp_path / "run", max_steps=1)
    assert len({id(tensor) for _, tensor in given}) < len(given), "one for all sites of a call"
    assert all(len(tensor) == len({name for name, _ in given}) for _, tensor in given)
