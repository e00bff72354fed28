"""The low-rank product against plain autograd, and its backward against finite differences."""

import gc
import itertools
import random
from collections import Counter
from typing import NamedTuple
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters import _copies, _linear
from lorakit.adapters._copies import stacked
from lorakit.adapters._linear import (
    ITSELF,
    LowRank,
    Product,
    add_low_rank,
    added_to,
    low_rank_linear,
    products,
)
from lorakit.model.elementwise import Gated, Normed

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def case(
    rows: tuple[int, ...],
    inputs: int,
    outputs: int,
    rank: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x, W, bias, A and B; `layout` says how x lies in memory."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    x = normal(*rows, inputs)
    if layout == "transposed":
        x = normal(inputs, *rows).movedim(0, -1)
    elif layout == "expanded":
        x = normal(*(1 for _ in rows), inputs).expand(*rows, inputs)
    return x, normal(outputs, inputs), normal(outputs), normal(rank, inputs), normal(outputs, rank)


def linear(weight: Tensor, bias: Tensor | None, conv1d: bool = False) -> nn.Module:
    """Return a frozen module with these tensors."""
    if conv1d:
        made: nn.Module = Conv1D(weight.shape[0], weight.shape[1]).to(weight.dtype)
        made.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
    else:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


class Opaque(nn.Module):
    """A base that is called as a module, like a quantised one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Configuration(NamedTuple):
    """What is multiplied: `sites` are (outputs, rank, bias), without an update where rank is 0."""

    rows: tuple[int, ...]
    inputs: int
    sites: tuple[tuple[int, int, bool], ...]
    kind: str  # of the bases: linear, conv1d, opaque, or none, where the update is added alone
    prologue: str
    residual: bool
    layout: str
    trained: tuple[bool, bool, bool]  # inputs, A and B


def drawn(draw: random.Random) -> Configuration:
    kind = draw.choice(("linear", "linear", "conv1d", "opaque", "none"))
    prologue = (
        draw.choice(("itself", "normed", "gated")) if kind in ("linear", "conv1d") else "itself"
    )
    count = draw.choice((1, 1, 2, 3)) if kind in ("linear", "conv1d") else 1
    sites = [(draw.randint(1, 5), draw.randint(0, 4), draw.random() < 0.5) for _ in range(count)]
    sites[0] = (sites[0][0], draw.randint(1, 4), sites[0][2])  # one that has an update at least
    trained = draw.choice(TRAINED)
    # An expanded tensor writes to one place many times: finite differences cannot vary it.
    layout = draw.choice(("contiguous", "transposed", *(() if trained[0] else ("expanded",))))
    return Configuration(
        draw.choice(((1,), (3,), (2, 2), (1, 1, 3))),
        draw.randint(1, 5),
        tuple(sites),
        kind,
        prologue,
        kind == "none" or (count == 1 and kind != "opaque" and draw.random() < 0.5),
        layout,
        trained,
    )


TRAINED = [choice for choice in itertools.product((True, False), repeat=3) if any(choice)]
COUNT, PARTS = 200, 10
NO_ROWS = (
    Configuration((0,), 3, ((2, 1, True),), "linear", "normed", True, "contiguous", (True,) * 3),
    Configuration((2, 0), 3, ((2, 1, True),), "opaque", "itself", False, "contiguous", (True,) * 3),
)


def configurations() -> list[Configuration]:
    """Return so many that no two have the same shapes."""
    draw, found = random.Random(0), {}
    while len(found) < COUNT:
        one = drawn(draw)
        shapes = one.rows, one.inputs, tuple(site[:2] for site in one.sites)
        found.setdefault(shapes, one)
    return list(found.values())


def test_finite_differences_are_taken_of_every_kind():
    found = configurations()
    for field in ("kind", "prologue", "residual", "layout", "trained"):
        counts = Counter(getattr(one, field) for one in found)
        assert min(counts.values()) >= 15, counts
    together = Counter((one.prologue, len(one.sites), one.residual) for one in found)
    assert len(together) == 12, together  # a residual goes with one site
    assert min(together.values()) >= 4, together


@pytest.mark.parametrize("part", range(PARTS))
def test_gradients_are_those_of_finite_differences(part):
    extra = NO_ROWS if part == 0 else ()
    for number, one in enumerate([*configurations()[part::PARTS], *extra]):
        check_gradients(one, seed=100 * part + number)


def check_gradients(one: Configuration, seed: int) -> None:
    inputs = [
        case(one.rows, one.inputs, 1, 1, seed=seed + extra, layout=one.layout)[0]
        for extra in range(1 + (one.prologue == "gated"))
    ]
    weight = 1 + 0.1 * case((), one.inputs, 1, 1, seed=seed)[0]
    prologue = {"itself": ITSELF, "normed": Normed(weight, 1e-5), "gated": Gated()}[one.prologue]
    bases, factors, scales = [], [], []
    for place, (outputs, rank, biased) in enumerate(one.sites):
        _, W, bias, A, B = case((1,), one.inputs, outputs, rank, seed=seed + 10 * place)
        base = linear(W, bias if biased else None, one.kind == "conv1d")
        bases.append(None if one.kind == "none" else base)
        factors += [A, B] if rank else []
        scales.append((0.7, -1.3)[place % 2] if rank else None)
    added = [case(one.rows, outputs, 1, 1, seed=seed + 5)[0]] if one.residual else []
    leaves = [
        *(x.detach().requires_grad_(one.trained[0]) for x in (*inputs, *added)),
        *(t.requires_grad_(one.trained[1 + place % 2]) for place, t in enumerate(factors)),
    ]

    def product(*tensors):
        given = list(tensors)
        xs = [given.pop(0) for _ in inputs]
        residual = given.pop(0) if added else None
        updates = [LowRank(given.pop(0), given.pop(0), s) if s else None for s in scales]
        if one.kind == "opaque":
            return low_rank_linear(xs[0], Opaque(bases[0]), updates[0])
        of = [Product(base, update) for base, update in zip(bases, updates, strict=True)]
        return products(xs, of, prologue=prologue, added=residual)

    assert torch.autograd.gradcheck(product, leaves, eps=1e-6, atol=1e-7, rtol=1e-6), one


def test_a_mask_that_is_drawn_again_is_the_same(monkeypatch):
    """As on a GPU, where a seed is kept instead of a mask."""
    monkeypatch.setattr(_linear, "MASKS_KEPT", set())
    x, weight, bias, A, B = case((2, 7), 24, 16, 4)
    leaves = [tensor.requires_grad_() for tensor in (x, A, B)]
    base, kept = linear(weight, bias), []

    def product(x, A, B):
        torch.manual_seed(11)
        return low_rank_linear(x, base, LowRank(A, B, 0.7), dropout=0.4)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        product(*leaves)
    assert not any(tensor.dtype == torch.bool for tensor in kept)
    assert torch.autograd.gradcheck(product, leaves)
    torch.manual_seed(12)
    assert not torch.equal(
        low_rank_linear(x, base, LowRank(A, B, 0.7), dropout=0.4), product(x, A, B)
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "opaque"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_equals_plain_autograd(dtype, kind, dropout):
    x, weight, bias, A, B = case((2, 7), 24, 16, 4, dtype=dtype)
    masters = torch.promote_types(dtype, torch.float32)
    base = linear(weight, bias, kind == "conv1d")
    results = []
    for ours in (True, False):
        own_x, own_a, own_b = (
            t.clone().requires_grad_() for t in (x, A.to(masters), B.to(masters))
        )
        torch.manual_seed(3)
        if ours:
            module = Opaque(base) if kind == "opaque" else base
            update = LowRank(own_a, own_b, -1.5)
            y = low_rank_linear(own_x, module, update, dropout=dropout)
        else:
            seen = own_x
            if dropout:
                keep = torch.empty(14, 24, dtype=torch.bool).bernoulli_(1 - dropout).view(2, 7, 24)
                seen = own_x * keep / (1 - dropout)
            y = base(own_x) - 1.5 * seen @ own_a.to(dtype).t() @ own_b.to(dtype).t()
        assert y.dtype == dtype
        y.square().sum().backward()
        results.append((y.detach(), own_x.grad, own_a.grad, own_b.grad))
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        assert (ours - plain).norm() <= TOLERANCE[dtype] * plain.norm()


def test_a_fixed_dropout_mask_passes_gradcheck():
    x, weight, bias, A, B = case((2, 3), 5, 4, 2)
    base = linear(weight, bias)

    def product(x, A, B):
        torch.manual_seed(1)
        return low_rank_linear(x, base, LowRank(A, B, 0.9), dropout=0.5)

    leaves = [t.requires_grad_() for t in (x, A, B)]
    assert torch.autograd.gradcheck(product, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_only_x_and_its_projection_are_kept():
    x, weight, bias, A, B = case((5, 6), 64, 48, 2, dtype=torch.float32)
    x.requires_grad_()
    A.requires_grad_()
    B.requires_grad_()
    base = linear(weight, bias)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        low_rank_linear(x, base, LowRank(A, B, 1.0))
    weights = {base.weight.data_ptr(), A.data_ptr(), B.data_ptr()}
    others = [t for t in kept if t.data_ptr() not in weights]
    assert {t.data_ptr() for t in others} >= {x.data_ptr()}
    assert sorted(t.numel() for t in others) == sorted([x.numel(), 30 * 2])


def test_a_frozen_a_keeps_only_the_projection():
    x, weight, bias, A, B = case((30,), 64, 48, 2, dtype=torch.float32)
    B.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        low_rank_linear(x, linear(weight, bias), LowRank(A, B, 1.0))
    assert x.data_ptr() not in {t.data_ptr() for t in kept}


def test_zero_b_gives_the_base_bit_for_bit():
    for dtype, conv1d in itertools.product(TOLERANCE, (False, True)):
        x, weight, bias, A, B = case((4, 9), 32, 40, 4, dtype=dtype)
        base = linear(weight, bias, conv1d)
        y = low_rank_linear(x, base, LowRank(A, torch.zeros_like(B), 2.0))
        assert torch.equal(y, base(x))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_below_the_rounding_of_the_others_are_not_lost(dropout: float):
    """Of x in bf16, with what comes through the update: drawn with the same mask in fp64."""
    x, weight, _, A, B = case((512,), 96, 64, 4, dtype=torch.bfloat16)
    update = LowRank(A.float(), B.float() * 5e-5, 2.0)
    G = torch.randn(512, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    base = linear(weight, None)
    torch.manual_seed(0)
    low_rank_linear(x.requires_grad_(), base, update, dropout=dropout).backward(G)
    torch.manual_seed(0)
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else 1.0
    plain = G.double() @ weight.double()
    delta = 2.0 / (1 - dropout) * G.double() @ update.B.double() @ update.A.double() * mask
    kept = ((x.grad.double() - plain) * delta).sum() / delta.square().sum()
    assert float(kept) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_updates_below_the_rounding_of_the_base_are_not_lost(
    conv1d: bool, biased: bool, residual: bool
):
    """In bf16, on average over many values; added to what is rounded most come out as nothing.

    A bias is no larger than the product, as is usual: it is added to the update first.
    """
    x, weight, bias, A, B = case((512,), 64, 96, 4, dtype=torch.bfloat16)
    added = torch.randn(512, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    if not biased:
        bias = torch.zeros_like(bias)
    base, update = linear(weight, bias, conv1d), LowRank(A.float(), B.float() * 5e-5, 2.0)
    (y,) = products([x], [Product(base, update)], added=added if residual else None)
    exact = x.double() @ weight.double().t() + bias.double() + (added.double() if residual else 0)
    delta = 2.0 * x.double() @ update.A.double().t() @ update.B.double().t()
    assert delta.abs().mean() < torch.finfo(torch.bfloat16).eps / 2 * exact.abs().mean() / 4

    def kept(y: torch.Tensor) -> float:
        """Return the share of the update that is in y, by regression."""
        return float(((y.double() - exact) * delta).sum() / delta.square().sum())

    assert kept(y) == pytest.approx(1.0, abs=0.2)
    assert kept(exact.bfloat16() + delta.bfloat16()) < 0.5  # the other way


def test_doubling_the_scale_and_halving_b_changes_nothing():
    x, weight, bias, A, B = case((4,), 16, 12, 4, dtype=torch.float32)
    base = linear(weight, bias)
    once = low_rank_linear(x, base, LowRank(A, B, 0.75))
    again = low_rank_linear(x, base, LowRank(A, B / 2, 1.5))
    assert torch.equal(once, again)


def test_permuting_ranks_leaves_the_merged_weight():
    _, weight, _, A, B = case((1,), 16, 12, 4, dtype=torch.float32)
    order = torch.tensor([2, 0, 3, 1])
    one, other = (
        added_to(weight, LowRank(A, B, 1.0)),
        added_to(weight, LowRank(A[order], B[:, order], 1.0)),
    )
    assert (one - other).norm() <= 1e-6 * one.norm()


def test_two_updates_are_one_of_the_summed_rank():
    x, weight, bias, A, B = case((4,), 16, 12, 4)
    _, _, _, A2, B2 = case((4,), 16, 12, 3, seed=9)
    base = linear(weight, bias)
    twice = add_low_rank(low_rank_linear(x, base, LowRank(A, B, 1.0)), x, LowRank(A2, B2, 1.0))
    once = low_rank_linear(x, base, LowRank(torch.cat([A, A2]), torch.cat([B, B2], dim=1), 1.0))
    assert (once - twice).norm() <= 1e-12 * once.norm()


@pytest.mark.parametrize("rows", [(4,), (2, 3)])
def test_what_comes_out_may_be_added_to_in_place(rows: tuple[int, ...]):
    """Falcon's parallel layers do."""
    x, weight, bias, A, B = case(rows, 16, 12, 4)
    x.requires_grad_()
    one, other = (low_rank_linear(x, linear(weight, bias), LowRank(A, B, 1.0)) for _ in range(2))
    one += other
    (twice,) = torch.autograd.grad(one.square().sum(), x)
    once = low_rank_linear(x, linear(2 * weight, 2 * bias), LowRank(A, 2 * B, 1.0))
    (expected,) = torch.autograd.grad(once.square().sum(), x)
    assert (twice - expected).norm() <= 1e-12 * expected.norm()


def test_a_trained_base_weight_gets_its_gradient():
    x, weight, bias, A, B = case((4,), 16, 12, 4)
    base = linear(weight, bias)
    base.weight.requires_grad_()
    low_rank_linear(x, base, LowRank(A, B, 1.0)).sum().backward()
    assert base.weight.grad is not None


def test_backward_is_marked_as_once_differentiable():
    x, weight, bias, A, B = case((4,), 16, 12, 4)
    A.requires_grad_()
    y = low_rank_linear(x, linear(weight, bias), LowRank(A, B, 1.0)).square().sum()
    (grad,) = torch.autograd.grad(y, A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_merged_weights_are_rounded_once():
    """In bf16 the merged weight is the nearest to the one computed in fp64."""
    _, weight, _, A, B = case((1,), 256, 192, 16, dtype=torch.float32)
    weight = weight.bfloat16()
    merged = added_to(weight, LowRank(A * 0.1, B * 0.1, 2.0)).bfloat16()
    exact = (weight.double() + 2.0 * (B * 0.1).double() @ (A * 0.1).double()).bfloat16()
    same = merged == exact
    assert same.float().mean() >= 0.999
    ulp = 2.0**-7 * exact.abs().float()  # at most one unit in the last place
    assert ((merged.float() - exact.float()).abs() <= ulp).all()


def test_some_rows_are_merged_as_in_the_whole():
    _, weight, _, A, B = case((1,), 16, 12, 4, dtype=torch.float32)
    update, rows = LowRank(A, B, 1.5), slice(3, 8)
    assert torch.equal(added_to(weight[rows], update, rows), added_to(weight, update)[rows])


HALF = torch.bfloat16


def test_a_copy_is_the_factors_rounded_once():
    draw = torch.Generator().manual_seed(0)
    A, B, C = (torch.randn(size, 8, generator=draw) for size in (3, 5, 2))
    assert torch.equal(stacked([A, B], HALF), torch.cat([A, B]).to(HALF))
    assert torch.equal(stacked([C], HALF, 0.7), (C * 0.7).to(HALF))
    assert stacked([A], torch.float32).dtype is torch.float32
    assert A not in _copies._copies or _copies._copies[A].tensor.dtype is HALF


def test_a_copy_holds_until_a_factor_changes():
    draw = torch.Generator().manual_seed(0)
    A, B = (torch.randn(4, 8, generator=draw) for _ in range(2))
    one = stacked([A, B], HALF)
    assert stacked([A, B], HALF) is one
    B.mul_(2)
    assert torch.equal(stacked([A, B], HALF), torch.cat([A, B]).to(HALF))
    A.data = torch.ones_like(A)
    assert torch.equal(stacked([A, B], HALF), torch.cat([A, B]).to(HALF))
    other = B.clone()
    assert torch.equal(stacked([A, other], HALF, 0.5), torch.cat([A, other]).mul(0.5).to(HALF))
    assert torch.equal(stacked([A], HALF), A.to(HALF))


def test_copies_are_kept_only_where_they_are_narrower_and_as_long_as_their_factors():
    A, B = torch.ones(4, 8), torch.ones(4, 8)
    assert stacked([A, B], torch.float32) is not stacked([A, B], torch.float32)
    assert A not in _copies._copies
    with torch.inference_mode():
        assert stacked([A, B], HALF).is_inference()
    assert A not in _copies._copies
    gone = ref(stacked([A, B], HALF))
    assert gone() is not None
    del A
    gc.collect()
    assert gone() is None
