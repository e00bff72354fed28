"""What every generated file needs: to be written, or with `--check` to be compared."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_or_check(path: Path, text: str) -> int:
    """Write a file and return 0; with `--check` return 1 when it is stale."""
    shown = path.relative_to(ROOT)
    if "--check" not in sys.argv[1:]:
        path.write_text(text, encoding="utf-8")
        print(f"wrote {shown}")
        return 0
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return 0
    print(f"{shown} is stale: run python scripts/{Path(sys.argv[0]).name}", file=sys.stderr)
    return 1
