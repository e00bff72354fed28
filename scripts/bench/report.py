"""Results as tables: for people, and for the README between its two marks."""

from pathlib import Path
from typing import Any

import compare
import configs
import memory_grid
import quantised

GIB, MIB = 1 << 30, 1 << 20
CURVE = (1, 2, 3, 5, 8, 12, 16, 20)  # steps whose losses are shown
ARM_COLUMNS = [
    "arm",
    "dtype",
    "tokens/s, median (best)",
    "timed",
    "padded tokens",
    "checkpointing",
    "share of roof",
    "peak GiB",
    "losses against the reference",
]
BEGIN, END = "<!-- results: written by the harness -->", "<!-- end of results -->"


def put(readme: Path, table: str) -> None:
    """Put a table between the marks of a README."""
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{readme} has no place for the results: {BEGIN} … {END}")
    readme.write_text(f"{before}{begin}\n{table.strip()}\n{end}{after}", encoding="utf-8")


def cpu(results: dict[str, Any]) -> str:
    """Return everything that a CPU run found."""
    parts = [_heading(results), _roof(results)]
    parts += [_config(config, results) for config in results["configs"]]
    parts += [_start_up(results["start_up"])] if "start_up" in results else []
    parts += [_merge(results["merge"])] if "merge" in results else []
    parts += [_profile(results["profile"])] if "profile" in results else []
    return "\n\n".join(parts) + "\n"


def gpu(found: dict[str, Any]) -> str:
    """Return what a section on a GPU found."""
    if "grid" in found:
        return memory_grid.table(found)
    if "machine" not in found:
        return found.get("error", "")
    machine = found["machine"]
    if "quantised" in found:
        about = f"{found['date']}, commit {found['commit']}, {machine['gpu'] or machine['cpu']}"
        return f"{about}\n\n{quantised.table(found)}\n"
    parts = [
        f"{found['date']}, commit {found['commit']}, {machine['gpu'] or machine['cpu']}"
        f"{' (a tiny try)' if found['tiny'] else ''}, {found['minutes']} minutes",
        *([found["environment"]] if "environment" in found else []),
        *([_roof(found)] if "roof" in found else []),
        *(_config(config, found) for config in found.get("configs", [])),
    ]
    if "pytest" in found:
        parts.append("pytest -m gpu: " + str(found["pytest"].get("error", found["pytest"])))
        parts.append(f"not equal: {', '.join(found['not_equal']) or 'none'}")
    return "\n\n".join(parts) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def _heading(results: dict[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    versions = next(
        (
            arm["versions"]
            for c in results["configs"]
            for arm in c["arms"]
            if "packed" in arm["name"] and "versions" in arm
        ),
        results["versions"],
    )
    named = ", ".join(
        f"{n} {versions[n]}" for n in ("torch", "transformers", "peft", "trl") if n in versions
    )
    flags = ", ".join(machine["flags"]) or "no AVX512"
    return (
        f"{results['date']}, commit {results['commit']}, {machine['cpu']} ({flags}), "
        f"{settings['threads']} threads, {machine['memory'] / GIB:.0f} GiB; {named}. "
        f"`dtype: auto` means {results['dtype']} here. Warm-up {settings['warm']}, up to "
        f"{settings['timed']} timed steps within {settings['seconds']:g} s; "
        f"{results.get('minutes', 0)} minutes in all."
        + (" **Others were allowed to use the cores.**" if results.get("allowed_busy") else "")
    )


def _roof(results: dict[str, Any]) -> str:
    rows = [
        [name, f"{found['gflops']:.0f}", f"{found.get('relative_error', 0):.0e}"]
        for name, found in results["roof"].items()
    ]
    note = " (others used the cores)" if results.get("roof_busy") else ""
    return f"Roof: matrix products of the model's shapes, forward and input gradient{note}\n\n" + (
        _table(["dtype", "GFLOP/s", "relative error of fp32"], rows)
    )


def _config(config: dict[str, Any], results: dict[str, Any]) -> str:
    arms = {arm["name"]: arm for arm in config["arms"]}
    needs = compare.flops_a_token(results["sizes"], config)
    rows = [_arm(arm, needs, results) for arm in config["arms"]]
    text = (
        f"**{config['id']}**: {config['about']} ({config['tokens']} tokens a step, "
        f"{config['trained']} trained, {needs / 1e9:.2f} GFLOP a token)\n\n"
    )
    text += _table(ARM_COLUMNS, rows)
    if config.get("steps", 1) > 1:
        text += "\n\n" + _curves(config)
    goals = [g for g in (*configs.CPU_GOALS, *configs.GPU_GOALS) if g.config == config["id"]]
    compared = [_goal(goal, arms, results["dtype"]) for goal in goals]
    if any(compared):
        text += "\n\n" + _table(
            ["ours", "against", "speed", "goal", "peak memory", "goal"],
            [row for row in compared if row],
        )
    return text


def _curves(config: dict[str, Any]) -> str:
    steps = [step for step in CURVE if step <= config["steps"]]
    rows = [
        [arm["name"], *(f"{arm['losses'][step - 1]:.4f}" for step in steps)]
        for arm in config["arms"]
        if "losses" in arm
    ]
    return _table(["loss in step", *map(str, steps)], rows)


def _arm(arm: dict[str, Any], needs: float, results: dict[str, Any]) -> list[str]:
    if "error" in arm:
        return [arm["name"], arm["dtype"], _short(arm["error"]), *[""] * 6]
    rate = arm["tokens_per_second"]
    share = needs * rate["median"] / compare.roof(results, arm["dtype"])
    name = arm["name"] + (" (busy)" if arm["busy"] else "")
    return [
        name,
        arm["dtype"],
        f"{rate['median']:.0f} ({rate['best']:.0f})",
        str(arm["timed"]),
        f"{arm['padded']}",
        "on" if arm["checkpointing"] else "off",
        f"{share:.2f}",
        f"{arm['memory']['peak'] / GIB:.2f}",
        _equal(arm),
    ]


def _equal(arm: dict[str, Any]) -> str:
    if "loss" not in arm:
        return "no reference"
    loss = arm["loss"]
    if loss["against"] == arm["name"]:
        return "the reference"
    off = (
        f"{loss['relative']:.1e} relative"
        if arm["dtype"] == "fp32"
        else f"{loss['worst']:.4f} at most, {loss['mean']:.4f} on average"
    )
    verdict = "equal" if arm["equal"] else "**DISQUALIFIED**"
    text = f"{verdict}: {off} over {loss['steps']} steps of {loss['against']}"
    if "gradients" in arm:
        text += f"; gradients of step 1: {arm['gradients']['relative']:.1e}"
    return text


def _goal(goal: configs.Goal, arms: dict[str, Any], dtype: str) -> list[str] | None:
    ours = arms.get(f"lorakit {dtype}" if goal.ours == "best" else goal.ours)
    theirs = arms.get(goal.theirs)
    if not ours or not theirs or "error" in ours or "error" in theirs:
        return None
    if not ours.get("equal", True) or not theirs.get("equal", True):
        return [ours["name"], goal.theirs, "disqualified", f"≥ {goal.speed:g}x", "", ""]
    speed = ours["tokens_per_second"]["median"] / theirs["tokens_per_second"]["median"]
    memory = ours["memory"]["peak"] / theirs["memory"]["peak"]
    stretch = f" (stretch {goal.stretch:g}x)" if goal.stretch else ""
    return [
        ours["name"],
        goal.theirs,
        f"{speed:.2f}x",
        f"≥ {goal.speed:g}x{stretch} {_met(speed >= goal.speed)}",
        f"{memory:.2f}x",
        f"≤ {goal.memory:g}x {_met(memory <= goal.memory)}" if goal.memory else "",
    ]


def _profile(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"Profile: {_short(found['error'])}"
    rows = [
        [f"`{row['operation']}`", f"{row['share']:.1%}", str(row["calls"])]
        for row in found["profile"]
        if row["share"] >= 0.01
    ]
    return f"Where one step of C2 goes in lorakit, {found['dtype']}\n\n" + _table(
        ["operation", "share of the step", "calls"], rows
    )


def _start_up(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"**C5**: {_short(found['error'])}"
    rows = []
    for name, key, most in (
        ("`lorakit --help`", "help", configs.HELP_SECONDS),
        ("`lorakit plan` on a local model", "plan", configs.PLAN_SECONDS),
    ):
        met = _met(found[key]["seconds"] <= most)
        rows.append([name, _seconds(found[key]), "", f"≤ {most:g} s {met}"])
    ours, theirs = found["lorakit_first_step"], found.get("peft_first_step", {"error": "no peers"})
    share, goal = "", f"≤ {configs.FIRST_STEP_SHARE:g}x"
    if "error" not in ours and "error" not in theirs:
        ratio = ours["seconds"] / theirs["seconds"]
        share, goal = f"{ratio:.2f}x", f"{goal} {_met(ratio <= configs.FIRST_STEP_SHARE)}"
    rows.append(["first step of the quick start, lorakit", _seconds(ours), share, goal])
    rows.append(["the same with PEFT + Trainer (first_step.py)", _seconds(theirs), "", ""])
    return "**C5**: seconds from the start of the process\n\n" + _table(
        ["what", "seconds", "ratio", "goal"], rows
    )


def _merge(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"**C6**: {_short(found['error'])}"
    rows = []
    for name, case in found.items():
        theirs = case.get("PEFT", {"error": "no peers"})
        for label in ("lorakit", "lorakit, not verified", "PEFT", "copy"):
            row = case.get(label, {"error": "no peers"})
            cells = [name, label, _seconds(row), "", "", ""]
            if "peak" in row:
                cells[3] = f"{row['peak'] / MIB:.0f}"
            if label.startswith("lorakit") and "error" not in row and "error" not in theirs:
                ratio = theirs["seconds"] / row["seconds"]
                cells[4] = f"{ratio:.2f}x"
                if label == "lorakit" and name == "2.2 GB":
                    bounds = ratio >= configs.MERGE_SPEED, row["peak"] <= configs.MERGE_BYTES
                    cells[5] = (
                        f"≥ {configs.MERGE_SPEED:g}x {_met(bounds[0])}, "
                        f"≤ {configs.MERGE_BYTES // MIB} MiB {_met(bounds[1])}"
                    )
            rows.append(cells)
    return "**C6**: merge, from the start of the process to its end\n\n" + _table(
        ["base", "arm", "seconds", "peak MiB", "faster than PEFT", "goal"], rows
    )


def _seconds(row: dict[str, Any]) -> str:
    if "error" in row:
        return _short(row["error"])
    return f"{row['seconds']:.2f}" + (" (busy)" if row.get("busy") else "")


def _met(good: bool) -> str:
    return "met" if good else "**missed**"


def _short(error: str) -> str:
    """Return the last line of an error, as a cell can hold it."""
    line = error.strip().splitlines()[-1]
    return f"did not run: {line[:160]}".replace("|", "/")
