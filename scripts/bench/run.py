"""Measure lorakit beside its peers on this machine's CPU and write what came out.

    python scripts/bench/run.py                    # all of it, within --minutes
    python scripts/bench/run.py --only C2 C4 --warm 3 --timed 10 --seconds 600 --minutes 60

Each arm is a process of its own; they run one after another, the first of a configuration again
at the end. The model, the rows and the initial values are the same files for every arm. An arm
whose losses differ from the reference's is disqualified, one that cannot run keeps its error. A
results file of the same commit, machine and settings is added to, so that a run may come in pieces.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import commands
import configs
import machine
import peers
import report
from bench import HERE, ROOT, Bench, commit, say

sys.path.insert(0, str(ROOT))

from lorakit.environment import cache_folder  # the package need not be installed

ORDER = "C3 C2 C6 C5 C4 C1 A4 A5 A6 A3".split()  # what matters most first, should time run out
MERGE_BASE, SMALL, LARGE = "base-2gb", "adapter-small", "adapter-large"


def find_peers(bench: Bench, given: str | None) -> None:
    """Find or make the peers' environment; without it their arms say why."""
    try:
        bench.peers = Path(given) if given else peers.interpreter(bench.work)
    except (RuntimeError, OSError) as error:
        bench.no_peers = f"no environment for the peers: {error}"


def prepare(bench: Bench, chosen: list[configs.Config], merges: bool) -> None:
    """Write the files that the arms share."""
    say("preparing")
    more: dict[str, Any] = {}
    if merges:
        base = bench.work / MERGE_BASE
        more["models"] = [{"folder": str(base), "shape": configs.MERGE_BASE}]
        more["adapters"] = [
            {"folder": str(bench.work / LARGE), "base": str(base)},
            {"folder": str(bench.work / SMALL), "base": str(bench.model)},
        ]
    bench.prepare(chosen, **more)


def everything(bench: Bench, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Carry out what was asked for; return the results, with those of earlier pieces."""
    if not bench.busy and (used := machine.wait_until_idle(bench.patience)) > machine.IDLE:
        sys.exit(f"{used} cores are busy: wait, or pass --busy and the rows will say so")
    every = (*configs.CPU, *configs.ABLATIONS)
    by_id = {config.id: config for config in every if config.id in options.only}
    # What is made once, and kept, is not part of the time that the measurements may take.
    find_peers(bench, options.peers)
    prepare(bench, list(by_id.values()), "C6" in options.only)
    bench.began = time.monotonic()
    run = {
        "commit": commit(),
        "machine": machine.describe(),
        "settings": {k: getattr(bench, k) for k in ("warm", "timed", "seconds", "threads")},
        "allowed_busy": bench.busy,
        "dtype": bench.facts["dtype"],
        "sizes": bench.facts["sizes"],
    }
    results = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", **run, **pieces(out, run)}
    if "roof" not in results:
        results |= {**bench.roof(options.roof), "configs": [], "minutes": 0.0}
    for name in (name for name in ORDER if name in options.only):
        if name in by_id:
            others = [config for config in results["configs"] if config["id"] != name]
            found = [*others, bench.measured(by_id[name])]
            results["configs"] = sorted(found, key=lambda config: config["id"])
        else:
            say(name)
            results["merge" if name == "C6" else "start_up"] = at_the_prompt(bench, name)
    if "C2" in by_id:
        results["profile"] = profiled(bench, by_id["C2"])
    results["minutes"] = round(results["minutes"] + (time.monotonic() - bench.began) / 60, 1)
    return results


def pieces(out: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Return what a results file holds, nothing when it is of another run."""
    if not out.is_file():
        return {}
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found if all(found.get(key) == value for key, value in run.items()) else {}


def profiled(bench: Bench, config: configs.Config) -> dict[str, Any]:
    """Return what lorakit's time goes to in one step, from a run that is not timed."""
    arm = configs.Arm("lorakit, profiled", configs.LORAKIT, options={"profile": True})
    untimed = replace(bench, warm=1, timed=1)
    row = untimed.one_arm(config, arm, arm.name)
    return {key: row[key] for key in ("profile", "dtype", "error", "busy") if key in row}


def at_the_prompt(bench: Bench, name: str) -> dict[str, Any]:
    """Measure C5 or C6."""
    if bench.left < 60:
        return {"error": f"left out: the {bench.minutes:g} minutes were over"}
    patience = 0.0 if bench.busy else bench.patience
    setting = commands.Setting(
        bench.work, bench.model, bench.facts["dtype"], bench.peers, bench.threads, patience
    )
    if name == "C5":
        return commands.attempt(lambda: commands.start_up(setting))
    bases = {
        "2.2 GB": (bench.work / MERGE_BASE, bench.work / LARGE),
        bench.model.name: (bench.model, bench.work / SMALL),
    }
    return commands.merge(setting, bases)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    every = sorted([config.id for config in configs.CPU] + ["C5", "C6"])
    cores = len(os.sched_getaffinity(0))
    cache = cache_folder()
    add = parser.add_argument
    more = [config.id for config in configs.ABLATIONS]
    add("--only", nargs="+", default=every, choices=[*every, *more], metavar="ID")
    add("--warm", type=int, default=1, help="steps before timing")
    add("--timed", type=int, default=10, help="timed steps, at most")
    add("--seconds", type=float, default=14.0, help="of an arm, after which no step begins")
    add("--minutes", type=float, default=14.5, help="for everything")
    add("--threads", type=int, default=min(2, cores))
    add("--busy", action="store_true", help="measure although others use cores")
    add("--patience", type=float, default=60.0, help="seconds to wait for idle cores")
    add("--roof", type=float, default=0.25, help="seconds a matrix product")
    add("--shrink", type=int, default=1, help="rows shorter by this, for a try")
    add("--model", type=Path, default=cache / "models" / configs.MODEL)
    add("--work", type=Path, default=cache / "bench")
    add("--peers", help="a Python with the peers; else an environment is made")
    add("--out", type=Path, help="the results' file; else results/cpu-DATE.json")
    add("--readme", type=Path, help="the file that gets the table; else README.md, where all ran")
    options = parser.parse_args()
    # A table of some configurations alone would take the place of what was measured of the others.
    if options.readme is None and set(every) <= set(options.only):
        options.readme = HERE / "README.md"
    return options


def main() -> None:
    """Measure, write the results, and put the table into the README."""
    options = arguments()
    if not (options.model / "config.json").is_file():
        sys.exit(f"no model in {options.model}: run scripts/fetch_smollm2.py")
    names = ("minutes", "threads", "warm", "timed", "seconds", "busy", "patience", "shrink")
    given = {name: getattr(options, name) for name in names}
    bench = Bench(options.work.resolve(), options.model.resolve(), **given)
    out = options.out or HERE / "results" / f"cpu-{datetime.now(UTC):%Y-%m-%d}.json"
    results = everything(bench, options, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1).replace(f"{bench.work}/", "")
    out.write_text(text + "\n", encoding="utf-8")
    table = report.cpu(results)
    print(table)
    if options.readme:
        report.put(options.readme, table)
    say(f"wrote {out}")


if __name__ == "__main__":
    main()
