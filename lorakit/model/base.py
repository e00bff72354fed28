"""The base model: found by its name, checked before a weight is read, loaded frozen.

What `find` returns has passed every check that needs no weights. `load` hands transformers a
finished configuration and a folder whose files were opened and compared with it.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from transformers.utils.import_utils import is_flash_attn_2_available

from lorakit.errors import BadInput, EnvironmentLacks, Notice, Place
from lorakit.model import attention as packed
from lorakit.model import hub, local
from lorakit.model.checks import at_most, check_finite, check_loaded, check_tensors
from lorakit.model.config import NAME, attempt, check_config, read_config, read_generation
from lorakit.model.gguf import read_gguf_config, reading
from lorakit.model.merged import check_shards, check_texts
from lorakit.model.quantized import Quantization, check_asked, check_installed
from lorakit.model.quantizer import adopt, quantize, quantizing
from lorakit.model.sites import find_sites
from lorakit.model.tokenizer import files_sha256, read_tokenizer
from lorakit.model.weights import Loaded, Unread, Weights, has_weights, open_folder
from lorakit.recipe import sections
from lorakit.storage.hashing import sha256_file
from lorakit.storage.paths import hub_cache
from lorakit.threads import Threads

# Its annotations leave out half of what it returns.
_AUTO: Any = AutoModelForCausalLM

MOST_PARAMETERS = 200_000  # tensors of one model

Attention = Literal["auto", "sdpa", "flash", "eager"]


@dataclass(frozen=True)
class Base:
    """A base model that was found and checked, before its weights are loaded.

    `name` is a hub id or the name of a folder or file, never a path. Either `folder` or `gguf` is
    there. `revision` is the commit of a hub id. `links_into` is the cache in which the folder's
    links end. `remote_code` says that the model's own code may run.
    """

    name: str
    folder: Path | None
    gguf: Path | None
    revision: str | None
    config: PretrainedConfig
    generation: GenerationConfig
    remote_code: bool = False
    links_into: Path | None = None
    notices: tuple[Notice, ...] = ()

    @property
    def where(self) -> Path:
        """The folder or file that the base is in."""
        return self.folder or self.gguf or Path()

    @property
    def stored(self) -> Quantization | None:
        """How the files hold the weights, None where they are dense."""
        return Quantization.stored(self.config)

    @property
    def context(self) -> int | None:
        """The model's positions, None where it has no limit."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @property
    def file_bytes(self) -> int:
        """The bytes of the files that hold the weights."""
        if self.gguf:
            return self.gguf.stat().st_size
        with self.weights() as weights:
            return weights.file_bytes

    @property
    def sizes(self) -> dict[str, int]:
        """What most plainly tells one base from another."""
        config = self.config.get_text_config()
        named = {"hidden size": "hidden_size", "layers": "num_hidden_layers"}
        found = {size: getattr(config, key, None) for size, key in named.items()}
        return {size: count for size, count in found.items() if isinstance(count, int)}

    @cached_property
    def fingerprint(self) -> str:
        """A digest that tells these weights from any others of the same shapes."""
        if self.gguf:
            return sha256_file(self.gguf)
        with self.weights() as weights:
            return weights.fingerprint()

    def weights_sha256(self) -> str:
        """Return a digest of every byte of the weights."""
        if self.gguf:
            return self.fingerprint
        with self.weights() as weights, Threads() as threads:
            return weights.sha256(threads)

    def tokenizer_sha256(self) -> str:
        """Return a digest of the tokenizer's files; that of a GGUF file is in its fingerprint."""
        return files_sha256(self.folder) if self.folder else self.fingerprint

    def weights(self) -> Weights:
        """Open the tensors as they are stored; those of a GGUF file dequantised, in bf16.

        Raises:
            LorakitError: as `load` does.
        """
        if self.folder:
            return open_folder(self.folder, links_into=self.links_into)
        model = load(self, device=torch.device("cpu"), dtype=torch.bfloat16)
        return Weights({self.name: Loaded(dict(model.named_parameters()))})

    def facts(self) -> dict[str, Any]:
        """Return what `run.json` and the adapter's passport say about the base."""
        facts: dict[str, Any] = {
            "name": self.name,
            "revision": self.revision,
            "model_type": self.config.model_type,
            "sizes": self.sizes,
            "fingerprint": self.fingerprint,
        }
        if self.stored:
            facts["stored"] = str(self.stored)
        if self.remote_code and self.folder:
            code = sorted(self.folder.glob("*.py"))
            facts["code"] = {path.name: sha256_file(path) for path in code}
        return facts


def find(
    section: sections.Model,
    recipe_folder: Path,
    *,
    offline: bool,
    allow_remote_code: bool,
    cache: Path,
    weights: bool = True,
) -> Base:
    """Find and check the base that a recipe names, reading no weights.

    Where they are not asked for they may be missing, and the hub is not asked for them.
    A path is looked for in the recipe's folder, then in lorakit's cache; only a text that is no
    path and names nothing there is taken for a hub id.

    Raises:
        BadInput: `model.*`, `tokenizer.*` or `security.*`, when its files cannot be used.
        RunFailed: `model.damaged` when a weights file's header is broken.
        EnvironmentLacks: when the hub is needed and cannot be had.
    """
    code = section.trust_remote_code and allow_remote_code
    place = local.place(section.path, recipe_folder, cache)
    if place and section.revision:
        raise BadInput(
            "recipe.conflict",
            f"model.revision is for hub ids; {section.path} is a local model",
            help="take model.revision out",
        )
    notices = _code_notices(section, code)
    if place and place.is_file():
        config = read_gguf_config(place)
        check_config(config, str(place))
        generation = GenerationConfig.from_model_config(config)
        check_asked(section, None)
        return Base(place.name, None, place, None, config, generation, notices=notices)
    name, revision = (place.resolve().name if place else section.path), None
    if not place:
        local.check_id(section.path, recipe_folder, cache)
        try:
            place = hub.snapshot(
                section.path, section.revision, offline=offline, code=code, weights=weights
            )
        except BadInput as error:
            if error.id == "model.not-found":
                error.help = local.meant(section.path, cache) or error.help
            raise
        revision = place.name
    links_into = hub_cache(place)
    check_texts(place)
    config = read_config(place, code_allowed=code, links_into=links_into)
    check_config(config, str(place))
    generation = read_generation(place, config, links_into=links_into)
    base = Base(name, place, None, revision, config, generation, code, links_into)
    check_asked(section, base.stored)
    if not weights and not has_weights(place):
        message = "there are no weights here, so they were not compared with config.json"
        return replace(
            base, notices=(*notices, Notice("model.no-weights", message, Place(str(place))))
        )
    with base.weights() as stored:
        if base.stored is None:
            # Files may hold a few parameters in one tensor, and leave out those that are tied.
            most = 8 * len(stored.names) + 1000
            notices += check_tensors(stored, skeleton(base, most=most), str(place))
    return replace(base, notices=notices)


def skeleton(
    base: Base,
    task: str = "causal-lm",
    dtype: torch.dtype = torch.float32,
    *,
    most: int = MOST_PARAMETERS,
) -> PreTrainedModel:
    """Return the model on the meta device: all shapes and ties, no memory.

    `most` is the number of parameters from which on it is given up.

    Raises:
        BadInput: `model.bad-config` when the configuration makes no model, or
            `model.missing-tensor` when it makes a larger one.
    """
    config = copy.deepcopy(base.config)
    where = str(base.folder / NAME if base.folder else base.gguf)

    def make() -> PreTrainedModel:
        with torch.device("meta"), at_most(most, where):
            model: PreTrainedModel = _AUTO.from_config(
                config, dtype=dtype, trust_remote_code=base.remote_code
            )
        return model.requires_grad_(False)

    return attempt(where, make)


def load(
    base: Base,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: Attention = "auto",
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """Load a base with its weights: frozen, in eval mode, without a key-value cache by default.

    Weights are quantised one by one as they are read, so that they are never all there in `dtype`;
    those of a GGUF file are, in host memory. Weights that are stored quantised stay as they are.
    Dense ones are mapped where the files have their dtype.

    Raises:
        BadInput: `model.missing-tensor` or `model.shape-mismatch`.
        RunFailed: `model.not-finite`, or `model.damaged` for a GGUF file that cannot be read.
        EnvironmentLacks: when flash attention is asked for and not installed, or bitsandbytes.
    """
    where, how = str(base.where), base.stored or quantization
    options: dict[str, Any] = {
        "config": copy.deepcopy(base.config),
        "generation_config": base.generation,
        "dtype": dtype,
        "attn_implementation": _implementation(base, attention),
        "trust_remote_code": base.remote_code,
        "local_files_only": True,
        "output_loading_info": True,
    }
    check_installed(how)
    if device.type != "cpu" and not (base.gguf and how):
        options["device_map"] = {"": device}
    if base.folder:
        check_shards(base.folder)
    place: Path | None = base.folder or base.where.parent
    kind = _AUTO
    with ExitStack() as stack:
        stack.enter_context(_no_progress_bars())
        if base.gguf:
            stack.enter_context(reading(base.gguf))
            unpacked = GgufConfig(dequantize=True)
            options |= {"gguf_file": base.gguf.name, "quantization_config": unpacked}
        else:
            options["use_safetensors"] = True
            if how and not base.stored:
                options["quantization_config"] = stack.enter_context(quantizing(how, where))
                # Mapped, all that was read would stay resident as long as one dense tensor does.
                stored = stack.enter_context(base.weights())
                options["state_dict"] = {name: Unread(stored, name) for name in stored.names}
                place, kind = None, type(skeleton(base))
        model, info = kind.from_pretrained(place, **options)
    check_loaded(info, where)
    if base.stored and how:
        adopt(model, find_sites(skeleton(base)), how)
    check_finite(model, where)
    if base.gguf and how:
        quantize(model, how, device)
    if getattr(model, "hf_quantizer", None):
        # The quantised modules are ours: nothing is left that transformers need know.
        model.hf_quantizer.remove_quantization_config(model)
    model.config.name_or_path = base.name
    model.config.use_cache = False
    loaded: PreTrainedModel = model.requires_grad_(False).eval()
    return loaded


def check_attention(attention: Attention) -> None:
    """Check, before anything is written, that the attention asked for is installed.

    Raises:
        EnvironmentLacks: when it is not.
    """
    if attention == "flash" and not is_flash_attn_2_available():
        raise EnvironmentLacks(
            "env.missing-package",
            "model.attention: flash attention is not installed",
            help="`sdpa` works now: --set model.attention=sdpa",
        )


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer and check it against the model.

    Raises:
        BadInput: `tokenizer.missing` or `tokenizer.mismatch`.
    """
    return read_tokenizer(
        base.folder or base.where.parent,
        base.config,
        gguf=base.gguf.name if base.gguf else None,
        code_allowed=base.remote_code,
        links_into=base.links_into,
    )


def _code_notices(section: sections.Model, code: bool) -> tuple[Notice, ...]:
    if not section.trust_remote_code:
        return ()
    effect = (
        "is on: Python code that comes with the model runs with your rights"
        if code
        else "has no effect without --allow-remote-code"
    )
    return (Notice("security.remote-code", f"model.trust_remote_code {effect}"),)


def _implementation(base: Base, attention: Attention) -> str | None:
    """Return transformers' name of the attention to use; None leaves it to the model's own code."""
    if attention == "flash":
        check_attention(attention)
        return "flash_attention_2"
    if attention != "auto":
        return attention
    if packed.can_pack(base.config) is None:
        return packed.NAME
    if type(base.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(base.config)]
    return "sdpa" if family._supports_sdpa else "eager"


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the library's bars off the terminal, which belongs to the command."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
