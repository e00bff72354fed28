"""All gradients in one buffer: views, clipping, and the one that never came."""

import pytest
import torch
from torch import nn

from lorakit.errors import RunFailed
from lorakit.training.gradients import Gradients


def two_tensors() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in (("A", (3, 4)), ("m", (5,)))
    }


def test_gradients_are_views_of_one_buffer() -> None:
    named = two_tensors()
    gradients = Gradients(named)
    (named["A"].sum() * 2 + named["m"].sum() * 3).backward()
    assert torch.equal(gradients.flat, torch.cat([torch.full((12,), 2.0), torch.full((5,), 3.0)]))
    gradients.zero()
    assert named["A"].grad is not None
    assert not named["A"].grad.any()


def test_clipping_equals_torchs_own() -> None:
    named, reference = two_tensors(), two_tensors()
    gradients = Gradients(named)
    for parameters in (named, reference):
        (parameters["A"].pow(2).sum() * 50 + parameters["m"].sum()).backward()
    norm = gradients.clip(0.7)
    expected = nn.utils.clip_grad_norm_(reference.values(), 0.7)
    torch.testing.assert_close(norm, expected)
    for name in named:
        torch.testing.assert_close(named[name].grad, reference[name].grad)


def test_a_parameter_without_gradient_is_named() -> None:
    named = two_tensors()
    watch = Gradients(named).watch()
    named["A"].sum().backward()
    with pytest.raises(RunFailed, match=r"m$") as caught:
        watch.finish()
    assert caught.value.id == "run.no-gradient"
