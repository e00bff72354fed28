"""An audit hook (PEP 578) that sees what an interpreter does, and those it starts.

The interpreters that a watched one starts find `watched/sitecustomize.py`, which watches them too.
This file imports little, so that they find what they would have found without it.
"""

import json
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

VARIABLE = "LORAKIT_TESTS_WATCH"
ROOT = Path(__file__).parents[2]

ALWAYS = frozenset(
    """
    pickle.find_class os.system os.exec os.posix_spawn os.spawn pty.spawn webbrowser.open
    socket.connect socket.getaddrinfo socket.bind tests.loader
    """.split()
)


def watch_all(log: Path, places: Collection[Path], usual: Collection[str] | None) -> None:
    """Watch this interpreter, and each that it starts.

    Args:
        log: where each event is written down that no loading of data needs.
        places: folders in which files may be written; nothing in the first may be run.
        usual: the modules that may be imported; when None every import is written down.
    """
    os.environ[VARIABLE] = json.dumps(
        [str(log), list(map(str, places)), None if usual is None else sorted(usual)]
    )
    os.environ["PYTHONPATH"] = str(Path(__file__).with_name("watched"))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    watch()


def watch() -> None:
    """Watch this interpreter as the environment says."""
    name, texts, usual = json.loads(os.environ[VARIABLE])
    places = [Path(text) for text in texts]
    homes = (*places, Path(sys.prefix), Path(sys.base_prefix), Path("/dev/null"), Path("/dev/shm"))
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    modules = None if usual is None else frozenset(usual) | sys.modules.keys()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "import":
            wrong = modules is None or arguments[0] not in modules
        else:
            wrong = event in ALWAYS or _is_forbidden(event, arguments, homes, places[0])
        if wrong:
            os.write(descriptor, f"{event} {str(arguments)[:200]}\n".encode())

    sys.addaudithook(hook)


def _is_forbidden(
    event: str, arguments: tuple[Any, ...], homes: tuple[Path, ...], folder: Path
) -> bool:
    match event:
        case "compile":
            return str(arguments[1]).startswith(str(folder))
        case "exec":
            return str(arguments[0].co_filename).startswith(str(folder))
        case "subprocess.Popen":
            return arguments[0] != sys.executable
        case "ctypes.dlopen":
            return bool(arguments[0]) and str(arguments[0]).startswith(str(folder))
        case "open":
            path, _, flags = arguments
            if isinstance(path, int):
                return False
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            outside = not any(Path(os.fsdecode(path)).absolute().is_relative_to(h) for h in homes)
            secret = os.fsdecode(path) in ("/etc/passwd", "/dev/zero", str(folder / "fifo"))
            return secret or (writes and outside)
    return False
