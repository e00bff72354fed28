"""What no recipe may hold: secrets anywhere, and in paths what would steer a terminal.

A recipe is copied into the run's folder as it is, and its values go into the adapter's card and
passport: what stands in it is published. Its paths are printed.
"""

import os
from collections.abc import Mapping

from lorakit.errors import BadInput, Place
from lorakit.recipe.files import is_path_key
from lorakit.recipe.yaml_nodes import Node, Path, problem
from lorakit.storage.paths import NAME_BYTES
from lorakit.storage.redact import secret_in, steers

_WRITTEN = {("output_dir",), ("merge", "out")}


def problems(tree: Node, texts: Mapping[str, str], environ: Mapping[str, str]) -> list[BadInput]:
    """Return what is wrong with the keys and texts of a tree, made of files with these texts."""
    found, secrets = [], []
    for keys, node in tree.walk():
        said = keys[-1] if keys and isinstance(keys[-1], str) else ""
        if secret_in(said, environ) is not None:
            secrets.append(_secret(keys[:-1], "a key here", node.key or node.place))
        if isinstance(node.value, str):
            if secret_in(node.value, environ) is not None:
                secrets.append(_secret(keys, "the text", node.place))
            if is_path_key(keys) or keys in _WRITTEN:
                found += steering(keys, node.value, node.place)
    known = {(one.where.file, one.where.line) for one in secrets if one.where}
    for file, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            at = secret_in(line, environ)
            if at is not None and (file, number) not in known:
                secrets.append(_secret((), "the line", Place(file, number, at + 1)))
    return found + secrets


def steering(keys: Path, text: str, place: Place) -> list[BadInput]:
    """Return the problem of a path with a character that is not to be printed."""
    if character := steers(text):
        sentence = f"holds the character {character}, which is not allowed in a path"
        return [problem("encoding", keys, sentence, place)]
    return []


def too_long(keys: Path, text: str, place: Place) -> list[BadInput]:
    """Return the problem of a path to write to that no file system takes."""
    longest = max(len(os.fsencode(part)) for part in text.split("/"))
    if longest > NAME_BYTES:
        sentence = f"holds a name of {longest} bytes; a file's has at most {NAME_BYTES}"
        return [problem("out-of-range", keys, sentence, place)]
    return []


def _secret(keys: Path, what: str, place: Place) -> BadInput:
    return problem(
        "secret",
        keys,
        f"{what} holds what looks like a token or a password; a run writes its recipe down",
        place,
        "take it out, and make it invalid if others have seen it; lorakit reads HF_TOKEN from the "
        "environment itself",
    )
