"""What moves while a plan is carried out: made, brought to where a run goes on, and saved."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit import adapters
from lorakit.adapters import Method
from lorakit.devices import HostCopy
from lorakit.errors import EnvironmentLacks
from lorakit.model import base as base_models
from lorakit.model.checkpointing import checkpoint_layers
from lorakit.model.elementwise import fuse_kernels, keep_kernels_apart
from lorakit.model.loss import LIGER, OWN, keep_own, take_faster
from lorakit.processes import Stop
from lorakit.runtime import Runtime, make_deterministic
from lorakit.training import checkpoint, loss_scale, optim, passports
from lorakit.training.checkpoint import State
from lorakit.training.folder import RunFolder
from lorakit.training.gradients import Gradients
from lorakit.training.loss_scale import LossScale
from lorakit.training.plan import Plan
from lorakit.training.progress import Reporter


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves behind, as `train --json` prints it; figures of all sessions.

    `training_seconds` are those without evaluating and saving, `tokens_per_second` is of them.
    """

    steps: int
    skipped: int
    final_loss: float | None
    best_eval_loss: float | None
    best_step: int | None
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    wall_seconds: float
    training_seconds: float


@dataclass(frozen=True)
class Pending:
    """A step whose numbers may still be on their way from the device."""

    step: int
    rate: float
    tokens: int
    trained_tokens: int
    numbers: HostCopy  # loss, gradient norm, 1 if either is not finite, asked to stop, loss scale


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
    gradients: Gradients
    optimizer: torch.optim.Optimizer
    state: State = field(default_factory=State)
    scale: LossScale = field(default_factory=lambda: LossScale(torch.device("cpu")))
    pending: list[Pending] = field(default_factory=list)
    clocked: float = field(default_factory=time.monotonic)
    earlier_peak: int = 0

    def clock(self, *, training: bool) -> None:
        """Add the seconds since the last call to those of the run, and where so of training."""
        now = time.monotonic()
        self.state.seconds += now - self.clocked
        self.state.training_seconds += (now - self.clocked) * training
        self.clocked = now

    def peak_bytes(self) -> int:
        """Return the most memory in use since the run began, in any session."""
        return max(self.earlier_peak, self.runtime.peak_bytes())

    def reset_peak(self) -> None:
        """Let the runtime's peak be that of what comes now; the run's own stays what it was."""
        self.earlier_peak = self.peak_bytes()
        self.runtime.reset_peak()


def prepare(plan: Plan, runtime: Runtime, folder: RunFolder, reporter: Reporter, stop: Stop) -> Run:
    """Load the base, put the adapter on it, and bring both to where the run is to go on."""
    settings = plan.recipe.train
    if settings.deterministic:
        make_deterministic()
    asked = "recipe.train.compile" in folder.changed
    begun = None if asked else folder.begun("compiled")
    folder.chose(compiled=choose_kernels(plan, runtime, reporter, begun=begun))
    model = base_models.load(
        plan.base,
        device=runtime.device,
        dtype=plan.dtype,
        attention=plan.recipe.model.attention,
        quantization=plan.quantization,
    )
    resume, sites = folder.resume, list(plan.sites)
    if resume:
        method = adapters.attach_saved(adapters.read(resume.adapter), model, sites)
    else:
        method = plan.method
        adapters.attach(method, model, sites, seed=plan.recipe.seed)
        method.start(model, sites, plan.steps.step(0, whole=True))
    if runtime.is_gpu:
        folder.chose(loss_kernel=choose_loss(plan, runtime, model, folder.begun("loss_kernel")))
    queue = runtime.copy_queue() if plan.setup.offload else None
    checkpoint_layers(model, plan.setup.recomputed, queue=queue)
    adapters.set_training(model, True)
    named = adapters.trainable(model)
    groups = method.param_groups(model, settings.learning_rate)
    optimizer = optim.build(settings, groups, plan.setup.optimizer, runtime.least_free_bytes())
    gradients = Gradients(named)
    if not runtime.is_gpu:
        # A step that changes nothing makes the states: behind a real one they would lie scattered
        # in the memory that it frees, and the next could not have it in one piece.
        optim.take_step(optimizer, torch.ones(()))
    run = Run(plan, runtime, folder, reporter, stop, model, method, named, gradients, optimizer)
    fp16 = plan.dtype is torch.float16
    run.scale = LossScale(runtime.device, loss_scale.LARGEST if fp16 else 1.0)
    if resume:
        run.state, run.earlier_peak = resume.state, resume.state.peak_bytes
        run.state.inexact += folder.changes
        state = resume.state
        run.scale = LossScale(runtime.device, state.loss_scale, state.finite_steps)
        method.load_state(resume.state.method)
        optim.load_state_tensors(optimizer, named, resume.optimizer_tensors())
    return run


def choose_kernels(
    plan: Plan, runtime: Runtime, reporter: Reporter, *, begun: bool | None = None
) -> bool:
    """Compile what runs between the matrix products; return whether that is so, in every process.

    Where the recipe and the machine allow it, or, of a run that goes on, where it has `begun` so.
    What an earlier run in this process has chosen is forgotten.

    Raises:
        EnvironmentLacks: when the recipe asks for it and the machine has no compiler that works.
    """
    keep_own()
    keep_kernels_apart()
    if not (plan.compiled if begun is None else begun):
        return False
    reason = fuse_kernels(runtime.device, plan.dtype)
    if not runtime.anywhere(reason is not None):
        return True
    keep_kernels_apart()
    reason = reason or "it does not in another process"
    if plan.recipe.train.compile is True:
        raise EnvironmentLacks(
            "env.missing-package",
            f"train.compile: torch.compile does not work here: {reason}",
            help="install a C++ compiler (on a GPU: triton and gcc), or set train.compile: auto",
        )
    reporter.say(f"not compiled, so elementwise steps take longer: {reason}")
    return False


def choose_loss(plan: Plan, runtime: Runtime, model: PreTrainedModel, begun: str | None) -> str:
    """Return whose loss of the head every process takes: that of a run that goes on, if it can.

    Otherwise Liger's where it is the faster one in every process.
    """
    if plan.recipe.train.deterministic:
        return OWN
    if begun is not None and begun != LIGER:
        return begun
    trained = max(1, int(plan.setup.tokens * plan.setup.share))
    found = take_faster(model, trained, at_any_speed=begun == LIGER)
    if not runtime.anywhere(found != LIGER):
        return LIGER
    keep_own()
    return f"{OWN}, as in another process" if found == LIGER else found


def save(run: Run) -> None:
    """Write a checkpoint of the step just done, then let old ones go."""
    done, total = run.state.step, run.plan.steps.total
    run.stop.doing = f"saving step {done}"
    if done < total:  # the answer to a signal is looked for after the next step
        run.stop.doing += f", then finishing and saving step {done + 1}"
    run.clock(training=False)
    run.state.peak_bytes = run.peak_bytes()
    run.state.method = run.method.state()
    run.state.loss_scale = run.scale.value.item()
    run.state.finite_steps = int(run.scale.finite_steps)
    if run.runtime.is_main:
        checkpoint.check_finite(run.named, run.state.step, run.folder.checkpoints)
        run.folder.settle()
        names: dict[Tensor, str] = {parameter: name for name, parameter in run.named.items()}
        checkpoint.save(
            run.folder.checkpoints,
            run.state,
            run.folder.pinned,
            optim.state_tensors(run.optimizer, names),
            lambda path: save_adapter(run, path, unchanged=run.state.loss is None),
        )
        keep = run.plan.recipe.train.keep_checkpoints
        checkpoint.prune(run.folder.checkpoints, keep, run.state.best_step)
    run.runtime.wait()
    run.clock(training=False)


def save_adapter(run: Run, path: Path, *, unchanged: bool = False) -> None:
    """Write the adapter with its passport into a folder that somebody else publishes.

    `unchanged` lets it change nothing: a checkpoint may come while every step was skipped.
    """
    passport, sites = passports.of_run(run.plan, run.state), list(run.plan.sites)
    adapters.save(
        path, run.method, run.model, sites, passport, run.plan.tokenizer, unchanged=unchanged
    )


def outcome(run: Run) -> Outcome:
    """Sum up a finished run."""
    run.clock(training=False)
    state = run.state
    return Outcome(
        steps=state.step,
        skipped=state.skipped,
        final_loss=state.loss,
        best_eval_loss=state.best_loss,
        best_step=state.best_step,
        tokens=state.tokens,
        trained_tokens=state.trained_tokens,
        tokens_per_second=state.rate(state.tokens),
        peak_memory_bytes=run.peak_bytes(),
        wall_seconds=state.seconds,
        training_seconds=state.training_seconds,
    )
