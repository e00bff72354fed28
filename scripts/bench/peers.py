"""The peers' own virtual environment, made once from their public packages."""

import hashlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parents[1] / "constraints.txt"


def interpreter(work: Path) -> Path:
    """Return the Python of the peers' environment, made on the first call.

    Raises:
        RuntimeError: when the packages cannot be had.
    """
    wanted = HERE / "peers.txt"
    digest = hashlib.sha256(wanted.read_bytes() + CONSTRAINTS.read_bytes()).hexdigest()
    folder = work / "peers"
    python, stamp = folder / "bin" / "python", folder / "made-of"
    if stamp.is_file() and stamp.read_text(encoding="ascii") == digest:
        return python
    print(f"making the peers' environment in {folder}", file=sys.stderr, flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS)]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*pip, "--requirement", str(wanted)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:4])}: {done.stderr.strip()[-800:]}")
    stamp.write_text(digest, encoding="ascii")
    return python
