"""The laws on a CUDA device: kernels, compiled functions and layers against the plain way."""

import pytest
import torch
from torch import Tensor

from lorakit import adapters
from lorakit.model import attention, elementwise
from lorakit.model.attention_kernels import OnDevice, kernel_for
from lorakit.model.documents import Documents
from lorakit.model.loss import token_loss
from tests.adapters.adapted import put_on, scramble
from tests.model.batches import documents, packed
from tests.tiny import known_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (33, 7, 7, 1, 120)


def states(heads: int, dim: int, seed: int) -> Tensor:
    draw = torch.Generator("cuda").manual_seed(seed)
    made = torch.randn(sum(LENGTHS), heads, dim, generator=draw, device="cuda")
    return made.bfloat16().requires_grad_()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_one_launch_for_all_documents_equals_one_for_each(
    heads: tuple[int, int], window: int | None
) -> None:
    q, k, v = states(heads[0], 64, 0), states(heads[1], 64, 1), states(heads[1], 64, 2)
    laid = Documents.of(LENGTHS, 1, q.device)
    assert isinstance(kernel_for(q, laid, 0.125, window), OnDevice)
    ours = attention.attend(q, k, v, laid, window=window)
    theirs = attention._run_by_run(
        *(t.float() for t in (q, k, v)), laid, q.shape[-1] ** -0.5, window, 0.0
    )
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(theirs)
    for one, other in zip(
        torch.autograd.grad(ours, (q, k, v), grad.bfloat16()),
        torch.autograd.grad(theirs, (q, k, v), grad),
        strict=True,
    ):
        assert (one.float() - other.float()).norm() <= 2e-2 * other.float().norm()


@pytest.mark.filterwarnings("ignore")  # of the compiler's own code
def test_compiled_functions_are_themselves() -> None:
    gate, up, grad = (states(1, 64, seed).detach().float().flatten(1) for seed in range(3))
    weight = torch.linspace(0.5, 2.0, 64, device="cuda")
    expected = [*elementwise.silu_gate_backward(grad, gate, up)]
    normed, scale = elementwise.rms_norm(gate, weight, 1e-5)
    expected += [normed, *elementwise.rms_norm_backward(grad, gate, weight, scale)]
    try:
        assert elementwise.fuse_kernels(gate.device, gate.dtype) is None
        found = [*elementwise.silu_gate_backward(grad, gate, up)]
        found += [elementwise.rms_norm(gate, weight, 1e-5)[0]]
        found += elementwise.rms_norm_backward(grad, gate, weight, scale)
    finally:
        elementwise.keep_kernels_apart()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_layers_on_a_gpu_are_those_on_a_cpu(family: str) -> None:
    model, method, _ = put_on(known_model(family, head_dim=16).float(), "lora")
    scramble(model, method, size=0.05)
    batch = packed(documents(*LENGTHS))
    losses, grads = [], []
    for device in ("cpu", "cuda"):
        loss = token_loss(model.to(device), batch)
        trained = list(adapters.trainable(model).values())
        losses.append(loss.item())
        grads.append([g.cpu() for g in torch.autograd.grad(loss, trained)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-6


def test_dropout_on_a_gpu_keeps_no_mask() -> None:
    model, method, _ = put_on(known_model("llama").float().cuda(), "lora", dropout=0.3)
    scramble(model, method, size=0.05)
    adapters.set_training(model, True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = token_loss(model, packed(documents(*LENGTHS)))
    assert not any(t.dtype == torch.bool for t in kept)
    loss.backward()
    assert all(t.grad is not None for t in adapters.trainable(model).values())
