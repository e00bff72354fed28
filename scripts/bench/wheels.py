"""Put wheels over an interpreter's own packages, in an environment that leaves it as it is.

    python scripts/bench/wheels.py FOLDER [WHEELS]

Prints the interpreter to use: this one, where it has all that lorakit needs, else that of an
environment made in FOLDER from the wheels of what is missing. Standard library only.
"""

import importlib.util
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

# What a machine for training may lack, by the name to import. `pydantic` wants a newer
# `typing_extensions` than some have; it comes along where there is a wheel of it.
NEEDED = (
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_inspection",
    "datasets",
    "dill",
    "multiprocess",
    "bitsandbytes",
)
ALONG = "typing_extensions"


def missing() -> list[str]:
    """Return which needed packages this interpreter lacks."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def chosen(names: Sequence[str], wheels: Path) -> list[Path]:
    """Return the wheels of packages.

    Raises:
        FileNotFoundError: with the names of those that have none.
    """
    found = {wheel.name.partition("-")[0].lower(): wheel for wheel in sorted(wheels.glob("*.whl"))}
    if lacking := [name for name in names if name not in found]:
        raise FileNotFoundError(f"no wheel of {', '.join(lacking)} in {wheels}")
    return [found[name] for name in (*names, ALONG) if name in found]


def overlay(folder: Path, wheels: Sequence[Path]) -> Path:
    """Make an environment of wheels, over all that this interpreter sees; return its interpreter.

    An environment that is made from within another one does not see it, hence the path file.

    Raises:
        CalledProcessError: when pip refuses.
    """
    venv.create(folder, clear=True, symlinks=True)
    own = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--target", own, *map(str, wheels)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    below = [path for path in sys.path if path.endswith("-packages")]
    (Path(own) / "below.pth").write_text("".join(f"{path}\n" for path in below), encoding="utf-8")
    return folder / "bin" / "python"


def main() -> int:
    """Print the interpreter to use; return 1 when something is missing and no wheel is there."""
    folder, *rest = sys.argv[1:]
    lacking = missing()
    if not lacking:
        print(sys.executable)
        return 0
    try:
        if not rest:
            raise FileNotFoundError("WHEELS names no folder of wheels")
        print(overlay(Path(folder), chosen(lacking, Path(rest[0]))))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        print(f"this machine lacks {', '.join(lacking)}: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
