"""Bytes that are no longer what was written: one bit, a cut, a hole, another file's."""

import random
from pathlib import Path


def damage(folder: Path, rng: random.Random, *, flips_only: bool) -> str:
    """Damage one file below a folder, as chance wants it; say what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    kind = (
        "flip"
        if flips_only
        else rng.choice(
            ("cut", "longer", "hole", "removed", "swapped", "other", "doubled", "added")
        )
    )
    at = rng.randrange(len(content))
    match kind:
        case "flip":
            bit = rng.randrange(8)
            content[at] ^= 1 << bit
            kind = f"bit {bit} of byte {at}"
        case "cut":
            del content[at:]
        case "longer":
            content += rng.randbytes(rng.choice((1, 8, 4096)))
        case "hole":
            content[at : at + 4096] = bytes(len(content[at : at + 4096]))
        case "removed":
            path.unlink()
            return f"{path.name}: removed"
        case "swapped":
            other = rng.choice([one for one in files if one != path])
            content, theirs = bytearray(other.read_bytes()), content
            other.write_bytes(theirs)
            kind = f"swapped with {other.name}"
        case "other":
            content = bytearray(rng.randbytes(len(content)))
        case "doubled":
            content *= 2
        case "added":
            path = path.with_name(f"another-{path.name}")
            path.write_bytes(b"")
    if content == path.read_bytes():  # zeros over zeros
        return damage(folder, rng, flips_only=flips_only)
    path.write_bytes(content)
    return f"{path.relative_to(folder)}: {kind}"
