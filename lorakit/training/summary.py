"""A plan as people read it, and as programs do."""

from typing import Any

from lorakit.training.memory import GIB
from lorakit.training.optim import warmup_steps
from lorakit.training.plan import Plan


def facts(plan: Plan) -> dict[str, Any]:
    """Return the plan as `plan.json` and `--json` hold it."""
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
        "free_bytes": plan.free_bytes,
        "fits": plan.fits,
        "servable": plan.servable,
    }


def lines(plan: Plan) -> list[tuple[str, str]]:
    """Return the plan for people: a label and what it says, a pair a line."""
    recipe, report = plan.recipe, plan.dataset.report
    share = 100 * plan.shape.trainable / plan.shape.parameters
    groups = [
        f"{g.target}  {g.sites} {'site' if g.sites == 1 else 'sites'}  {g.inputs}→{g.outputs}"
        + (f"  rank {g.rank}" if g.rank else "")
        for g in plan.groups
    ]
    parts = "  ".join(f"{name} {size / GIB:.2f}" for name, size in plan.memory.parts.items())
    fits = "yes" if plan.fits else "NO"
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
        ("Memory", f"{parts}  = {plan.memory.total / GIB:.2f} GiB (estimate)"),
        ("Fits", f"{fits}, {plan.free_bytes / GIB:.1f} GiB free"),
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
    )
