"""A plan as people read it, and as programs do."""

from typing import Any

from lorakit.devices import DTYPES
from lorakit.errors import one_of
from lorakit.host import GIB
from lorakit.storage.disk import free_space
from lorakit.training.memory import OVERHEAD, gib, optimizer_bytes
from lorakit.training.optim import warmup_steps
from lorakit.training.plan import Plan
from lorakit.training.progress import duration
from lorakit.training.speed import CARDS, Card, Rate, step_flops

# Files of weights are seldom larger.
SHARD = 5 * 10**9


def facts(plan: Plan, rate: Rate | None = None) -> dict[str, Any]:
    """Return the plan as `plan.json` and `--json` hold it; with a rate, the time as well."""
    report = plan.dataset.report
    return {
        "base": plan.base.name,
        "method": plan.recipe.adapter.method,
        "sites": [
            {"name": s.name, "kind": s.kind, "inputs": s.inputs, "outputs": s.outputs}
            for s in plan.sites
        ],
        "trainable": plan.shape.trainable,
        "total": plan.shape.parameters,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "quantization": str(plan.quantization or "none"),
        "optimizer": plan.setup.optimizer,
        "micro_batch_tokens": plan.steps.micro_batch_tokens,
        "recomputed_layers": plan.setup.recomputed,
        "rows": len(plan.dataset.train),
        "eval_rows": len(plan.dataset.eval),
        "data": report.facts(),
        "steps_per_epoch": plan.steps.per_epoch,
        "steps": plan.steps.total,
        "tokens": plan.steps.tokens,
        "memory": plan.memory.parts | {"total": plan.memory.total},
        "host_bytes": host_bytes(plan),
        "disk": disk_bytes(plan),
        "seconds": rate and seconds(plan, rate) * plan.steps.total,
        "free_bytes": plan.free_bytes,
        "fits": plan.fits,
        "servable": plan.servable,
    }


def lines(plan: Plan, rate: Rate | None = None, card: Card | None = None) -> list[tuple[str, str]]:
    """Return the plan for people: a label and what it says, a pair a line."""
    recipe, report = plan.recipe, plan.dataset.report
    share = 100 * plan.shape.trainable / plan.shape.parameters
    groups = [
        f"{g.target}  {g.sites} {'site' if g.sites == 1 else 'sites'}  {g.inputs}→{g.outputs}"
        + (f"  rank {g.rank}" if g.rank else "")
        for g in plan.groups
    ]
    parts = "  ".join(
        f"{name} {size / GIB:.2f}" for name, size in plan.memory.parts.items() if size
    )
    left = plan.free_bytes - plan.memory.total
    fits = f"yes, {gib(left)} left of" if plan.fits else f"NO, {gib(-left)} more than"
    dtype = str(plan.dtype).removeprefix("torch.")
    held = f"  {plan.quantization}" if plan.quantization else ""
    return [
        ("Recipe", f"{recipe.origin.path} (valid)"),
        (
            "Base",
            f"{plan.base.name}  {plan.shape.parameters / 1e6:,.1f} M parameters  {dtype}{held}",
        ),
        ("Adapter", f"{recipe.adapter.method}  {groups[0]}"),
        *(("", line) for line in groups[1:]),
        (
            "Trained",
            f"{plan.shape.trainable:,} of {plan.shape.parameters:,} ({share:.3f} %), "
            f"file {4 * plan.shape.trainable / 2**20:.1f} MiB",
        ),
        *(("Data" if k == 0 else "", line) for k, line in enumerate(report.lines())),
        ("Steps", _steps(plan)),
        ("", _split(plan)),
        ("Memory", f"{parts}  = {gib(plan.memory.total)} (estimate)"),
        ("Fits", f"{fits} {gib(plan.free_bytes)}"),
        *([("Host", _host(plan))] if plan.setup.gpu else []),
        ("Disk", _disk(plan)),
        *([("Time", _time(plan, rate))] if rate else []),
        *([("Time", _no_time(card))] if card and not rate else []),
        ("Servable", " · ".join(" ".join(one) for one in plan.servable.items())),
        ("Output", str(recipe.run_folder)),
    ]


def _steps(plan: Plan) -> str:
    train = plan.recipe.train
    stop = f", stops at {train.max_steps}" if train.max_steps else ""
    warm = warmup_steps(train, plan.steps.total)
    return (
        f"{plan.steps.total} ({plan.steps.per_epoch} an epoch x {train.epochs:g}{stop}), "
        f"batch {train.batch_size}, {plan.setup.optimizer}, "
        f"{train.schedule} {train.learning_rate:g} after {warm} warm-up"
    )


def _split(plan: Plan) -> str:
    layers, recomputed = plan.shape.layers, plan.setup.recomputed
    some = f"{recomputed} of {layers} layers" if recomputed < layers else f"all {layers} layers"
    return (
        f"micro-batches of up to {plan.steps.micro_batch_tokens:,} tokens, "
        f"{some if recomputed else 'no layer'} computed again in the backward pass"
        f"{_compiled(plan)}"
    )


def _compiled(plan: Plan) -> str:
    """Say what is compiled: what runs between products belongs to lean twins, the loss to more."""
    if plan.compiled and plan.lean:
        return ", kernels compiled"
    return ", the loss compiled" if plan.compiled and plan.shape.way == "ready" else ""


def seconds(plan: Plan, rate: Rate) -> float:
    """Return how long a step is expected to take."""
    steps = plan.steps
    return (
        step_flops(plan.shape, plan.setup, steps.tokens / steps.total, steps.squares) / rate.flops
    )


def host_bytes(plan: Plan) -> int:
    """Return the host memory that the processes of this machine take together.

    Beside GPUs: libraries and what waits in each, and the largest file of weights, which they all
    map. The main process merges when the others have ended.
    """
    processes = plan.local_processes
    if not plan.setup.gpu:
        return processes * plan.memory.total
    folder = plan.base.folder
    files = [path.stat().st_size for path in folder.glob("*.safetensors")] if folder else []
    whole = plan.shape.parameters * plan.dtype.itemsize
    training = processes * (OVERHEAD + plan.memory.host)
    return max(files, default=min(whole, SHARD)) + max(training, OVERHEAD + _merge_bytes(plan))


def _host(plan: Plan) -> str:
    several = plan.local_processes > 1
    gpus = f"{plan.local_processes} GPUs" if several else "the GPU"
    return f"{gib(host_bytes(plan))} beside {gpus}"


def _merge_bytes(plan: Plan) -> int:
    """Return the bytes of a base that the merge holds quantised, to measure or to dequantise it."""
    recipe, how = plan.recipe, plan.quantization
    merge = recipe.merge
    has_rows = recipe.eval.data is not None or recipe.data.eval is not None
    holds = (merge.measure and has_rows) or merge.base_weights == "dequantised"
    return how.held_bytes(plan.shape.linears) if how and merge.enabled and holds else 0


def checkpoint_bytes(plan: Plan) -> int:
    """Return the bytes of a checkpoint: the adapter in fp32, and the optimizer's states."""
    return 4 * plan.shape.trainable + optimizer_bytes(plan.shape, plan.setup.optimizer)


def disk_bytes(plan: Plan) -> dict[str, int]:
    """Return the bytes that the run's folder will take, by part, and what is free there."""
    recipe, trainable = plan.recipe, plan.shape.trainable
    # Those that are kept, one more while it is written, and the best.
    checkpoints = recipe.train.keep_checkpoints + 1 + bool(plan.dataset.eval)
    dtype = DTYPES.get(recipe.merge.dtype, plan.dtype)
    return {
        "checkpoints": checkpoints * checkpoint_bytes(plan),
        "adapter": 4 * trainable,
        "merged": plan.shape.parameters * dtype.itemsize if recipe.merge.enabled else 0,
        "free": free_space(recipe.run_folder),
    }


def _disk(plan: Plan) -> str:
    *parts, (_, free) = disk_bytes(plan).items()
    shown = "  ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size)
    total = sum(size for _, size in parts)
    return f"{shown}  = {gib(total)}, {gib(free)} free"


def _time(plan: Plan, rate: Rate) -> str:
    step = seconds(plan, rate)
    each = f"{step:.2g} s" if step < 10 else duration(step)
    total = step * plan.steps.total
    whole = f"{duration(total)} in all"
    if total < 1:
        whole = "under a second of arithmetic in all, so starting up takes most of the time"
    return f"{each} a step, {whole} (estimate: {rate.source})"


def _no_time(card: Card) -> str:
    """Say why a card has no rate, and which cards like it have one."""
    like = sorted(CARDS.values(), key=lambda one: abs(one.memory - card.memory))[:3]
    names = one_of(repr(one.name) for one in like)
    return f"unknown: {card.name} says nothing of speed; name a card, such as --gpu {names}"
