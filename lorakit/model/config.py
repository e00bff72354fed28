"""The settings files of a model folder, taken as data: nothing in them chooses code or files.

`config.json` comes from strangers, and transformers lets it name attention kernels, code and
weights files. It is read here, strictly, and what could do that is refused or left out; the
library gets the finished configuration and never looks at the file.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
)

from lorakit.errors import BadInput, LorakitError, one_of
from lorakit.storage import strict_json
from lorakit.storage.paths import inside
from lorakit.storage.redact import printable

T = TypeVar("T")

NAME = "config.json"
MOST_LAYERS = 1024

# Numbers of layers, of whatever part of a model: some configurations make a list as long as that.
_LAYERS = re.compile(r"(.*_)?(layers?|blocks)")
_KERNELS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_ALLOWED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_ALLOWED_EXPERTS = ("eager", "batched_mm", "grouped_mm")
STORED = "quantization_config"
# What is read of weights stored by bitsandbytes, with what may stand there.
_BITSANDBYTES: Mapping[str, Callable[[Any], bool]] = {
    "load_in_4bit": lambda value: isinstance(value, bool),
    "load_in_8bit": lambda value: isinstance(value, bool),
    "bnb_4bit_quant_type": lambda value: value in ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": lambda value: isinstance(value, bool),
    "bnb_4bit_quant_storage": lambda value: value in ("uint8", "float16", "bfloat16", "float32"),
    "llm_int8_skip_modules": lambda value: (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    ),
}
_WORDS = frozenset("remote kernel kernels import imports plugin plugins".split())
_WEIGHTS = frozenset({"transformers_weights", "fusion_config", "distributed_config"})
# Harmless once they are gone: lorakit makes these choices itself, or nothing reads them.
_DROPPED = re.compile(
    r"_?attn_implementation\w*|_?experts_implementation\w*|trust_remote_code|_?name_or_path"
    r"|_model_name_or_path|custom_pipelines|custom_generate|auto_map"
    # Names of classes, which transformers makes a table of, however many are said to be there.
    r"|num_labels|id2label|label2id"
)


def read_config(folder: Path, *, code_allowed: bool, links_into: Path | None) -> PretrainedConfig:
    """Return the configuration that a model folder holds.

    With `code_allowed`, a model that brings its own classes has those imported.

    Raises:
        BadInput: `model.not-found` without a config.json, `security.*` when it names code, kernels
            or files, `model.unknown-type`, or `model.bad-config` when its values make no model.
    """
    path = inside(folder, NAME, links_into=links_into)
    if not path.is_file():
        raise BadInput(
            "model.not-found",
            f"there is no {NAME} in {folder}",
            where=str(folder),
            help="a model folder holds config.json, *.safetensors and the tokenizer's files",
        )
    given = strict_json.read_object(path, "model")
    stored = stored_quantized(given.pop(STORED, None), str(path))
    values = cleaned(given, str(path)) | stored
    model_type = str(values.get("model_type"))
    own_code = given.get("auto_map")
    if own_code and code_allowed:
        _refuse_foreign_code(own_code, str(path))
        config: PretrainedConfig = attempt(
            str(path),
            lambda: AutoConfig.from_pretrained(
                folder, trust_remote_code=code_allowed, local_files_only=True
            ),
        )
        vars(config).pop(STORED, None)
        config.update(stored)
        return config
    if model_type not in CONFIG_MAPPING:
        if own_code:
            raise _needs_code(own_code, str(path))
        raise BadInput(
            "model.unknown-type",
            f"model_type '{printable(model_type)}' is not known to transformers "
            f"{transformers.__version__}, which is installed",
            where=str(path),
            help="pip install -U transformers",
        )
    config = attempt(str(path), lambda: CONFIG_MAPPING[model_type].from_dict(values))
    inner = values.get("text_config")
    for part in (values, inner if isinstance(inner, dict) else {}):
        _check_stops(part.get("eos_token_id"), config, str(path))
    return config


def read_generation(
    folder: Path, config: PretrainedConfig, *, links_into: Path | None
) -> GenerationConfig:
    """Return the folder's generation settings, those of the configuration where it has none.

    Raises:
        BadInput: when generation_config.json is not strictly JSON, names code, or stops at what is
            no token.
    """
    path = inside(folder, "generation_config.json", links_into=links_into)
    if not path.is_file():
        return GenerationConfig.from_model_config(config)
    values = cleaned(strict_json.read_object(path, "model"), str(path))
    generation = attempt(str(path), lambda: GenerationConfig.from_dict(values))
    _check_stops(generation.eos_token_id, config, str(path))
    return generation


def check_config(config: PretrainedConfig, where: str) -> None:
    """Check that a configuration makes a causal language model of a bounded size.

    Raises:
        BadInput: `model.unknown-type` or `model.bad-config`.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise BadInput(
            "model.unknown-type",
            f"model_type '{config.model_type}' is no language model that writes text",
            where=where,
            help="lorakit adapts causal language models: Llama, Qwen, Mistral, GPT-2 and their kin",
        )
    text = attempt(where, config.get_text_config)
    layers = getattr(text, "num_hidden_layers", 1)
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise BadInput(
            "model.bad-config",
            f"num_hidden_layers is {printable(str(layers))}; expected 1 to {MOST_LAYERS}",
            where=where,
            help="fetch the model again",
        )
    # A family without a limit has a property that says -1.
    is_own = not isinstance(getattr(type(text), "max_position_embeddings", None), property)
    positions = getattr(text, "max_position_embeddings", None)
    if is_own and type(positions) is int and positions < 1:
        raise BadInput(
            "model.bad-config",
            f"max_position_embeddings is {positions}; expected at least 1",
            where=where,
            help="fetch the model again",
        )


def _check_stops(stops: Any, config: PretrainedConfig, where: str) -> None:
    """Check that what ends a text are tokens that the model has; a default is not judged."""
    rows = getattr(attempt(where, config.get_text_config), "vocab_size", None)
    for id in stops if isinstance(stops, list) else [stops]:
        if type(id) is int and type(rows) is int and not 0 <= id < rows:
            raise BadInput(
                "model.bad-config",
                f"eos_token_id is {id}, which is no token: the vocabulary has {rows:,}",
                where=where,
                help="fetch the file again, or set eos_token_id to the tokenizer's end of text",
            )


def attempt(where: str, make: Callable[[], T]) -> T:
    """Make something of a file's values; what the library says against them is the file's fault.

    Raises:
        BadInput: `model.bad-config`.
    """
    try:
        return make()
    except LorakitError:
        raise
    except Exception as error:  # wrong values fail anywhere, down to torch's storage sizes
        text = printable(" ".join(f"{type(error).__name__}: {error}".split()), 300)
        raise BadInput(
            "model.bad-config",
            f"the values make no model: {text}",
            where=where,
            help="fetch the file again, or compare it with that of another model of this kind",
        ) from error


def cleaned(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values without what lorakit decides itself.

    Raises:
        BadInput: when a key, at any depth, chooses code, kernels, files or quantised weights.
    """
    for key, value in _entries(values):
        _check_entry(key, value, where)
    return {key: _without(value) for key, value in values.items() if not _DROPPED.fullmatch(key)}


def stored_quantized(given: Any, where: str) -> dict[str, Any]:
    """Return what `quantization_config` says of weights that bitsandbytes has quantised.

    Raises:
        BadInput: `model.bad-config` for any other way to quantise, or for wrong values.
    """
    if not given:
        return {}
    values = given if isinstance(given, dict) else {}
    bits = [bits for bits in (4, 8) if values.get(f"load_in_{bits}bit") is True]
    method = printable(str(values.get("quant_method", "bitsandbytes" if bits else "unknown")))
    if method != "bitsandbytes" or len(bits) != 1 or values.get("llm_int8_has_fp16_weight"):
        raise BadInput(
            "model.bad-config",
            f"{STORED}: the weights are stored quantised by {method}, which cannot be adapted",
            where=where,
            help="use the model it was made from, with model.quantization: nf4",
        )
    kept = {key: values[key] for key in _BITSANDBYTES if values.get(key) is not None}
    for key, value in kept.items():
        if not _BITSANDBYTES[key](value):
            raise BadInput(
                "model.bad-config",
                f"{STORED}: {key}: found {printable(strict_json.dumps_line(value))}",
                where=where,
                help="fetch the model again",
            )
    return {STORED: {"quant_method": method, **kept}}


def _check_entry(key: str, value: Any, where: str) -> None:
    shown = f"{printable(key)}: {printable(strict_json.dumps_line(value))}"

    def refused(why: str) -> BadInput:
        help = "take the key out: lorakit decides that itself"
        return BadInput("security.config", f"{shown} {why}", where=where, help=help)

    if kernels := _KERNELS.fullmatch(key):
        allowed = _ALLOWED if kernels[1] == "attn" else _ALLOWED_EXPERTS
        for one in value.values() if isinstance(value, dict) else [value]:
            if one is not None and one not in allowed:
                raise refused(f"could load code; expected {one_of(allowed)}")
    elif _LAYERS.fullmatch(key) and isinstance(value, int) and value > MOST_LAYERS:
        raise BadInput(
            "model.bad-config",
            f"{shown}: expected at most {MOST_LAYERS}",
            where=where,
            help="fetch the model again",
        )
    elif key == STORED and value:
        raise refused("would quantise a part of the model")
    elif key in _WEIGHTS and value:
        raise refused("would choose how and from where weights are loaded")
    elif _WORDS & set(key.split("_")) and (isinstance(value, str | dict) and value):
        raise refused("could load code")
    elif key == "trust_remote_code" and value is not False:
        raise refused("belongs in the recipe, not in a model")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without(inner) for k, inner in value.items() if not _DROPPED.fullmatch(k)}
    return [_without(inner) for inner in value] if isinstance(value, list) else value


def _needs_code(own_code: Any, where: str) -> BadInput:
    files = _code_files(own_code)
    return BadInput(
        "security.remote-code",
        f"the model needs its own code, remote code in {one_of(files) if files else 'its folder'}",
        where=where,
        help="read it, then set model.trust_remote_code: true and pass --allow-remote-code",
    )


def _refuse_foreign_code(own_code: Any, where: str) -> None:
    for reference in _references(own_code):
        if "--" in reference:
            raise BadInput(
                "security.remote-code",
                f"auto_map: '{printable(reference)}' is remote code of another model",
                where=where,
                help="only code in the model's own folder is run, even with --allow-remote-code",
            )


def _code_files(own_code: Any) -> list[str]:
    return sorted({f"{r.split('.')[0]}.py" for r in _references(own_code)})


def _references(own_code: Any) -> list[str]:
    values = own_code.values() if isinstance(own_code, dict) else []
    several = [v if isinstance(v, list) else [v] for v in values]
    return [text for group in several for text in group if isinstance(text, str)]
