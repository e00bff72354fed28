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
pattern, names = json.load(sys.stdin)
try:
    compiled = re.compile(pattern)
except (re.error, RecursionError, OverflowError) as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps([name for name in names if compiled.fullmatch(name)]))
"""


def matching(entry: str, names: Sequence[str]) -> list[str]:
    """Return the names that an entry means, in their order.

    Raises:
        BadInput: `target.bad-pattern` when a regular expression is wrong or takes too long.
    """
    if entry.startswith(PREFIX):
        return _search(entry.removeprefix(PREFIX), names)
    return [name for name in names if name == entry or name.endswith(f".{entry}")]


def _search(pattern: str, names: Sequence[str]) -> list[str]:
    shown = f"re:{printable(pattern)}"
    child = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _MATCH],
        input=json.dumps([pattern, list(names)]),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise BadInput(
            "target.bad-pattern",
            f"{shown} was given up: it takes more than {SECONDS} second or too much memory",
            help="write it without a repeat inside a repeat, such as (a+)+",
        )
    found: list[str] | str = json.loads(child.stdout)
    if isinstance(found, str):
        raise BadInput("target.bad-pattern", f"{shown} is no regular expression: {found}")
    return found
