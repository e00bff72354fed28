"""Recomputed layers give the same bits, also when what they keep waits in host memory."""

import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorakit import adapters
from lorakit.model.checkpointing import ON_THE_WAY, checkpoint_layers
from tests.adapters.adapted import loss, put_on, scramble
from tests.tiny import FAMILIES, tiny_config

torch.set_num_threads(1)
LAYERS = 5


class LazyQueue:
    """Copies as late as a queue may: when somebody waits for it.

    Until then what it fills holds NaN, and what it reads must not be let go.
    """

    def __init__(self) -> None:
        self.sent = self.fetched = 0
        self._moments = itertools.count()
        self._pending: dict[int, tuple[Tensor, weakref.ref[Tensor]]] = {}
        self._on_device: list[weakref.ref[Tensor]] = []
        self.most_on_device = 0

    def host_like(self, tensor: Tensor) -> Tensor:
        host = torch.full_like(tensor, torch.nan)
        host.is_host = True
        return host

    def copy(self, to: Tensor, source: Tensor) -> int:
        leaves = hasattr(to, "is_host")
        self.sent += leaves
        self.fetched += not leaves
        self._on_device.append(weakref.ref(source if leaves else to))
        alive = sum(one() is not None for one in self._on_device)
        self.most_on_device = max(self.most_on_device, alive)
        for earlier in [m for m, (target, _) in self._pending.items() if target is source]:
            self.wait_for(earlier)  # a queue keeps its order
        to.fill_(torch.nan)
        moment = next(self._moments)
        self._pending[moment] = (to, weakref.ref(source))
        return moment

    def wait_for(self, moment: int) -> None:
        if moment in self._pending:
            to, source = self._pending.pop(moment)
            read = source()
            assert read is not None, "memory was given up while it was being read"
            to.copy_(read)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model of five layers with an adapter on each; its embedding is frozen."""
    torch.manual_seed(1)
    layers = {"n_layer" if request.param == "gpt2" else "num_hidden_layers": LAYERS}
    made = AutoModelForCausalLM.from_config(tiny_config(request.param, **layers)).eval()
    adapted, method, _ = put_on(made, "lora")
    scramble(adapted, method)
    return adapted


def gradients(model: PreTrainedModel, *losses: Tensor) -> dict[str, Tensor]:
    for one in losses or (loss(model),):
        one.backward()
    found = {key: tensor.grad for key, tensor in adapters.trainable(model).items()}
    model.zero_grad()
    assert all(grad is not None and grad.any() for grad in found.values())
    return found


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(grad, expected[key]) for key, grad in found.items())


@pytest.mark.parametrize("count", [1, 3, None])
def test_gradients_are_bit_equal_with_recomputed_layers(
    model: PreTrainedModel, count: int | None
) -> None:
    expected = gradients(model)
    assert checkpoint_layers(model, count) == (count or LAYERS)
    assert_equal(gradients(model), expected)
    assert checkpoint_layers(model, 0) == 0
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize("count", [1, 3, None])
def test_gradients_are_bit_equal_with_inputs_in_host_memory(
    model: PreTrainedModel, count: int | None
) -> None:
    expected, queue = gradients(model), LazyQueue()
    checkpoint_layers(model, count, queue=queue)
    for _ in range(2):
        assert_equal(gradients(model), expected)
    # What comes from the frozen embedding stays, and so does what has just begun to leave.
    sent = (count or LAYERS) - 1
    assert (queue.sent, queue.fetched) == (2 * sent, 2 * max(0, sent - ON_THE_WAY))
    assert queue.most_on_device <= ON_THE_WAY + 1


def test_two_passes_forward_may_come_before_those_back(model: PreTrainedModel) -> None:
    expected = gradients(model, loss(model), loss(model))
    checkpoint_layers(model, queue=LazyQueue())
    both = loss(model), loss(model)
    assert_equal(gradients(model, *both), expected)


def test_without_gradients_nothing_is_sent(model: PreTrainedModel) -> None:
    queue = LazyQueue()
    checkpoint_layers(model, queue=queue)
    with torch.no_grad():
        loss(model)
    assert queue.sent == 0
