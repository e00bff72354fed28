"""What a run says and does when memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lorakit.data.batches import Batch
from lorakit.errors import RunFailed
from lorakit.model.loss import token_loss
from lorakit.scoring import put
from lorakit.training.folder import RunFolder
from lorakit.training.memory import GIB
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
        f"{name} {size / GIB:.1f}" for name, size in plan.memory.parts.items() if size
    )
    budget = int(0.9 * min(plan.free_bytes, plan.memory.total))
    change = plan.change(budget, ran_out=True)
    help = "nothing in the recipe makes it much smaller; take a smaller base"
    if change:
        again = "the same result" if change.exact else "another result"
        help = f"{change.options} needs about {change.memory.total / GIB:.1f} GiB, {again}"
    message = f"{what} (planned, in GiB: {parts})"
    if folder.resume or (folder.at_work and any(folder.checkpoints.glob("step-*"))):
        message += "; the last checkpoint is intact"
    return RunFailed("run.out-of-memory", message, help=help)


def probe(run: Run) -> None:
    """Try the largest micro-batch on a GPU before the first step, where its size was our choice.

    Halves it until it fits, and keeps nothing: gradients are zero again, and each step seeds its
    own generators. What the optimizer will need is held meanwhile.

    Raises:
        RunFailed: when a single row is too much.
    """
    if not (run.runtime.lags and run.plan.steps.by_tokens) or run.folder.resume:
        return
    while True:
        batch = run.plan.steps.largest()
        if not _runs(run, batch):
            run.gradients.short += 1
        short = bool(run.runtime.sum(run.gradients.short))
        run.gradients.zero()
        run.runtime.release()
        if not short:
            return
        halve(run, run.state.step, batch)


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
    used = run.runtime.peak_bytes() / GIB
    return f"step {index + 1}, a micro-batch of {shape}, {used:.1f} GiB used"
