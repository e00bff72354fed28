"""The rules of the house, read from the code: rows, third parties, words, sizes, error ids."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from importlib import import_module

import pytest

from lorakit import errors
from lorakit.recipe.sections import DEFAULT_METHOD, Section
from tests.source_tree import EXTRAS, METHODS, MODULES, ROOT, Module, declared, dotted, room_of

# A module imports lorakit modules of its own room and of the rows above its own, no others.
ROWS = (
    ("errors",),
    ("environment", "host"),
    ("storage",),
    ("recipe",),
    ("devices",),
    ("runtime", "processes", "threads"),
    ("model",),
    ("adapters",),
    ("data",),
    ("scoring",),
    ("training",),
    ("export",),
    ("evaluation",),
    ("cli",),
    ("__main__",),
)
ROW = {"": -1} | {room: row for row, rooms in enumerate(ROWS) for room in rooms}

# Third parties by room, and by file where one file needs more than its room.
THIRD_PARTIES = {
    "storage": "safetensors",
    "recipe": "pydantic pydantic_core yaml",
    "devices": "torch",
    "runtime": "torch",
    "threads": "torch",
    "model": "bitsandbytes huggingface_hub numpy safetensors torch transformers",
    "adapters": "pydantic torch",
    "data": "datasets jinja2 numpy pyarrow tokenizers torch",
    "scoring": "torch",
    "training": "torch",
    "export": "torch",
    "evaluation": "torch",
    "cli": "rich typer",
    "cli/conflicts.py": "packaging",
    "storage/tensors.py": "torch",
    "adapters/prefix.py": "transformers",
    "training/optim.py": "bitsandbytes",
    "training/progress.py": "rich",
    "evaluation/generation.py": "transformers",
}
# What a model or a tokenizer is may be said from the model's row on.
TYPES = {"PreTrainedModel", "PreTrainedTokenizerBase", "PretrainedConfig"}

# Words that few files may say: a pattern for names and texts, and those files.
WORDS = {
    r"cuda(:\d+)?|is_cuda": {"devices.py", "runtime.py"},
    r"(get_)?world_size": {"runtime.py"},
    r"torch\.distributed(\..*)?": {"runtime.py"},
    r"os\.(environb?|getenv|putenv)": {"environment.py", "runtime.py"},
    # A resolved recipe names every key: what was written and what was not must decide nothing.
    r"model_fields_set": set(),
}
BANNED_CALLS = re.compile(
    r"eval|exec|compile|__import__|torch\.(load|save|set_default_dtype|set_default_device)"
    r"|yaml\.(full_|unsafe_|safe_)?load(_all)?|os\.(system|popen)|(numpy|np)\.load"
    r"|tempfile\.mktemp|.*\.(extractall|unpack_archive)|os\.(exec|spawn|posix_spawn)\w*"
)
BANNED_ARGUMENTS = {
    "shell=True",
    "weights_only=False",
    "allow_pickle=True",
    "trust_remote_code=True",
}
BANNED_MODULES = {"pickle", "cPickle", "dill", "shelve", "marshal", "joblib", "cloudpickle"}
# What speaks to the network besides the hub's own library, and templates out of the sandbox.
BANNED_IMPORTS = re.compile(
    r"requests|httpx|aiohttp|socketserver|ftplib|smtplib|http(\.client|\.server)?"
    r"|urllib(\.request)?|urllib3|jinja2(\.environment|\.nativetypes|\.loaders)?"
)
# What one file may do: begin itself again with other settings; the names of the template's errors.
ALLOWED = {("processes.py", "os.execve"), ("data/sandbox.py", "jinja2")}

# Besides `cli/` and extras, what may import when it is called; the data room's two take a second
# each, for kinds of sources that most runs do not have.
LATE_IMPORTS = {
    ("adapters/__init__.py", "get"),
    ("model/liger.py", "found"),
    ("model/quantized.py", "_library"),
    ("training/optim.py", "_library"),
    ("data/source.py", "_hub_table"),
    ("data/source.py", "_parquet"),
}

LONGEST_FILE, LONGEST_FUNCTION = 400, 80
HEAVY = (
    "torch transformers datasets accelerate bitsandbytes numpy pandas pyarrow tokenizers".split()
)
HEAVY_FOR_HELP = [*HEAVY, "pydantic", "rich", "yaml"]


def none(wrong: Iterable[str]) -> None:
    """Fail with every line of what is wrong."""
    lines = sorted(set(wrong))
    assert not lines, "\n  " + "\n  ".join(lines)


def test_imports_keep_the_rows() -> None:
    none(
        f"lorakit/{m.file}: the room {m.room} has no row"
        for m in MODULES.values()
        if m.room not in ROW
    )
    none(
        f"{each.place}: {module.room} (row {ROW[module.room]}) imports {each.module}"
        for module in MODULES.values()
        for each in module.imports
        if each.package == "lorakit"
        and room_of(each.module) != module.room
        and ROW[room_of(each.module)] >= ROW[module.room]
    )


def test_every_row_has_its_rooms() -> None:
    none(f"{room} is no room" for room in set(ROW) - {m.room for m in MODULES.values()} - {""})


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {
        name: {each.module for each in module.imports if each.runs and each.module in MODULES}
        - {name}
        for name, module in MODULES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_third_parties_stay_in_their_rooms() -> None:
    wrong = []
    for module in MODULES.values():
        rooms = (THIRD_PARTIES.get(module.room, ""), THIRD_PARTIES.get(module.file, ""))
        allowed = {"lorakit", *sys.stdlib_module_names, *" ".join(rooms).split()}
        for each in module.imports:
            is_type = each.package == "transformers" and each.name in TYPES
            in_function = each.function and each.package in EXTRAS
            in_command = module.room == "cli" and (each.function or not each.runs)
            is_free = in_function or in_command or (is_type and ROW[module.room] >= ROW["model"])
            if each.package not in allowed and not is_free:
                wrong.append(f"{each.place}: {each.module}")
    none(wrong)


def test_every_third_party_is_declared() -> None:
    brought_along = set(
        "huggingface_hub jinja2 numpy packaging pyarrow pydantic_core tokenizers".split()
    )
    known = {"lorakit", *sys.stdlib_module_names, *declared(), *EXTRAS, *brought_along}
    none(
        f"{each.place}: {each.package}"
        for module in MODULES.values()
        for each in module.imports
        if each.package not in known
    )


def test_imports_stand_at_the_top() -> None:
    none(
        f"{each.place}: {each.module} inside {each.function}"
        for module in MODULES.values()
        for each in module.imports
        if each.function
        and each.package not in EXTRAS
        and module.room != "cli"
        and (module.file, each.function) not in LATE_IMPORTS
    )


def test_nothing_dangerous_is_called() -> None:
    none(
        f"{each.place}: import {each.module}"
        for module in MODULES.values()
        for each in module.imports
        if each.package in BANNED_MODULES
        or (BANNED_IMPORTS.fullmatch(each.module) and (module.file, each.module) not in ALLOWED)
    )
    none(
        f"{module.at(node)}: {ast.unparse(node)[:60]}"
        for module in MODULES.values()
        for node in module.nodes
        if isinstance(node, ast.Assert)
        or (
            isinstance(node, ast.Call)
            and is_dangerous(node)
            and (module.file, dotted(node.func)) not in ALLOWED
        )
    )


def is_dangerous(call: ast.Call) -> bool:
    arguments = {ast.unparse(keyword) for keyword in call.keywords}
    return bool(BANNED_CALLS.fullmatch(dotted(call.func)) or arguments & BANNED_ARGUMENTS)


def test_words_stay_in_their_file() -> None:
    said: list[tuple[Module, str, str]] = []
    for module in MODULES.values():
        said += [(module, module.at(text), text.value) for text in module.texts]
        said += [(module, each.place, each.module) for each in module.imports]
        for node in module.nodes:
            if isinstance(node, ast.Attribute):
                said += [(module, module.at(node), word) for word in (node.attr, dotted(node))]
            elif isinstance(node, ast.Name):
                said.append((module, module.at(node), node.id))
    none(
        f"{place}: {word}"
        for module, place, word in said
        for pattern, files in WORDS.items()
        if module.file not in files and re.fullmatch(pattern, word)
    )


def test_constants_of_many_rooms_have_one_home() -> None:
    homes = {"MASKED": "model/inputs.py", "GIB": "host.py"}
    none(
        f"{module.at(node)}: {name} stands in {homes[name]}"
        for module in MODULES.values()
        for node in module.nodes
        if isinstance(node, ast.Assign)
        for name in map(dotted, node.targets)
        if homes.get(name, module.file) != module.file
    )
    none(
        f"{module.at(node)}: {ast.unparse(node)[:60]}: divide by GIB"
        for module in MODULES.values()
        for node in module.nodes
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Div)
        and ast.unparse(node.right) in ("2 ** 30", "1 << 30")
    )


def test_only_adapters_name_methods() -> None:
    default = ("recipe/sections.py", DEFAULT_METHOD)
    none(
        f"{module.at(text)}: {text.value!r}"
        for module in MODULES.values()
        for text in module.texts
        if text.value in METHODS
        and module.room != "adapters"
        and (module.file, text.value) != default
    )


def test_every_recipe_key_is_read() -> None:
    for name in METHODS:
        import_module(f"lorakit.adapters.{name}")
    read = {
        node.attr
        for module in MODULES.values()
        for node in module.nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    none(
        f"{section.__name__}.{key} is read nowhere"
        for section in below(Section)
        if section.__module__.startswith("lorakit.")
        for key in section.model_fields
        if key not in read
    )


def below(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from below(child)


def test_contributors_are_told_how_long_is_too_long() -> None:
    told = f"Files of at most {LONGEST_FILE} lines, functions of at most {LONGEST_FUNCTION}."
    assert told in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_files_and_functions_are_short() -> None:
    none(
        f"lorakit/{module.file}: {lines} lines"
        for module in MODULES.values()
        if (lines := module.path.read_text(encoding="utf-8").count("\n")) > LONGEST_FILE
    )
    none(
        f"{module.at(node)}: {node.name}, {lines} lines"
        for module in MODULES.values()
        for node in module.functions
        if (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION
    )


@pytest.mark.parametrize(
    "arguments", ["--help", "train --help", "recipes list", "recipes schema", "methods"]
)
def test_light_commands_import_nothing_heavy(arguments: str) -> None:
    unwanted = HEAVY_FOR_HELP if arguments == "--help" else HEAVY
    program = (
        "import sys\n"
        "from lorakit.cli.app import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('HEAVY', *(name for name in {unwanted} if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments.split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["HEAVY"]


KINDS = {
    kind.__name__: kind.ids
    for kind in (*below(errors.LorakitError), errors.Notice)
    if "ids" in vars(kind)
}


def test_error_ids_exist() -> None:
    none(
        f"{module.at(node)}: {kind} has no id {node.args[0].value!r}"
        for module in MODULES.values()
        for node in module.nodes
        if isinstance(node, ast.Call)
        and (kind := dotted(node.func).split(".")[-1]) in KINDS
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value not in KINDS[kind]
    )


def test_every_error_id_is_used() -> None:
    """An id may be put together: `f"{family}.damaged"`, or `problem("missing-key", …)`."""
    texts: set[str] = set()
    endings: set[str] = set()
    for module in MODULES.values():
        if module.file == "errors.py":
            continue
        texts |= {text.value for text in module.texts}
        for node in module.nodes:
            match node:
                case ast.JoinedStr(values=[ast.FormattedValue(), ast.Constant(value=ending)]):
                    endings |= {ending} if re.fullmatch(r"\.[a-z]+(-[a-z]+)*", ending) else set()
    none(
        id
        for kind, ids in KINDS.items()
        for id in ids
        if id not in texts
        and not id.endswith(tuple(endings))
        and (kind == "CheckFailed" or id.partition(".")[2] not in texts)
    )
