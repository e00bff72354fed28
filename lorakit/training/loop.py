"""The run, from top to bottom: load, adapt, step through the data, evaluate, save.

One process and eight take the same path. The loss is a sum over trained tokens, divided once by
their number over all micro-batches and processes, so any split of a batch gives the same
gradient. A step whose loss or gradient is not finite changes nothing.
"""

import itertools
import math
import time
from collections.abc import Sequence
from typing import Literal

import torch

from lorakit import adapters
from lorakit.data.batches import Batch, eval_batches
from lorakit.errors import RunFailed
from lorakit.model.loss import token_loss
from lorakit.processes import Stop
from lorakit.recipe.sections import Skip
from lorakit.runtime import Runtime
from lorakit.scoring import put, score
from lorakit.storage.publish import publish_folder
from lorakit.training import optim
from lorakit.training.checkpoint import interrupted
from lorakit.training.folder import RunFolder
from lorakit.training.plan import Plan
from lorakit.training.progress import Reporter, StepRecord
from lorakit.training.run import Outcome, Pending, Run, outcome, prepare, save, save_adapter
from lorakit.training.shortage import explained, fell_short, halve, in_a_batch, probe, ran_out


def train(
    plan: Plan, runtime: Runtime, folder: RunFolder, reporter: Reporter, stop: Stop
) -> Outcome:
    """Train the adapter of a plan and publish it in the run's folder.

    Raises:
        RunFailed: when a loss or gradient is not finite, an adapter tensor gets no gradient, or
            the disk refuses. The last checkpoint is intact.
        Interrupted: when a signal asked to stop; a checkpoint of the last step was written.
    """
    with explained(plan, folder):
        run = prepare(plan, runtime, folder, reporter, stop)
        probe(run)
        folder.at_work = True
        with stop:
            carry_out(run)
    if runtime.is_main:
        with publish_folder(folder.adapter, replace=True) as path:
            save_adapter(run, path)
    runtime.wait()
    return outcome(run)


def carry_out(run: Run) -> None:
    """Take the steps that are left; evaluate, save and stop where it is due."""
    plan = run.plan
    settings, steps = plan.recipe.train, plan.steps
    run.clock(training=False)  # of getting ready
    with run.reporter:
        if run.state.owes_evaluation:
            conclude(run, saves=True, stopping=False)
        for index in range(run.state.step, steps.total):
            if not step(run, index):
                conclude(run, saves=False, stopping=True)
            done, last = index + 1, index + 1 == steps.total
            evaluates = last or due(done, settings.eval_every, steps.per_epoch)
            run.state.owes_evaluation = evaluates and bool(plan.dataset.eval)
            saves = last or due(done, settings.save_every, steps.per_epoch)
            reads = saves or run.state.owes_evaluation or not run.runtime.is_gpu
            stopping = read_numbers(run, keep=0 if reads else 1)
            conclude(run, saves=saves, stopping=stopping)


def conclude(run: Run, *, saves: bool, stopping: bool) -> None:
    """Evaluate, save and stop after a step, where that is due.

    Raises:
        Interrupted: when something is left to do; the checkpoint of the step is written.
    """
    state, stop = run.state, run.stop
    best = state.owes_evaluation and not stopping and evaluate(run)
    # An evaluation that a signal cut short is taken again on resume.
    stopping = stopping or state.owes_evaluation
    if stopping:
        read_numbers(run, keep=0)
    if saves or best or stopping:
        save(run)
    if stopping and (state.owes_evaluation or state.step < run.plan.steps.total):
        raise interrupted(stop.signal, run.folder.checkpoints, state.step)


def step(run: Run, index: int) -> bool:
    """Take optimizer step `index`; its numbers are on their way to the host, in `run.pending`.

    Returns:
        Whether it was taken: a step that cannot end before the process must is dropped, in every
        process when it is in one.
    """
    gradients, settings, total = run.gradients, run.plan.recipe.train, run.plan.steps.total
    run.stop.doing = f"finishing step {index + 1}{_in_time(run)}, then saving"
    rate = optim.set_rate(run.optimizer, optim.factor(settings, index, total))
    tokens, trained = run.plan.steps.tokens_of(index)
    batches = run.plan.steps.step(index)  # none, where there are more processes than rows
    watch = gradients.watch() if index == 0 and batches else None
    while True:
        short = accumulate(run, index, batches, trained)
        run.runtime.sum(gradients.buffer)
        if is_dropped(run):
            gradients.zero()
            return False
        if not fell_short(run, short):
            break
        halve(run, index, short)
        batches = run.plan.steps.step(index)
    if watch:
        watch.finish()
    gradients.buffer[:-1] /= run.scale.value
    norm = gradients.clip(settings.max_grad_norm)
    spoilt = (~(gradients.loss + norm).isfinite()).float()
    optim.take_step(run.optimizer, spoilt)
    run.method.after_step(run.model, index, total)
    numbers = torch.stack([gradients.loss, norm, spoilt, gradients.stops, run.scale.value])
    copied = run.runtime.to_host(numbers)  # now: later it would wait behind the next step
    if run.plan.dtype is torch.float16:
        run.scale.update(spoilt)
    gradients.zero()
    run.state.step = index + 1
    run.state.tokens += tokens
    run.state.trained_tokens += trained
    run.pending.append(Pending(index, rate, run.state.tokens, run.state.trained_tokens, copied))
    return True


def accumulate(run: Run, index: int, batches: Sequence[Batch], trained: int) -> Batch | None:
    """Add up loss and gradients of this process's micro-batches of a step, while time is left.

    Returns:
        The micro-batch that memory ran out in.
    """
    plan, gradients = run.plan, run.gradients
    run.runtime.seed_step(plan.recipe.seed, index)
    began = time.monotonic()
    for number, batch in enumerate(batches):
        left = (len(batches) - number) * (time.monotonic() - began) / max(1, number)
        if run.stop.comes_before(left):
            gradients.dropped += 1
            return None
        try:
            loss = token_loss(run.model, put(batch, run.runtime.device)) / trained
            torch.autograd.backward(loss * run.scale.value)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            if plan.recipe.train.on_oom == "stop":
                raise in_a_batch(run, index, batch) from error
            gradients.short += 1
            return batch
        gradients.loss += loss.detach() * run.scale.value
    if (penalty := run.method.penalty(run.model)) is not None:
        torch.autograd.backward(penalty * run.scale.value / run.runtime.processes)
    gradients.stops += float(run.stop.requested)
    return None


def _in_time(run: Run) -> str:
    return "" if run.stop.grace is None else f", or dropping it where {run.stop.grace:g} s are few"


def is_dropped(run: Run) -> bool:
    """Tell whether some process ended its part of a step early.

    Only where that can be is the device waited for.
    """
    possible = run.stop.grace is not None and (run.runtime.processes > 1 or run.stop.requested)
    return possible and bool(run.gradients.dropped)


def read_numbers(run: Run, keep: int) -> bool:
    """Read the numbers of all but the newest `keep` steps; tell whether somebody asks to stop.

    Raises:
        RunFailed: when a step was not finite and the recipe does not allow to skip it.
    """
    asked = False
    while len(run.pending) > keep:
        pending = run.pending.pop(0)
        loss, norm, spoilt, stops, scale = pending.numbers.read()
        run.clock(training=True)
        asked |= stops > 0
        if spoilt:
            skip(run, pending.step, loss, norm, scale)
            continue
        run.state.loss = loss
        run.reporter.step(
            StepRecord(
                step=pending.step + 1,
                epoch=(pending.step + 1) / run.plan.steps.per_epoch,
                loss=loss,
                lr=pending.rate,
                grad_norm=norm,
                tokens=pending.tokens,
                trained_tokens=pending.trained_tokens,
                tokens_per_second=run.state.rate(pending.tokens),
                mem_used=run.runtime.used_bytes(),
                mem_peak=run.peak_bytes(),
            )
        )
    # Alone, the process need not wait for its own vote; several stop only together.
    return asked or (run.runtime.processes == 1 and run.stop.requested)


def skip(run: Run, index: int, loss: float, norm: float, scale: float) -> None:
    """Say that a step changed nothing because its loss or gradient was not finite; count it.

    Raises:
        RunFailed: when there are more of them than `train.on_non_finite` allows. Where fp16
            gradients overflowed, the smaller loss scale is tried first.
    """
    overflowed = math.isfinite(loss) and scale > 1 and run.plan.dtype is torch.float16
    run.state.skipped += not overflowed
    allowed = run.plan.recipe.train.on_non_finite
    if overflowed or (isinstance(allowed, Skip) and run.state.skipped <= allowed.skip):
        run.reporter.skipped(index + 1, loss, norm)
        return
    what, places = culprit(run, index)
    raise RunFailed(
        "run.not-finite",
        f"step {index + 1}: loss {loss:g}, gradient norm {norm:g}{what}; this step changed nothing",
        where=f"rows {', '.join(places[:4])}{' …' if len(places) > 4 else ''}",
        help="lower train.learning_rate, look at these rows, or set train.on_non_finite: {skip: 3}",
    )


def culprit(run: Run, index: int) -> tuple[str, list[str]]:
    """Find the first tensor of a step that is not finite, and the rows it comes from.

    The step is taken again, one micro-batch after the other; nothing is looked at before.
    """
    plan, gradients = run.plan, run.gradients
    everywhere = [str(place) for place in plan.steps.places(index)]
    for name, parameter in run.named.items():
        if not parameter.isfinite().all():
            return f", the adapter's {name} is not finite since an earlier step", everywhere
    run.runtime.seed_step(plan.recipe.seed, index)
    for batch in plan.steps.step(index):
        places = [str(plan.dataset.train[row].place) for row in batch.rows]
        gradients.zero()
        loss = token_loss(run.model, put(batch, run.runtime.device)) / batch.trained_tokens
        if not loss.isfinite():
            return ", the loss of these rows is not finite", places
        torch.autograd.backward(loss)
        for name, parameter in run.named.items():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f", the gradient of {name} is not finite", places
    return "", everywhere


def evaluate(run: Run) -> bool:
    """Score the evaluation rows, shared by the processes; tell whether the step is the best yet.

    When a process was asked to stop meanwhile, the evaluation is still owed.

    Raises:
        RunFailed: when the loss is not finite.
    """
    run.stop.doing = f"leaving the evaluation after step {run.state.step}, then saving"
    run.reporter.evaluating(run.state.step)
    adapters.set_training(run.model, False)
    batches = eval_batches(run.plan.dataset.eval, packing=bool(run.plan.packing))
    share = itertools.islice(batches, run.runtime.process, None, run.runtime.processes)
    scores = score(run.model, itertools.takewhile(lambda _: not run.stop.requested, share))
    adapters.set_training(run.model, True)
    sums = torch.tensor(
        [math.fsum(s.nll for s in scores), sum(s.tokens for s in scores), run.stop.requested],
        dtype=torch.float64,
    )
    nll, tokens, stops = run.runtime.sum(sums.to(run.runtime.device)).tolist()
    run.clock(training=False)
    if stops:
        return False
    loss, state = nll / max(1, tokens), run.state
    if not math.isfinite(loss):
        raise RunFailed(
            "run.not-finite",
            f"the evaluation after step {state.step}: loss {loss:g}",
            help="lower train.learning_rate, or set model.dtype to bf16 or fp32",
        )
    state.owes_evaluation = False
    best = state.best_loss is None or loss < state.best_loss
    if best:
        state.best_loss, state.best_step = loss, state.step
    run.reporter.evaluated(state.step, loss, best)
    return best


def due(step: int, every: int | Literal["epoch"], per_epoch: int) -> bool:
    """Tell whether something that happens every so many steps happens after this one."""
    return step % (per_epoch if every == "epoch" else every) == 0
