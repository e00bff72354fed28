"""Artifacts that attack who loads them: nothing of theirs is imported, run, read, sent or written.

An audit hook sees what the interpreter does while a command loads one, and what the process does
that renders templates; each also tries to leave a file behind.
"""

import json
import os
import pickle
import random
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lorakit import environment
from tests.faults.audit import watch_all
from tests.faults.forked import run
from tests.faults.subject import RECIPE, Subject, copied
from tests.faults.trials import Trial, chance

CODE = "import pathlib; pathlib.Path({canary!r}).write_text('here')\n"
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch {canary}') }}",
    "{{ self.__init__.__globals__.__builtins__.open('{canary}', 'w') }}",
    "{{ joiner.__init__.__globals__['os'].popen('touch {canary}') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ ('%s' | attr('format'))('x') }}{{ messages.append(1) }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.sys.modules['os'].system('touch {canary}') }}",
    "{{ 10 ** (10 ** 7) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x | tojson }}",
)
COMMANDS = {
    "adapter": ("generate adapter hi --max-new-tokens 2", "merge adapter --out out --no-verify"),
    "model": ("plan recipe.yaml", "merge adapter --base model --out out"),
    "recipe": (
        "plan recipe.yaml",
        "train recipe.yaml --out run",
        "data check recipe.yaml",
        "eval recipe.yaml --adapter adapter",
    ),
    "checkpoint": ("train recipe.yaml --out run --resume",),
}

# What runs the code in what it loads.
LOADERS = (
    (torch, "load"),
    (torch.serialization, "load"),
    (pickle, "load"),
    (pickle, "loads"),
    (pickle, "Unpickler"),
)
# What libraries import only to tell of an error.
TELLING = frozenset({"jinja2.debug", "pydantic._internal._dataclasses"})

Spoil = Callable[[Path, random.Random, str], None]


class Bomb:
    """A pickle that runs code when it is loaded."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.canary}",))


def edited(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled_adapter(folder: Path, rng: random.Random, canary: str) -> None:
    adapter = folder / "adapter"
    target = adapter / f"adapter_model{rng.choice(('.bin', '.pt', '.pkl'))}"
    target.write_bytes(pickle.dumps(Bomb(canary)))
    if rng.random() < 0.5:
        (adapter / "adapter_model.safetensors").unlink()
    else:
        shutil.copy(target, adapter / "adapter_model.safetensors")


def importing_adapter(folder: Path, rng: random.Random, canary: str) -> None:
    (folder / "adapter" / "evil.py").write_text(CODE.format(canary=canary))
    key, value = rng.choice(
        (
            ("auto_mapping", {"base_model_class": "Evil", "parent_library": "evil"}),
            ("megatron_core", "evil"),
            ("megatron_config", {"module": "evil"}),
            ("peft_type", "evil.Evil"),
            ("task_type", "evil.Evil"),
            ("loftq_config", {"evil": "evil.Evil"}),
            ("base_model_name_or_path", "../../../../etc"),
            ("target_modules", "(q_proj|v_proj|(a+)+)+$"),
            ("runtime_config", {"ephemeral_gpu_offload": "evil"}),
        )
    )
    edited(folder / "adapter" / "adapter_config.json", **{key: value})
    if rng.random() < 0.5:
        (folder / "adapter" / "lorakit.json").unlink()


def linked_adapter(folder: Path, rng: random.Random, canary: str) -> None:
    name = rng.choice(("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"))
    path = folder / "adapter" / name
    path.unlink()
    path.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", str(folder / "nothing"))))


def coded_model(folder: Path, rng: random.Random, canary: str) -> None:
    model = folder / "model"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (model / name).write_text(CODE.format(canary=canary))
    auto = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", None],
    }
    changes: tuple[tuple[str, Mapping[str, Any]], ...] = (
        ("config.json", {"auto_map": auto}),
        ("config.json", {"auto_map": auto, "model_type": "evil"}),
        ("config.json", {"auto_map": {"AutoConfig": "evil/repo--configuration_evil.Evil"}}),
        ("config.json", {"attn_implementation": "evil/kernel"}),
        ("config.json", {"_attn_implementation_internal": "evil/kernel"}),
        ("config.json", {"experts_implementation": "evil/kernel"}),
        ("config.json", {"trust_remote_code": True, "auto_map": auto}),
        ("config.json", {"quantization_config": {"quant_method": "evil", "modules": "evil"}}),
        ("config.json", {"custom_generate": "evil", "model_type": "../../evil"}),
        ("tokenizer_config.json", {"auto_map": auto, "tokenizer_class": "Evil"}),
        ("tokenizer_config.json", {"tokenizer_class": "os.system"}),
        ("tokenizer_config.json", {"tokenizer_file": "/etc/passwd", "name_or_path": "/etc"}),
        ("generation_config.json", {"trust_remote_code": True, "custom_generate": "evil"}),
    )
    name, values = rng.choice(changes)
    edited(model / name, **values)


def leading_outside(folder: Path, rng: random.Random, canary: str) -> None:
    """Point the index of a model's shards at other files."""
    model = folder / "model"
    index = {"metadata": {}, "weight_map": {"model.norm.weight": None}}
    os.mkfifo(folder / "fifo")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(canary)))
    secret = shutil.copy(model / "model.safetensors", folder / "secret.safetensors")
    where = ("../secret.safetensors", str(secret), "pytorch_model.bin", "/etc/passwd", "../fifo")
    index["weight_map"]["model.norm.weight"] = rng.choice(where)  # type: ignore[index]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()


def escaping_template(folder: Path, rng: random.Random, canary: str) -> None:
    template = rng.choice(ESCAPES).replace("{canary}", canary)
    for place in ("model", "adapter"):
        (folder / place / "chat_template.jinja").write_text(template)
    (folder / "adapter" / "lorakit.json").unlink()


def running_recipe(folder: Path, rng: random.Random, canary: str) -> None:
    (folder / "evil.py").write_text(CODE.format(canary=canary))
    changes: tuple[str, ...] = (
        json.dumps(RECIPE | {"data": {"train": "rows.jsonl", "format": "evil:run"}}),
        json.dumps(RECIPE | {"model": {"path": "model", "trust_remote_code": True}}),
        f"model: !!python/object/apply:os.system ['touch {canary}']\ndata: {{train: rows.jsonl}}\n",
        "model: file:///etc\ndata: {train: rows.jsonl}\n",
        "extends: https://example.org/evil.yaml\nmodel: model\ndata: {train: rows.jsonl}\n",
        f"extends: {folder}/evil.py\nmodel: model\ndata: {{train: rows.jsonl}}\n",
        "model: model\ndata: {train: evil.py}\n",
        "model: ${HF_TOKEN}\ndata: {train: rows.jsonl}\n",
        "model: model\ndata: {train: rows.jsonl}\noutput_dir: ../../../evil\n",
        "model: model\ndata: {train: rows.jsonl}\nplugins: [evil]\n",
        "model: model\ndata: {train: rows.jsonl, chat_template: /etc/passwd}\n",
    )
    (folder / "recipe.yaml").write_text(rng.choice(changes))


def spoilt_checkpoint(folder: Path, rng: random.Random, canary: str) -> None:
    step = folder / "run" / "checkpoints" / "step-000004"
    kind = rng.randrange(4)
    if kind == 0:
        (step / "optimizer.pt").write_bytes(pickle.dumps(Bomb(canary)))
    elif kind == 1:
        shutil.rmtree(step / "adapter")
        (step / "adapter").symlink_to(folder / "adapter")
    elif kind == 2:
        (step / "state.json").write_bytes(pickle.dumps(Bomb(canary)))
    else:
        (step / "state.json").unlink()
        (step / "state.json").symlink_to("/etc/passwd")


ARTIFACTS: tuple[tuple[str, Spoil], ...] = (
    ("adapter", pickled_adapter),
    ("adapter", importing_adapter),
    ("adapter", linked_adapter),
    ("adapter", escaping_template),
    ("model", coded_model),
    ("model", leading_outside),
    ("recipe", escaping_template),
    ("recipe", running_recipe),
    ("checkpoint", spoilt_checkpoint),
)


def loaded(subject: Subject, case: int, folder: Path) -> None:
    rng = chance("s1", case)
    kind, spoil = ARTIFACTS[case // 30]
    command = rng.choice(COMMANDS[kind])
    usual = imported(subject, kind, command)
    lay_out(subject, kind, folder)
    canary, log = folder / "canary", folder / "events"
    spoil(folder, rng, str(canary))

    def action() -> int:
        os.environ["HF_TOKEN"] = "hf_" + "c" * 30
        return watched(subject, folder, command, usual)

    ended = run(action)
    what = f"{spoil.__name__} in {command}"
    assert not canary.exists(), f"{what}: its code ran: {ended}"
    events = log.read_text() if log.exists() else ""
    assert not events, f"{what}: {events}"
    assert ended.code in (0, 2, 3, 4), f"{what}: {ended}"
    assert "Traceback" not in ended.said, f"{what}: {ended}"
    assert "c" * 30 not in ended.said, f"{what}: {ended}"
    assert "root:" not in ended.said, f"{what}: {ended}"


def lay_out(subject: Subject, kind: str, folder: Path) -> None:
    """Put into a folder what the commands of a kind of artifact take, as yet harmless."""
    copied(subject.folder / "model", folder / "model")
    copied(subject.whole / "adapter", folder / "adapter")
    for name in ("recipe.yaml", "rows.jsonl"):
        shutil.copy(subject.folder / name, folder)
    if kind == "checkpoint":
        copied(subject.whole, folder / "run")


def watched(subject: Subject, folder: Path, command: str, usual: frozenset[str] | None) -> int:
    """Run a command in a folder; `events` there is what it did and should not."""
    places = (folder, subject.folder, environment.cache_folder())
    os.chdir(folder)
    for module, name in LOADERS:
        setattr(module, name, refused(f"{module.__name__}.{name}"))
    watch_all(folder / "events", places, usual)
    return Subject(folder).lorakit(*command.split())


def refused(name: str) -> Callable[..., Any]:
    """Return what takes the place of a loader: a call is an event, and loads nothing."""

    def loader(*_: Any, **__: Any) -> Any:
        sys.audit("tests.loader", name)
        raise AssertionError(f"{name} was called")

    return loader


@cache
def imported(subject: Subject, kind: str, command: str) -> frozenset[str]:
    """Return the modules that a command imports, in any interpreter, when nothing is hostile."""
    folder = subject.own(f"clean-{kind}-{command.split()[0]}")
    folder.mkdir()
    lay_out(subject, kind, folder)
    ended = run(lambda: watched(subject, folder, command, None))
    assert ended.code == 0, ended
    found = re.findall(r"^import \('([^']+)'", (folder / "events").read_text(), re.MULTILINE)
    return TELLING.union(found)


TRIALS = [
    Trial("s1", "hostile adapters, models, recipes, templates, checkpoints", 270, 18, loaded),
]
