"""The run, from top to bottom: load, adapt, step through the data, evaluate, save.

One process and eight take the same path. The loss is a sum over trained tokens, divided once by
their number over all micro-batches and processes, so any split of a batch gives the same
gradient. A step whose loss or gradient is not finite changes nothing.
"""

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit import adapters
from lorakit.adapters import Method
from lorakit.data.batches import eval_batches
from lorakit.errors import Interrupted, RunFailed
from lorakit.model import base as base_models
from lorakit.model.checkpointing import checkpoint_layers
from lorakit.model.loss import token_loss
from lorakit.recipe.sections import Skip
from lorakit.runtime import Runtime, Stop, make_deterministic
from lorakit.scoring import put, score
from lorakit.storage.publish import publish_folder
from lorakit.training import checkpoint, optim, passports
from lorakit.training.checkpoint import State
from lorakit.training.folder import RunFolder
from lorakit.training.plan import Plan
from lorakit.training.progress import GIB, Reporter, StepRecord

# fp16 gradients underflow; the loss is scaled up, and the scale halves when they overflow.
FP16_SCALE = 2.0**16


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves behind, as `train --json` prints it."""

    steps: int
    final_loss: float | None
    best_eval_loss: float | None
    best_step: int | None
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    wall_seconds: float


@dataclass(frozen=True)
class Pending:
    """A step whose numbers may still be on the device."""

    step: int
    rate: float
    numbers: Tensor  # loss, gradient norm, 1 where either is not finite, processes asked to stop


@dataclass
class Run:
    """Everything that moves while a plan is carried out."""

    plan: Plan
    runtime: Runtime
    folder: RunFolder
    reporter: Reporter
    stop: Stop
    model: PreTrainedModel
    method: Method
    named: dict[str, nn.Parameter]
    gradients: optim.Gradients
    optimizer: torch.optim.Optimizer
    pinned: dict[str, Any]
    state: State = field(default_factory=State)
    scale: Tensor = field(default_factory=lambda: torch.ones(()))
    pending: list[Pending] = field(default_factory=list)
    loss: float | None = None
    began: float = field(default_factory=time.monotonic)
    first_token: int = 0


def train(
    plan: Plan,
    runtime: Runtime,
    folder: RunFolder,
    reporter: Reporter,
    stop: Stop,
    *,
    allow_inexact: bool = False,
) -> Outcome:
    """Train the adapter of a plan and publish it in the run's folder.

    Raises:
        BadInput: when a resume would not go on as the run began, and that was not allowed.
        RunFailed: when a loss or gradient is not finite, an adapter tensor gets no gradient, or
            the disk refuses. The last checkpoint is intact.
        Interrupted: when a signal asked to stop; a checkpoint of the last step was written.
    """
    pinned = passports.pinned(plan, runtime)
    if folder.resume:
        changed = checkpoint.check_unchanged(folder.resume, pinned, allow_inexact=allow_inexact)
        folder.note_resume(changed)
    with memory_errors(plan):
        run = prepare(plan, runtime, folder, reporter, stop, pinned)
        carry_out(run)
    if runtime.is_main:
        with publish_folder(folder.adapter, replace=True) as path:
            save_adapter(run, path)
    runtime.wait()
    return outcome(run)


def carry_out(run: Run) -> None:
    """Take the steps that are left; evaluate, save and stop where it is due."""
    plan, stop = run.plan, run.stop
    settings, steps = plan.recipe.train, plan.steps
    with run.reporter:
        for index in range(run.state.step, steps.total):
            step(run, index)
            done, last = index + 1, index + 1 == steps.total
            evaluates = plan.dataset.eval and due(done, settings.eval_every, steps.per_epoch)
            saves = due(done, settings.save_every, steps.per_epoch)
            stopping = settle(
                run, keep=0 if last or evaluates or saves or not run.runtime.lags else 1
            )
            if evaluates or (last and plan.dataset.eval):
                evaluate(run)
            if saves or last or stopping:
                save(run)
            if stopping and not last:
                raise Interrupted(
                    "run.interrupted",
                    f"stopped by {stop.signal.name if stop.signal else 'a signal'} "
                    f"after step {done}; "
                    "its checkpoint is written",
                    where=str(run.folder.checkpoints),
                    help="run the same command with --resume",
                )


def prepare(
    plan: Plan,
    runtime: Runtime,
    folder: RunFolder,
    reporter: Reporter,
    stop: Stop,
    pinned: dict[str, Any],
) -> Run:
    """Load the base, put the adapter on it, and bring both to where the run is to go on."""
    settings = plan.recipe.train
    if settings.deterministic:
        make_deterministic()
    model = base_models.load(
        plan.base, device=runtime.device, dtype=plan.dtype, attention=plan.recipe.model.attention
    )
    if plan.checkpointing:
        checkpoint_layers(model)
    resume, sites = folder.resume, list(plan.sites)
    if resume:
        method = adapters.attach_saved(adapters.read(resume.adapter), model, sites)
    else:
        method = plan.method
        adapters.attach(method, model, sites, seed=plan.recipe.seed)
        method.start(model, sites, plan.steps.step(0, whole=True))
    adapters.set_training(model, True)
    named = adapters.trainable(model)
    optimizer = optim.build(settings, method.param_groups(model, settings.learning_rate))
    gradients = optim.Gradients(named)
    run = Run(
        plan, runtime, folder, reporter, stop, model, method, named, gradients, optimizer, pinned
    )
    run.scale = torch.tensor(
        FP16_SCALE if plan.dtype is torch.float16 else 1.0, device=runtime.device
    )
    if resume:
        run.state, run.first_token = resume.state, resume.state.tokens
        run.scale.fill_(resume.state.loss_scale)
        method.load_state(resume.state.method)
        optim.load_state_tensors(optimizer, named, resume.optimizer_tensors())
    return run


def step(run: Run, index: int) -> None:
    """Take optimizer step `index`; its numbers stay on the device, in `run.pending`."""
    plan, gradients, settings = run.plan, run.gradients, run.plan.recipe.train
    run.runtime.seed_step(plan.recipe.seed, index)
    rate = optim.set_rate(run.optimizer, optim.factor(settings, index, plan.steps.total))
    watch = gradients.watch() if index == 0 else None
    tokens, trained = plan.steps.tokens_of(index)
    for batch in plan.steps.step(index):
        loss = token_loss(run.model, put(batch, run.runtime.device)) / trained
        torch.autograd.backward(loss * run.scale)
        gradients.loss += loss.detach() * run.scale
    if (penalty := run.method.penalty(run.model)) is not None:
        torch.autograd.backward(penalty * run.scale / run.runtime.processes)
    gradients.stops += float(run.stop.requested)
    run.runtime.sum(gradients.buffer)
    if watch:
        watch.finish()
    gradients.buffer[:-1] /= run.scale
    norm = gradients.clip(settings.max_grad_norm)
    spoilt = (~(gradients.loss + norm).isfinite()).float()
    optim.finite_gate(run.optimizer, spoilt)
    run.optimizer.step()
    run.method.after_step(run.model, index, plan.steps.total)
    numbers = torch.stack([gradients.loss, norm, spoilt, gradients.stops])
    if plan.dtype is torch.float16:
        run.scale = (run.scale * (1 - 0.5 * spoilt)).clamp(min=1.0)
    gradients.zero()
    run.pending.append(Pending(index, rate, numbers))
    run.state.step = index + 1
    run.state.tokens += tokens
    run.state.trained_tokens += trained


def settle(run: Run, keep: int) -> bool:
    """Read the numbers of all but the newest `keep` steps; tell whether somebody asks to stop.

    Raises:
        RunFailed: when a step was not finite and the recipe does not allow to skip it.
    """
    asked = False
    while len(run.pending) > keep:
        pending = run.pending.pop(0)
        loss, norm, spoilt, stops = pending.numbers.tolist()
        asked |= stops > 0
        if spoilt:
            skip(run, pending.step, loss, norm)
            continue
        run.loss = loss
        seconds = time.monotonic() - run.began
        run.reporter.step(
            StepRecord(
                step=pending.step + 1,
                epoch=(pending.step + 1) / run.plan.steps.per_epoch,
                loss=loss,
                lr=pending.rate,
                grad_norm=norm,
                tokens=run.state.tokens,
                trained_tokens=run.state.trained_tokens,
                tokens_per_second=(run.state.tokens - run.first_token) / seconds,
                mem_used=run.runtime.used_bytes(),
                mem_peak=run.runtime.peak_bytes(),
            )
        )
    # Alone, the process need not wait for its own vote; several stop only together.
    return asked or (run.runtime.processes == 1 and run.stop.requested)


def skip(run: Run, index: int, loss: float, norm: float) -> None:
    """Count a step that changed nothing because its loss or gradient was not finite.

    Raises:
        RunFailed: when there are more of them than `train.on_non_finite` allows. Where fp16
            gradients overflowed, the smaller loss scale is tried first.
    """
    overflowed = math.isfinite(loss) and run.scale.item() > 1 and run.plan.dtype is torch.float16
    if overflowed:
        return
    run.state.skipped += 1
    allowed = run.plan.recipe.train.on_non_finite
    if isinstance(allowed, Skip) and run.state.skipped <= allowed.skip:
        return
    places = [str(place) for place in run.plan.steps.places(index)]
    raise RunFailed(
        "run.not-finite",
        f"step {index + 1}: loss {loss:g}, gradient norm {norm:g}; the adapter was not changed",
        where=f"rows {', '.join(places[:4])}{' …' if len(places) > 4 else ''}",
        help="lower train.learning_rate, look at these rows, or set train.on_non_finite: {skip: 3}",
    )


def evaluate(run: Run) -> None:
    """Score the evaluation rows, shared by the processes, and remember the best step."""
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
    if stops:
        # Half an evaluation says nothing; the run stops at this step and repeats it on resume.
        return
    loss, state = nll / max(1, tokens), run.state
    best = state.best_loss is None or loss < state.best_loss
    if best:
        state.best_loss, state.best_step = loss, state.step
    run.reporter.evaluated(state.step, loss, best)


def save(run: Run) -> None:
    """Write a checkpoint of the step just done, then let old ones go."""
    run.state.method = run.method.state()
    run.state.loss_scale = run.scale.item()
    if run.runtime.is_main:
        names: dict[Tensor, str] = {parameter: name for name, parameter in run.named.items()}
        checkpoint.save(
            run.folder.checkpoints,
            run.state,
            run.pinned,
            optim.state_tensors(run.optimizer, names),
            lambda path: save_adapter(run, path),
        )
        keep = run.plan.recipe.train.keep_checkpoints
        checkpoint.prune(run.folder.checkpoints, keep, run.state.best_step)
    run.runtime.wait()


def save_adapter(run: Run, path: Path) -> None:
    """Write the adapter with its passport into a folder that somebody else publishes."""
    passport = passports.of_run(run.plan, run.state, run.loss)
    adapters.save(path, run.method, run.model, list(run.plan.sites), passport, run.plan.tokenizer)


@contextmanager
def memory_errors(plan: Plan) -> Iterator[None]:
    """Say what may help when memory runs out.

    Raises:
        RunFailed: `run.out-of-memory` in place of torch's own errors.
    """
    try:
        yield
    except RuntimeError as error:
        out = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not out:
            raise
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in plan.memory.parts.items())
        raise RunFailed(
            "run.out-of-memory",
            f"memory ran out in micro-batches of up to {plan.steps.micro_batch_tokens:,} tokens "
            f"(estimate in GiB: {parts}); the last checkpoint is intact",
            help="set train.micro_batch_size: 1, or train.gradient_checkpointing: true",
        ) from error


def due(step: int, every: int | Literal["epoch"], per_epoch: int) -> bool:
    """Tell whether something that happens every so many steps happens after this one."""
    return step % (per_epoch if every == "epoch" else every) == 0


def outcome(run: Run) -> Outcome:
    """Sum up a finished run."""
    seconds = time.monotonic() - run.began
    state = run.state
    return Outcome(
        steps=state.step,
        final_loss=run.loss,
        best_eval_loss=state.best_loss,
        best_step=state.best_step,
        tokens=state.tokens,
        trained_tokens=state.trained_tokens,
        tokens_per_second=(state.tokens - run.first_token) / seconds,
        peak_memory_bytes=run.runtime.peak_bytes(),
        wall_seconds=seconds,
    )
