"""Names of modules: which ones an entry of a recipe means.

An entry is the end of a path, whole components long (`q_proj`, `self_attn.q_proj`), a whole path,
or `re:` and a regular expression that must match the whole path. Expressions may come from a
stranger's file and can take forever, so they run in a process that is stopped after a second.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

from lorakit.errors import BadInput
from lorakit.storage.redact import printable

SECONDS = 1  # of processor time
PREFIX = "re:"

_MATCH = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
patterns, names = json.load(sys.stdin)
found = []
try:
    for pattern in patterns:
        compiled = re.compile(pattern)
        found.append([name for name in names if compiled.fullmatch(name)])
except (re.error, RecursionError, OverflowError) as error:
    found.append(str(error))
print(json.dumps(found))
"""


def matching(entry: str, names: Sequence[str]) -> list[str]:
    """Return the names that an entry means, in their order.

    Raises:
        BadInput: `target.bad-pattern` when a regular expression is wrong or takes too long.
    """
    if entry.startswith(PREFIX):
        return searched([entry.removeprefix(PREFIX)], names)[0]
    return ending(entry, names)


def ending(entry: str, names: Sequence[str]) -> list[str]:
    """Return the names that end in whole components of a path, in their order."""
    return [name for name in names if name == entry or name.endswith(f".{entry}")]


def searched(patterns: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """Return for each regular expression the names that it fits, all within one limit.

    Raises:
        BadInput: `target.bad-pattern` when one is wrong, or they take too long.
    """
    if not patterns:
        return []
    child = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _MATCH],
        input=json.dumps([list(patterns), list(names)]),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        others = f" and {len(patterns) - 1} more" if len(patterns) > 1 else ""
        raise BadInput(
            "target.bad-pattern",
            f"{PREFIX}{printable(patterns[0])}{others} was given up: it takes more than "
            f"{SECONDS} second or too much memory",
            help="write it without a repeat inside a repeat, such as (a+)+",
        )
    *found, last = json.loads(child.stdout)
    if isinstance(last, str):
        wrong = f"{PREFIX}{printable(patterns[len(found)])}"
        raise BadInput("target.bad-pattern", f"{wrong} is no regular expression: {last}")
    return [*found, last]
