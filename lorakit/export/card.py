"""The model card: README.md beside an adapter, made from what its passport says."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.adapters import Saved, read
from lorakit.data.confined import ConfinedTemplate
from lorakit.errors import BadInput
from lorakit.model.quantized import Quantization
from lorakit.storage import strict_json
from lorakit.storage.publish import publish_file
from lorakit.storage.redact import without_folders

CARD = "README.md"
TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
LOCAL_DATA = (".jsonl", ".json", ".csv", ".parquet")
TRAINING = ("epochs", "max_steps", "batch_size", "learning_rate", "schedule", "warmup", "optimizer")
LIMITS = (
    "An adapter changes its base a little: what the base gets wrong, or must not be used for, "
    "holds for the adapter too. Check the licences of the base and of the data before you share it."
)


def write_card(folder: Path) -> None:
    """Write README.md into an adapter's folder, over the one that is there.

    Raises:
        RunFailed: when the disk refuses.
    """
    publish_file(folder / CARD, card(read(folder)).encode(), replace=True)


def card(saved: Saved) -> str:
    """Return the model card of an adapter.

    The base is called by its hub id or the name of its folder, and no path is absolute.
    """
    passport = without_folders(saved.passport or {})
    base, recipe = passport.get("base", {}), passport.get("recipe", {})
    name = base.get("name") or "the base it was trained on"
    commit = f" at `{base['revision']}`" if base.get("revision") else ""
    method, title = saved.method().name(), passport.get("recipe_name") or saved.folder.name
    maker = f"lorakit {passport['lorakit']}" if "lorakit" in passport else "lorakit"
    parts = [
        _front_matter(passport, method, name),
        f"# {title}\n\nAn adapter ({method}) for `{name}`{commit}, trained with {maker}.",
        "## Use",
        *_use(saved.folder.name, base, passport.get("servable", {})),
        "## Prompt format",
        *_prompt_format(saved, recipe.get("data", {}).get("system")),
        "## Data",
        _table(("set", "rows", "tokens", "trained tokens"), _counts(passport.get("data", {}))),
        "\n".join(_sources(passport.get("data", {}))),
        "## Settings",
        _table(("setting", "value"), _settings(passport)),
        "## Metrics",
        _table(("metric", "value"), _metrics(passport.get("metrics", {}))),
        "## Limits",
        LIMITS,
    ]
    if recipe:
        text = json.dumps(recipe, indent=2, ensure_ascii=False)
        parts.append(f"<details><summary>Recipe</summary>\n\n```json\n{text}\n```\n\n</details>")
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(passport: Mapping[str, Any], method: str, name: str) -> str:
    """Return the block that model hubs read; every value is JSON, which YAML includes."""
    base = passport.get("base", {})
    on_hub = bool(base.get("revision"))
    sources = passport.get("recipe", {}).get("data", {}).get("train", ())
    hub_data = [s["path"] for s in sources if not s["path"].endswith(LOCAL_DATA)]
    values: dict[str, Any] = {
        "library_name": "peft",
        "base_model": name if base.get("name") else None,
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": [
            method,
            "transformers",
            "lorakit",
            *([f"base_model:adapter:{name}"] if on_hub else []),
        ],
        "datasets": hub_data,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items() if value]
    return "\n".join(["---", *lines, "---"])


def _use(folder: str, base: Mapping[str, Any], servable: Mapping[str, str]) -> Iterable[str]:
    """Show how the adapter is used; what serves it is what the passport says, if it does.

    Other programs find a base by its hub id alone: of any other the reader has to say where it is.
    """
    yield f'```\nlorakit generate {folder} "Your prompt"\nlorakit merge {folder} --out merged\n```'
    name: str = base.get("name") or ""
    place = name if base.get("revision") else f"path/to/{name or 'base'}"
    if place != name:
        called = f"`{name}`" if name else "the base that the adapter was trained on"
        yield (
            f"The base is no model of the hub: below, put the place of {called} on your machine "
            f"where it says `{place}`."
        )
    yield (
        "With PEFT:\n\n```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({_pretrained(place)})\n"
        f"model = PeftModel.from_pretrained(base, {json.dumps(folder)})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})\n```"
    )
    verdict = servable.get("vLLM", "no")
    if verdict.startswith("yes"):
        options = verdict.removeprefix("yes").replace(", with", "")
        yield (
            f"With vLLM:\n\n```\nvllm serve {shlex.quote(place)} --enable-lora "
            f"--lora-modules {folder}={folder}{options}\n```"
        )
    if servable:
        yield _table(("program", "serves it"), list(servable.items()))


def _pretrained(place: str) -> str:
    """Return the arguments with which transformers loads a base: a GGUF file goes by its folder."""
    if not place.endswith(".gguf"):
        return json.dumps(place)
    folder, _, file = place.rpartition("/")
    return f"{json.dumps(folder)}, gguf_file={json.dumps(file)}"


def _prompt_format(saved: Saved, system: str | None) -> Iterable[str]:
    """Show what one question becomes; a template that cannot show it is named only."""
    if saved.trained_on_text:
        yield "Plain text: the training used no chat template."
        return
    folder = saved.folder
    settings: dict[str, Any] = {}
    if (folder / TOKENIZER).is_file():
        settings = strict_json.read_object(folder / TOKENIZER, "tokenizer.missing")
    source = settings.get("chat_template")
    if (folder / TEMPLATE).is_file():
        source = (folder / TEMPLATE).read_text(encoding="utf-8")
    if not isinstance(source, str):
        yield "Plain text: the tokenizer has no chat template."
        return
    yield "The chat template beside the adapter; one question becomes"
    messages = [{"role": "user", "content": "Hello!"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    special = {key: text for key in ("bos_token", "eos_token") if (text := settings.get(key))}
    try:
        yield f"````\n{ConfinedTemplate(source, special).render(messages, generation=True)}\n````"
    except BadInput:
        yield "what `apply_chat_template` makes of it."


def _counts(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    found = ((name, data.get(name)) for name in ("train", "eval"))
    keys = ("rows", "tokens", "trained")
    return [(name, *(f"{one[key]:,}" for key in keys)) for name, one in found if one]


def _sources(data: Mapping[str, Any]) -> list[str]:
    return [f"- `{path}`, sha256 `{digest}`" for path, digest in data.get("sha256", {}).items()]


def _settings(passport: Mapping[str, Any]) -> list[tuple[str, str]]:
    train = passport.get("recipe", {}).get("train", {})
    found = {
        **passport.get("settings", {}),
        **{key: train[key] for key in TRAINING if key in train},
        "steps": passport.get("steps"),
        "trained tokens": passport.get("trained_tokens"),
        "resumed inexactly": passport.get("resumed_inexactly"),
        "dtype": passport.get("dtype"),
        "base weights": str(how) if (how := Quantization.recorded(passport)) else None,
        "seed": passport.get("seed"),
        **passport.get("versions", {}),
    }
    return [
        (key, value if isinstance(value, str) else json.dumps(value))
        for key, value in found.items()
        if value not in (None, [], {}, ())
    ]


def _metrics(known: Mapping[str, Any]) -> list[tuple[str, ...]]:
    labels = {"loss": "training loss, last", "best_eval_loss": "evaluation loss, best"}
    return [(labels[key], f"{known[key]:.4g}") for key in labels if known.get(key) is not None]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "Not known."
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines
    )
