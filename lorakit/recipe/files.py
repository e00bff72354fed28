"""The files of recipes: which one a name means, its bytes, and the paths that it gives."""

import difflib
import os
from pathlib import Path

from lorakit.errors import BadInput, Place, RecipeError, one_of
from lorakit.recipe.yaml_nodes import Node
from lorakit.recipe.yaml_nodes import Path as Keys
from lorakit.storage.paths import open_regular
from lorakit.storage.redact import printable

RESOLVED = "resolved.yaml"  # what a run's folder calls the recipe that was carried out
MAX_BYTES = 1 << 20
LOCAL_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".gguf", ".jinja")


def packaged_recipes() -> dict[str, Path]:
    """Return the recipes that come with lorakit by name: in a wheel, or beside the package."""
    package = Path(__file__).resolve().parents[1]
    folders = (package / "_recipes", package.parent / "recipes")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def locate(name: str | os.PathLike[str], folder: Path | None = None) -> Path:
    """Return the file that a path (relative to `folder`) or a packaged name means.

    The folder of a run, or of its adapter, means the recipe that was carried out.

    Raises:
        BadInput: `recipe.not-found`, with the nearest names.
    """
    path = folder / os.path.expanduser(name) if folder else Path(name)
    packaged = packaged_recipes()
    if os.path.exists(path):
        return _of_run(path) or path
    if str(name) in packaged:
        return packaged[str(name)]
    try:
        beside = [entry for entry in os.listdir(path.parent) if entry.endswith((".yaml", ".yml"))]
    except (OSError, ValueError):
        beside = []
    beside = [name for name in beside if name != path.name]  # it is there: a link to nowhere
    near = [str(path.with_name(found)) for found in difflib.get_close_matches(path.name, beside)]
    near += [found for found in packaged if path.stem and found.startswith(path.stem)]
    near = list(dict.fromkeys([*near, *difflib.get_close_matches(path.stem, packaged)]))
    help = f"did you mean {one_of(map(printable, near[:3]))}?" if near else None
    raise BadInput(
        "recipe.not-found",
        f"there is no recipe file {printable(str(path), 500)}, and no packaged recipe of that name",
        where=printable(str(path), 500),
        help=help or "`lorakit recipes list` shows the packaged recipes",
    )


def _of_run(path: Path) -> Path | None:
    """Return the recipe that lies in a run's folder, given that or its adapter's."""
    places = [path]
    if os.path.isfile(path / "adapter_config.json"):
        places.append(Path(os.path.normpath(path / os.pardir)))
    return next((one / RESOLVED for one in places if os.path.isfile(one / RESOLVED)), None)


def read_bytes(path: Path) -> bytes:
    """Read a recipe file.

    Raises:
        BadInput: `recipe.not-a-file` for all but a regular file, `recipe.too-large` above 1 MiB.
    """
    with open_regular(path, "recipe") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            message = f"has {size:,} bytes; a recipe has at most 1 MiB"
            raise BadInput("recipe.too-large", message, where=str(path))
        return file.read(MAX_BYTES)


def decode(data: bytes, path: Path) -> str:
    """Decode strict UTF-8, with or without a byte order mark.

    Raises:
        RecipeError: `recipe.encoding`, with the byte offset.
    """
    has_mark = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    if data.count(0) > len(data) // 4 and not has_mark:
        message = "not UTF-8: every other byte is 0"
        help = "it looks like UTF-16; save it as UTF-8"
        raise RecipeError(
            [BadInput("recipe.encoding", message, where=Place(str(path), 1), help=help)]
        )
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        where = Place(str(path), data.count(b"\n", 0, error.start) + 1)
        message = f"not UTF-8: byte 0x{data[error.start]:02X} at byte offset {error.start}"
        help = "it looks like UTF-16; save it as UTF-8" if has_mark else "save it as UTF-8"
        raise RecipeError([BadInput("recipe.encoding", message, where=where, help=help)]) from None


def is_path_key(keys: Keys) -> bool:
    """Tell whether the text at a key may be a path relative to the recipe's folder."""
    names = tuple(key for key in keys if isinstance(key, str))
    if names in {("model", "path"), ("data", "chat_template")}:
        return True
    sources = names[:2] in {("data", "train"), ("data", "eval"), ("eval", "data")}
    return sources and names[2:] in {(), ("path",)}


def is_local(text: str, folder: Path) -> bool:
    """Tell whether text that may also be a hub id means something on this machine."""
    looks_local = text.startswith((".", "/", "~")) or text.endswith(LOCAL_ENDINGS)
    return looks_local or os.path.exists(folder / text)


def given(text: str, folder: Path) -> Path:
    """Return the file of data that a recipe in `folder` names; what is no regular file is refused.

    Raises:
        BadInput: `data.not-found`, with what a relative path is relative to, or `data.not-a-file`.
    """
    path = folder / os.path.expanduser(text)
    try:
        open_regular(path, "data").close()
    except BadInput as error:
        if error.id == "data.not-found" and (said := misplaced(text)):
            error.help = said if os.path.exists(text) else f"{said}; {error.help}"
        raise
    return path


def misplaced(text: str) -> str | None:
    """Say what a path of a recipe that leads nowhere is relative to, where it is relative.

    Who gives one with `--set` thinks of the working folder.
    """
    if os.path.isabs(os.path.expanduser(text)):
        return None
    rule = "paths are relative to the folder of the recipe"
    here = f"$PWD/{os.path.normpath(text)}"
    exists = os.path.exists(text)
    return f"{rule}: for the one in the working folder write {printable(here)}" if exists else rule


def moved(root: Node, old: Path, new: Path) -> Node:
    """Rewrite the relative local paths of a tree from one folder to another."""

    def change(keys: Keys, node: Node) -> Node:
        text = node.value
        if not isinstance(text, str) or not is_path_key(keys) or not is_local(text, old):
            return node
        if os.path.isabs(os.path.expanduser(text)):
            return node
        return Node(os.path.relpath(old / text, new), node.place, node.key)

    return root.mapped(change)
