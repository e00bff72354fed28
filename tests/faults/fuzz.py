"""Files of strangers, made by chance from good ones: read, or refused in lorakit's own words."""

import json
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lorakit import adapters
from lorakit.data.confined import ConfinedTemplate
from lorakit.errors import LorakitError
from lorakit.recipe.reader import read
from lorakit.storage import strict_json
from lorakit.storage.manifest import write_manifest
from lorakit.storage.tensors import TensorFile
from lorakit.training import checkpoint
from tests.faults.subject import Subject
from tests.faults.trials import Trial, chance

LONGEST = 3.0  # seconds for one file; the machine may be busy
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**63, 10**400, 0.5, -0.0, 1e308, "", "0", "a", "\u202e"),
    *("\x1b[31m", "..", "/etc/passwd", "re:(a+)+$", "q_proj", "é" * 99),
    *([], {}, [[]], [None], {"": 0}, ["q_proj", 1]),
)
SNIPPETS = (
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\r", b"\n", b"\n\n", b"\t", b"  "),
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"|", b"~", b"#", b"- ", b"? ", b"&a ", b"*a"),
    *(b"NaN", b"1e999", b"\\ud800", b"!!python/object:os.system ", b"1e-4", b"01:30", b"no"),
    *(b"9" * 400, b"[" * 99, b"{" * 99),
)
TEMPLATE_PARTS = """
{% for m in messages %}
{% endfor %}
{{ m.content }}
{{ messages[0]['role'] }}
{% if x %}
{% else %}
{% endif %}
{{ 'a' * 9 }}
{{ 'a' * 99999999 }}
{{ 10 ** 99 ** 99 }}
text
{% set ns = namespace(x='ab') %}
{% set ns.x = ns.x ~ ns.x %}
{% set ns.x = [ns.x, ns.x] %}
{{ ns.x }}
{{ ns.x | tojson }}
{{ ''.__class__ }}
{{ cycler.__init__.__globals__ }}
{{ messages | tojson(indent=999) }}
{{ raise_exception('no') }}
{% macro f() %}{{ f() }}{% endmacro %}
{{ f() }}
{% for i in range(99999) %}
{{ i }}
{{
{% generation %}
{% endgeneration %}
{{ bos_token }}
{{ m.content | replace('a', 'b' * 99) }}
{{ '%9999d' % 3 }}
{{ '{:>99999999}'.format(3) }}
{{ messages | map('upper') | list }}
{#
#}
{{ namespace.__init__ }}
{{ (1, 2, 3) | sum }}
{{ 'x' | center(99999999) }}
{% break %}
""".strip().splitlines()


def quickly(action: Callable[[], object]) -> bool:
    """Do something; tell whether it was accepted. It may only be refused in lorakit's words."""
    began = time.monotonic()
    accepted = False
    with suppress(LorakitError):
        action()
        accepted = True
    took = time.monotonic() - began
    assert took < LONGEST, f"took {took:.1f} s"
    return accepted


def bent(content: bytes, rng: random.Random) -> bytes:
    """Change a file here and there, as bytes."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(5):
            case 0:
                found[at:at] = rng.choice(SNIPPETS)
            case 1:
                del found[at : at + rng.choice((1, 1, 5, 50))]
            case 2:
                found[at : at + 1] = bytes([rng.randrange(256)])
            case 3:
                end = at + rng.randrange(40)
                found[at:at] = found[at:end]
            case 4:
                lines = found.split(b"\n")
                rng.shuffle(lines)
                found = bytearray(b"\n".join(lines))
    return bytes(found)


def odd(value: Any, rng: random.Random) -> Any:
    """Change a JSON value somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {f"{key}x": value[key]}
            case _:
                return value | {key: odd(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], odd(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


def bent_json(content: bytes, rng: random.Random) -> bytes:
    """Change a JSON file: its values, its bytes, or both."""
    if rng.random() < 0.7:
        value = json.loads(content)
        for _ in range(rng.choice((1, 1, 3))):
            value = odd(value, rng)
        content = json.dumps(value).encode()
        if rng.random() < 0.8:
            return content
    return bent(content, rng)


def recipes(subject: Subject, case: int, folder: Path) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(bent((subject.folder / "recipe.yaml").read_bytes(), chance("k1", case)))
    quickly(lambda: read(path, adapters.settings_for, [], environ={}))


def adapter_settings(subject: Subject, case: int, folder: Path) -> None:
    rng = chance("k2", case)
    source = subject.whole / "adapter"
    for name in ("adapter_config.json", "adapter_model.safetensors", "lorakit.json"):
        shutil.copy(source / name, folder)
    path = folder / rng.choice(("adapter_config.json", "adapter_config.json", "lorakit.json"))
    path.write_bytes(bent_json(path.read_bytes(), rng))
    quickly(lambda: adapters.read(folder))


@cache
def good_tensors(subject: Subject) -> bytes:
    return (subject.whole / "checkpoints" / "step-000004" / "optimizer.safetensors").read_bytes()


def headers(subject: Subject, case: int, folder: Path) -> None:
    """Refuse at least what the library refuses, and read the same where both accept."""
    rng = chance("k3", case)
    content = good_tensors(subject)
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    match rng.randrange(4):
        case 0:
            content = bent(content[: 8 + length], rng) + data
        case 1:
            length = rng.choice(
                (0, 1, 7, length - 1, length + 1, 2**40, 2**63, rng.getrandbits(64))
            )
            content = length.to_bytes(8, "little") + header + data
        case _:
            header = bent_json(header.rstrip(), rng)
            header += b" " * (-len(header) % 8)
            content = len(header).to_bytes(8, "little") + header + data
    path = folder / "optimizer.safetensors"
    path.write_bytes(content)
    found: dict[str, tuple[int, ...]] = {}

    def ours() -> None:
        with TensorFile(path, "checkpoint") as file:
            for name in file.names:
                found[name] = tuple(file.read(name).shape)

    if quickly(ours):
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())  # it is no dictionary
                theirs = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise AssertionError(f"accepted what safetensors refuses: {error}") from error
        assert found == theirs


def rows(subject: Subject, case: int, folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(bent((subject.folder / "rows.jsonl").read_bytes(), chance("k4", case)))
    quickly(lambda: list(strict_json.read_lines(path)))


def templates(subject: Subject, case: int, folder: Path) -> None:
    rng = chance("k5", case)
    source = "".join(rng.choices(TEMPLATE_PARTS, k=rng.randint(1, 8)))
    message = {"role": "user", "content": "a" * 40}
    variables = {"bos_token": "<s>"}
    quickly(lambda: ConfinedTemplate(source, variables).render([message] * 3, generation=True))


def states(subject: Subject, case: int, folder: Path) -> None:
    """Forge a checkpoint whose digests are right, or its manifest."""
    rng = chance("k6", case)
    step = folder / "step-000004"
    shutil.copytree(subject.whole / "checkpoints" / "step-000004", step)
    forged = rng.choice(("state.json", "manifest.json", "adapter/adapter_config.json"))
    (step / forged).write_bytes(bent_json((step / forged).read_bytes(), rng))
    if forged != "manifest.json":
        (step / "manifest.json").unlink()
        write_manifest(step)

    def resume() -> None:
        found, _ = checkpoint.newest(folder)
        if found:
            checkpoint.check_unchanged(found, {}, allow_inexact=True)
            adapters.read(found.adapter)

    quickly(resume)


TRIALS = [
    Trial("k1", "recipes, changed at random", 5_000, 60, recipes),
    Trial("k2", "adapter settings and passports, changed at random", 5_000, 60, adapter_settings),
    Trial("k3", "safetensors headers, against the safetensors library", 20_000, 200, headers),
    Trial("k4", "rows of JSONL, changed at random", 5_000, 100, rows),
    Trial("k5", "chat templates, put together at random", 5_000, 60, templates),
    Trial("k6", "checkpoint states and manifests, forged", 5_000, 60, states),
]
