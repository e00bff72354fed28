"""What runs between the matrix products: its backward passes, and compiled as it stands."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.model import elementwise
from lorakit.model.elementwise import Gated, Itself, Normed, Prologue, rms_normed, rotate

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)


PROLOGUES: dict[str, tuple[Prologue, tuple[Tensor, ...], Callable[..., Tensor]]] = {
    "itself": (Itself(), (normal(5, 6),), lambda x: x),
    "normed": (
        Normed(normal(6, seed=2).detach(), 1e-5),
        (normal(5, 6),),
        lambda x: torch.nn.functional.rms_norm(x, (6,), normal(6, seed=2), 1e-5),
    ),
    "gated": (
        Gated(),
        (normal(5, 6), normal(5, 6, seed=1)),
        lambda gate, up: torch.nn.functional.silu(gate) * up,
    ),
}


@pytest.mark.parametrize("name", PROLOGUES)
def test_a_prologue_is_the_same_again_with_its_gradient(name: str) -> None:
    prologue, inputs, plain = PROLOGUES[name]
    made, kept = prologue.forward(*inputs)
    expected = plain(*inputs)
    torch.testing.assert_close(made, expected)
    grad = normal(5, 6, seed=3).detach()
    again, grads = prologue.backward(grad, *inputs, *kept)
    torch.testing.assert_close(again, expected)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_norm_and_rotation_pass_finite_differences() -> None:
    weight, angles = normal(6, seed=2).detach(), normal(1, 4, 3, seed=5).detach().repeat(1, 1, 2)
    assert torch.autograd.gradcheck(lambda x: rms_normed(x, weight, 1e-5), normal(2, 4, 6))
    assert torch.autograd.gradcheck(
        lambda x: rotate(x, angles.cos(), angles.sin()), normal(2, 4, 3, 6)
    )
    x = normal(2, 4, 3, 6)
    there = rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(rotate(there, angles.cos(), -angles.sin()), x)


@pytest.fixture
def _apart() -> Iterator[None]:
    yield
    elementwise.keep_kernels_apart()


@pytest.mark.slow  # the compiler of C++ takes seconds
@pytest.mark.usefixtures("_apart")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own code
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_every_function_is_itself(dtype: torch.dtype) -> None:
    x, up, grad = (normal(8, 16, seed=s).detach().to(dtype) for s in range(3))
    weight, (cos, sin) = normal(16, seed=3).detach().to(dtype), torch.rand(2, 8, 4).to(dtype)
    heads = x.view(8, 4, 4)

    def everything() -> list[Tensor]:
        normed, scale = elementwise.rms_norm(x, weight, 1e-5)
        return [
            normed,
            *elementwise.rms_norm_backward(grad, x, weight, scale),
            elementwise.silu_gate(x, up),
            *elementwise.silu_gate_backward(grad, x, up),
            elementwise.rotated(heads, cos, sin),
        ]

    expected = everything()
    assert elementwise.fuse_kernels(CPU, dtype) is None
    for ours, theirs in zip(everything(), expected, strict=True):
        # Rounded at other places, or not at all between two operations.
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=2 * unit, atol=4 * unit)


@pytest.mark.usefixtures("_apart")
@pytest.mark.parametrize("name", [function.__name__ for function in elementwise._fusables])
def test_a_function_that_cannot_be_compiled_is_found_before_the_run(
    monkeypatch: Any, name: str
) -> None:
    def compiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def refused(*_: Any, **__: Any) -> Any:
            raise RuntimeError("no kernel")

        return refused if function.__name__ == name else function

    elementwise._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", compiled)
    assert elementwise.fuse_kernels(CPU, torch.float32) == "RuntimeError: no kernel"
    elementwise._compiled.cache_clear()


@pytest.mark.usefixtures("_apart")
def test_without_a_compiler_functions_run_as_they_stand(monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nand more")

    elementwise._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    assert elementwise.fuse_kernels(CPU, torch.float32) == "RuntimeError: no compiler"
    gate = normal(2, 3)
    assert elementwise.silu_gate(gate, gate).isfinite().all()
