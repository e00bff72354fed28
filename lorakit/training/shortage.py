"""What a run says and does when memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from lorakit.data.batches import Batch
from lorakit.errors import RunFailed
from lorakit.host import GIB
from lorakit.model.checkpointing import checkpoint_layers
from lorakit.model.loss import token_loss
from lorakit.scoring import put
from lorakit.training.fitting import MARGIN, needed, scale_of, settle
from lorakit.training.folder import RunFolder
from lorakit.training.memory import estimate, gib
from lorakit.training.plan import Plan
from lorakit.training.run import Run

# What torch's allocators and the GPU's library of products say besides their own exception.
WORDS = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(word in str(error) for word in WORDS)


@contextmanager
def explained(plan: Plan, folder: RunFolder) -> Iterator[None]:
    """Say what may help when memory runs out anywhere but in a micro-batch.

    Raises:
        RunFailed: `run.out-of-memory` in place of torch's own errors.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise out_of_memory(plan, folder, "memory ran out") from error


def out_of_memory(plan: Plan, folder: RunFolder, what: str) -> RunFailed:
    """Return the error that says what happened, where the memory goes, and what would fit."""
    parts = ", ".join(
        f"{name} {size / GIB:.2f}" for name, size in plan.memory.parts.items() if size
    )
    budget = int(0.9 * min(plan.free_bytes, plan.memory.total))
    change = plan.change(budget, ran_out=True)
    help = "nothing in the recipe makes it much smaller; take a smaller base"
    if change:
        again = "the same result" if change.exact else "another result"
        help = f"{change.options} needs about {gib(change.memory.total)}, {again}"
    message = f"{what} (planned, in GiB: {parts})"
    if folder.resume or (folder.at_work and any(folder.checkpoints.glob("step-*"))):
        message += "; the last checkpoint is intact"
    return RunFailed("run.out-of-memory", message, help=help)


def probe(run: Run) -> None:
    """Try the largest micro-batch on a GPU before the first step, where we chose how it is run.

    Makes do with less until it fits, and keeps nothing: gradients are zero again, and each step
    seeds its own generators. What the optimizer will need is held meanwhile. Then the choice is
    corrected by what was measured.

    Raises:
        RunFailed: when the least that was ours to choose is too much.
    """
    chosen = run.plan.steps.by_tokens or _chooses_layers(run.plan)
    if not (run.runtime.is_gpu and chosen) or run.folder.resume:
        return
    while True:
        batch = run.plan.steps.largest()
        run.reset_peak()  # what a larger one took says nothing of this one
        if not _runs(run, batch):
            run.gradients.short += 1
        short = bool(run.runtime.sum(run.gradients.short))
        run.gradients.zero()
        run.runtime.release()
        if not short:
            break
        make_do(run, batch)
    correct(run, batch)


def make_do(run: Run, batch: Batch) -> None:
    """Choose what takes less than the micro-batch that memory ran out in before the first step.

    A smaller one, where its size was our choice; else more recomputed layers, where these were;
    else, as in any step, what the recipe allows.

    Raises:
        RunFailed: when nothing is left to choose.
    """
    plan, index = run.plan, run.state.step
    smaller = plan.steps.halved() is not None
    if smaller and plan.steps.by_tokens:
        halve(run, index, batch)
    elif _chooses_layers(plan) and plan.setup.recomputed < plan.shape.layers:
        recompute_more(run, _place(run, index, batch))
    elif smaller and plan.recipe.train.on_oom == "halve":
        halve(run, index, batch)
    else:
        raise in_a_batch(run, index, batch)


def recompute_more(run: Run, place: str) -> None:
    """Recompute more layers: as few as fit when activations take at least all that there is."""
    plan, how = run.plan, run.plan.recipe.train.gradient_checkpointing
    scale = scale_of(plan.shape, plan.setup, plan.free_bytes - plan.memory.parts["overhead"])
    _, setup = settle(plan.shape, plan.setup, plan.steps, plan.free_bytes, how, max(1.0, scale))
    choose(run, plan.steps.limit, max(setup.recomputed, plan.setup.recomputed + 1))
    layers = run.plan.setup.recomputed
    run.reporter.say(f"{place}: memory ran out; again with {layers} layers computed again")


def choose(run: Run, limit: int, recomputed: int) -> None:
    """Go on with another limit of micro-batches and count of recomputed layers; note both."""
    run.plan = run.plan.with_choices(limit, recomputed)
    queue = run.runtime.copy_queue() if run.plan.setup.offload else None
    checkpoint_layers(run.model, recomputed, queue=queue)
    run.folder.note(
        micro_batch_limit=limit,
        micro_batch_tokens=run.plan.steps.micro_batch_tokens,
        recomputed_layers=recomputed,
    )


def correct(run: Run, batch: Batch) -> None:
    """Choose again where a micro-batch's measured peak shows that the next may not fit.

    The estimate and the peak are noted; activations are then taken as large as they were.
    """
    plan, runtime = run.plan, run.runtime
    setup = replace(plan.setup, tokens=batch.input_ids.numel())
    memory, peak = estimate(plan.shape, setup), runtime.peak_bytes()
    found = {
        "tokens": setup.tokens,
        "estimated_bytes": memory.total - memory.parts["overhead"],
        "measured_bytes": peak,
    }
    run.folder.note(probe=found)
    scales = torch.zeros(runtime.processes, device=runtime.device)
    scales[runtime.process] = scale_of(plan.shape, setup, peak)
    scale = float(runtime.sum(scales).max())  # the same in every process
    if scale <= 1 or needed(plan.shape, plan.setup, scale) <= MARGIN * plan.free_bytes:
        return
    how = plan.recipe.train.gradient_checkpointing
    split, setup = settle(plan.shape, plan.setup, plan.steps, plan.free_bytes, how, scale)
    before = plan.steps.limit, plan.setup.recomputed
    limit, recomputed = min(split.limit, before[0]), max(setup.recomputed, before[1])
    if (limit, recomputed) == before:  # nothing smaller is ours to choose, and it did fit
        return
    choose(run, limit, recomputed)
    tokens = run.plan.steps.micro_batch_tokens
    run.reporter.say(
        f"a micro-batch took {gib(peak)}, {gib(found['estimated_bytes'])} were "
        f"expected: now up to {tokens:,} tokens, {recomputed} layers computed again"
    )


def _chooses_layers(plan: Plan) -> bool:
    return plan.recipe.train.gradient_checkpointing == "auto"


def _runs(run: Run, batch: Batch) -> bool:
    """Tell whether a micro-batch goes forward and backward in the memory that there is."""
    states = run.plan.memory.parts["optimizer"]
    try:
        held = torch.empty(states, dtype=torch.uint8, device=run.runtime.device)
        torch.autograd.backward(token_loss(run.model, put(batch, run.runtime.device)))
        del held
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        return False
    return True


def in_a_batch(run: Run, index: int, batch: Batch) -> RunFailed:
    """Return the error that a step's micro-batch needed more memory than there is."""
    error = out_of_memory(run.plan, run.folder, f"memory ran out in {_place(run, index, batch)}")
    if run.plan.steps.halved():
        error.help = f"{error.help}; -s train.on_oom=halve makes micro-batches smaller by itself"
    return error


def fell_short(run: Run, batch: Batch | None) -> bool:
    """Tell whether memory ran out in a step: here, in `batch`, or in another process.

    Only where it matters is the device waited for.
    """
    several = run.runtime.processes > 1 and run.plan.recipe.train.on_oom == "halve"
    return batch is not None or (several and bool(run.gradients.short))


def halve(run: Run, index: int, batch: Batch | None) -> None:
    """Go on in micro-batches half as large; the batch and its gradient stay what they are.

    `batch` is the one that memory ran out in, None when that was in another process.

    Raises:
        RunFailed: when a micro-batch is a single row already.
    """
    plan, place = run.plan, _place(run, index, batch)
    smaller = plan.steps.halved()
    if smaller is None:
        raise out_of_memory(plan, run.folder, f"memory ran out in {place}")
    run.plan = plan.with_choices(smaller.limit, plan.setup.recomputed)
    tokens = run.plan.steps.micro_batch_tokens
    run.gradients.zero()
    run.runtime.release()
    run.folder.note(
        micro_batch_limit=smaller.limit,
        micro_batch_tokens=tokens,
        halved=[*run.folder.facts.get("halved", []), {"step": index + 1, "tokens": tokens}],
    )
    run.reporter.say(f"{place}: memory ran out; again in micro-batches of up to {tokens:,} tokens")


def _place(run: Run, index: int, batch: Batch | None) -> str:
    if batch is None:
        return f"step {index + 1}, in another process"
    rows, tokens = batch.input_ids.shape
    packed = f" from {len(batch.lengths)} rows" if batch.lengths else ""
    shape = f"{rows} x {tokens:,} tokens{packed}"
    used = gib(run.runtime.peak_bytes())
    return f"step {index + 1}, a micro-batch of {shape}, {used} used"
