"""The laws of 4-bit bases, paged optimizers and offloading on a CUDA device."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorakit import adapters
from lorakit.devices import CopyQueue
from lorakit.model import base as bases
from lorakit.model.checkpointing import checkpoint_layers
from lorakit.model.quantized import Quantization, QuantizedLinear, Scratch
from lorakit.model.quantizer import quantize
from lorakit.recipe.sections import Optimizer, Train
from lorakit.training import optim
from lorakit.training.memory import state_bytes
from tests.adapters.adapted import dense, ids, put_on, scramble
from tests.model.finding import find
from tests.model.test_quantized import FORMS
from tests.tiny import FAMILIES, tiny_config, tiny_model, write_wide_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
# Each optimizer in pages and what it is otherwise.
PAGED: dict[Optimizer, str] = {
    "paged_adamw_8bit": "AdamW8bit",
    "paged_adamw_32bit": "AdamW32bit",
}


def loss(model: PreTrainedModel) -> Tensor:
    logits = model(input_ids=ids().cuda(), use_cache=False).logits
    return logits.float().logsumexp(-1).mean()


def gradients(model: PreTrainedModel) -> list[Tensor]:
    loss(model).backward()
    found = [parameter.grad.clone() for parameter in adapters.trainable(model).values()]
    model.zero_grad()
    assert all(grad.any() for grad in found)
    return found


@pytest.mark.parametrize("how", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_gpu_and_a_cpu_quantise_alike(how: Quantization, dtype: torch.dtype) -> None:
    """But for ties and the order in which scales are averaged: a merge may run on a CPU."""
    weight = torch.randn(256, 448, generator=torch.Generator().manual_seed(1)).to(dtype)
    held = []
    for device in ("cpu", "cuda"):
        module = QuantizedLinear((256, 448), dtype, how, Scratch())
        module.take(weight.to(device))
        held.append(module.dense().float().cpu().clone())
        assert torch.equal(module.dense_rows(slice(3, 77)).float().cpu(), held[-1][3:77])
    near = torch.isclose(*held, rtol=1e-2, atol=1e-4)
    assert near.float().mean() > 0.999
    assert (held[0] - held[1]).abs().max() < 0.4 * weight.float().abs().max()


@pytest.mark.parametrize("how", FORMS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_dequantised_base(family: str, how: Quantization) -> None:
    base = tiny_model(family)
    quantize(base, how, CUDA)
    losses, grads = [], []
    for model in (base, dense(base)):
        adapted, method, _ = put_on(model, "lora")
        scramble(adapted, method)
        losses.append(loss(adapted).item())
        grads.append(gradients(adapted))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_loading_holds_no_more_than_one_shard_besides_what_it_keeps(tmp_path: Path) -> None:
    stored = write_wide_model(tmp_path / "model")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    options = {"device": CUDA, "dtype": torch.float32, "quantization": FORMS[0]}
    held = bases.load(find(tmp_path / "model"), **options)
    kept = torch.cuda.memory_allocated() - before
    assert all(parameter.is_cuda for parameter in held.parameters())
    assert kept < 0.25 * stored
    assert torch.cuda.max_memory_allocated() - before < kept + stored / 8 + (1 << 20)


def named() -> dict[str, nn.Parameter]:
    """Return parameters whose states are held in 8 bits and in pages, and one too small for it."""
    draw = torch.Generator().manual_seed(3)
    shapes = {"A": (512, 512), "B": (3, 4), "m": (5,)}
    made = {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
    return {key: nn.Parameter(tensor.cuda()) for key, tensor in made.items()}


def set_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=draw).cuda()


def stepped(optimizer: torch.optim.Optimizer, of: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(of, step)
        optim.take_step(optimizer, torch.zeros(1, device=CUDA))
    torch.cuda.synchronize()


def paged(name: Optimizer, of: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    section = Train(learning_rate=1e-2, optimizer=name)
    assert optim.resolve(section, CUDA) == (name, [])
    free = torch.cuda.mem_get_info()[0]
    states = sum(state_bytes(tuple(p.shape), name) for p in of.values())
    assert states < free / 100  # pages beyond what is free can bring a GPU to a stop
    return optim.build(section, [{"params": list(of.values())}], name, free)


@pytest.mark.parametrize("name", PAGED)
def test_a_paged_optimizer_takes_the_steps_of_the_unpaged_one(name: Optimizer) -> None:
    import bitsandbytes

    ours, theirs = named(), named()
    optimizer = paged(name, ours)
    plain = getattr(bitsandbytes.optim, PAGED[name])(list(theirs.values()), lr=1e-2, weight_decay=0)
    stepped(optimizer, ours, range(5))
    stepped(plain, theirs, range(5))
    assert getattr(optimizer.state[ours["A"]]["state1"], "is_paged", False)
    assert not getattr(plain.state[theirs["A"]]["state1"], "is_paged", False)
    for key, parameter in ours.items():
        assert torch.equal(parameter, theirs[key])
        assert not torch.equal(parameter, named()[key])


@pytest.mark.parametrize("name", PAGED)
def test_the_states_of_a_paged_optimizer_are_saved_and_put_back_exactly(name: Optimizer) -> None:
    whole, broken = named(), named()
    stepped(paged(name, whole), whole, range(6))
    first = paged(name, broken)
    stepped(first, broken, range(3))
    states = optim.state_tensors(first, {p: key for key, p in broken.items()})
    saved = {key: tensor.cpu().clone() for key, tensor in states.items()}
    again = {key: nn.Parameter(p.detach().clone()) for key, p in broken.items()}
    second = paged(name, again)
    optim.load_state_tensors(second, again, saved)
    assert getattr(second.state[again["A"]]["state1"], "is_paged", False)
    stepped(second, again, range(3, 6))
    assert all(torch.equal(again[key], parameter) for key, parameter in whole.items())


def test_inputs_that_wait_in_host_memory_change_no_bit_and_leave_the_gpu() -> None:
    sizes = {"num_hidden_layers": 12, "hidden_size": 256, "intermediate_size": 512}
    model = AutoModelForCausalLM.from_config(tiny_config("llama", **sizes)).eval().cuda()
    adapted, method, _ = put_on(model, "lora")
    scramble(adapted, method)
    rows = torch.randint(3, 320, (32, 256), generator=torch.Generator().manual_seed(1)).cuda()

    def peak(queue: CopyQueue | None) -> tuple[int, list[Tensor]]:
        checkpoint_layers(adapted, queue=queue)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hidden = adapted.model(input_ids=rows, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()
        found = [parameter.grad.clone() for parameter in adapters.trainable(adapted).values()]
        adapted.zero_grad()
        return torch.cuda.max_memory_allocated() - before, found

    kept, expected = peak(None)
    gone, found = peak(CopyQueue(CUDA))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    inputs = rows.numel() * 256 * 4  # bytes of what one layer is given
    assert kept - gone > 6 * inputs  # of 11 that leave; a few are on their way
