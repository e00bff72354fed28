"""Read a PEFT folder to the letter: every tensor and every setting accounted for, or an error.

What a person can edit (settings, names, shapes, dtypes) is bad input; damaged bytes and values
that are not finite are a failure. What cannot be seen without the base is checked in `_saved`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from torch import Tensor

from lorakit import adapters
from lorakit.adapters._method import Method, MethodSettings
from lorakit.adapters._names import Names
from lorakit.adapters._peft import Found, PeftConfig, shown
from lorakit.errors import BadInput, Notice, Place, RunFailed, one_of
from lorakit.storage import strict_json
from lorakit.storage.hashing import check_sha256, sha256_json
from lorakit.storage.paths import hub_cache, inside, refuse_pickle
from lorakit.storage.redact import printable
from lorakit.storage.tensors import DTYPES, TensorFile

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PASSPORT = "lorakit.json"
DIGEST = "sha256"  # key of the passport: of all the rest of it
FORMAT = 1  # of the passport; a larger number cannot be read

TEXT = "text"  # what data calls the format of plain text

CODES = ("F32", "F16", "BF16")
COMMON_KEYS = frozenset(
    """
    peft_type task_type base_model_name_or_path revision inference_mode peft_version
    target_modules exclude_modules modules_to_save layers_to_transform layers_pattern
    """.split()
)
TASKS = (None, "CAUSAL_LM")


class _Source(BaseModel):
    format: str | None = None


class _Data(BaseModel):
    train: list[_Source] = []
    format: str | None = None
    system: str | None = None


class _Model(BaseModel):
    path: str | None = None
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"


class _Recipe(BaseModel):
    model: _Model = _Model()
    data: _Data = _Data()


class _Counts(BaseModel):
    formats: dict[str, int] = {}


class _Rows(BaseModel):
    train: _Counts | None = None


class _Base(BaseModel):
    name: str | None = None
    revision: str | None = None
    sizes: dict[str, int] = {}
    fingerprint: str | None = None


class _Passport(BaseModel):
    """What is read of a passport: each part may be absent, and none may be of another type."""

    base: _Base = _Base()
    recipe: _Recipe = _Recipe()
    data: _Rows = _Rows()
    template_sha256: str | None = None
    servable: dict[str, str] = {}


@dataclass(frozen=True)
class Saved:
    """An adapter as it was found on disk.

    `tensors` are called as `Layer.tensors` calls them; `base_copies` are whole embeddings of the
    base that PEFT puts beside their update, by module path.
    """

    folder: Path
    config: PeftConfig
    settings: MethodSettings
    tensors: Mapping[str, Tensor]
    base_copies: Mapping[str, Tensor]
    passport: Mapping[str, Any] | None
    notices: tuple[Notice, ...]

    @property
    def links_into(self) -> Path | None:
        """The cache in which the folder's links may end; there is none but for a snapshot."""
        return hub_cache(self.folder)

    @property
    def file(self) -> str:
        """The file of tensors, for messages."""
        return str(self.folder / TENSORS)

    @property
    def trained_on_text(self) -> bool:
        """Whether all rows of the training were plain text, which sees no chat template."""
        passport = _Passport.model_validate(self.passport or {})
        named = passport.recipe.data  # all that passports told before they told what was found
        if passport.data.train and passport.data.train.formats:
            return passport.data.train.formats.keys() == {TEXT}
        return {one.format or named.format for one in named.train} == {TEXT}

    def method(self) -> Method:
        """Return the method with the settings of the file."""
        return adapters.get(self.settings.method)(self.settings)


def read(path: Path) -> Saved:
    """Read an adapter's folder, or the `adapter/` of a run's folder.

    Raises:
        BadInput: when a file is missing or a setting, a name, a shape or a dtype is wrong.
        RunFailed: when bytes are damaged or values are not finite.
    """
    folder = _locate(path)
    links_into = hub_cache(folder)
    settings_file, tensors_file = (
        inside(folder, name, links_into=links_into) for name in (CONFIG, TENSORS)
    )
    config = PeftConfig(strict_json.read_object(settings_file, "adapter"), str(folder / CONFIG))
    with TensorFile(tensors_file, "adapter") as file:
        passport = _read_passport(folder, links_into)
        config.refuse_imports()
        method = _method(config, passport)
        odd = config.refuse_unknown(COMMON_KEYS | method.PEFT_KEYS, method.PEFT_FIXED)
        if (task := config.values.get("task_type")) not in TASKS:
            raise config.wrong("task_type", f"{shown(task)} is not supported")
        names = Names.of(method, file.names)
        names.check(method, config, str(file.path))
        _check_dtypes(file)
        shapes = {name: file.shape(key) for name, key in names.keys.items()}
        settings = _settings(method, config, Found(tuple(names.parts), tuple(names.copies), shapes))
        tensors = {name: _finite(file, key) for name, key in names.keys.items()}
        copies = {module: _finite(file, key) for module, key in names.base_copies.items()}
    notices = [
        Notice("adapter.unknown-setting", f"{key} is not known and is ignored", Place(config.path))
        for key in odd
    ]
    if passport is None:
        message = f"there is no {PASSPORT}: nothing tells which base the adapter was trained on"
        notices.append(Notice("adapter.no-passport", message, Place(str(folder))))
    elif _is_changed(passport):
        message = f"{PASSPORT} was changed after it was written: what it says may be wrong"
        notices.append(Notice("adapter.passport-changed", message, Place(str(folder))))
    return Saved(folder, config, settings, tensors, copies, passport, tuple(notices))


def _locate(path: Path) -> Path:
    """Return the folder that holds the adapter's two files.

    Raises:
        BadInput: `adapter.not-found`, `adapter.missing-file`, `security.pickle` or `security.path`.
    """
    # Not Path's own questions: a name that is too long is an answer, not an error.
    if not os.path.isdir(path):
        there = os.path.lexists(path)
        what = "is no folder, as an adapter is" if there else "there is no such folder"
        help = "name the adapter's folder, or that of the run which trained it"
        raise BadInput("adapter.not-found", what, where=printable(str(path), 500), help=help)
    nested = path / "adapter"
    folder = nested if (nested / CONFIG).is_file() and not (path / CONFIG).is_file() else path
    present = sorted(entry.name for entry in folder.iterdir())
    for name in (CONFIG, TENSORS):
        if name in present:
            continue
        for other in present:
            if name == TENSORS and other.startswith(("adapter_model.", "pytorch_model.")):
                refuse_pickle(other, folder)
        message = f"{name} is missing; found {', '.join(map(printable, present[:10])) or 'nothing'}"
        help = f"an adapter's folder holds {CONFIG} and {TENSORS}"
        raise BadInput("adapter.missing-file", message, where=str(folder), help=help)
    return folder


def _read_passport(folder: Path, links_into: Path | None) -> dict[str, Any] | None:
    """Read the passport and compare the tensors with its digest; None when there is none.

    Raises:
        BadInput: when it is not one, or of a later format.
        RunFailed: `adapter.damaged` when the digest differs.
    """
    if not os.path.lexists(folder / PASSPORT):
        return None
    path = inside(folder, PASSPORT, links_into=links_into)
    passport = strict_json.read_object(path, "adapter")
    version, files = passport.get("format"), passport.get("files")
    if type(version) is not int or version > FORMAT:
        message = f"format {shown(version)} cannot be read, only up to {FORMAT}"
        raise BadInput("adapter.bad-config", message, where=str(path), help="update lorakit")
    if not isinstance(files, dict) or not isinstance(files.get(TENSORS), str):
        raise BadInput("adapter.bad-config", f"files holds no digest of {TENSORS}", where=str(path))
    try:
        _Passport.model_validate(passport)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = f"{key}: a value of another type is expected, found {shown(first['input'])}"
        raise BadInput("adapter.bad-config", message, where=str(path)) from None
    check_sha256(inside(folder, TENSORS, links_into=links_into), files[TENSORS], "adapter")
    tokenizer = {n: d for n, d in files.items() if n not in (CONFIG, TENSORS)}
    _check_tokenizer(folder, tokenizer, links_into)
    return passport


def _is_changed(passport: Mapping[str, Any]) -> bool:
    """Tell whether a passport is no longer what its own digest says."""
    rest = {key: value for key, value in passport.items() if key != DIGEST}
    return DIGEST in passport and passport[DIGEST] != sha256_json(rest)


def _check_tokenizer(folder: Path, digests: Mapping[str, Any], links_into: Path | None) -> None:
    """Check the files of the tokenizer; where none is there, the base's is used.

    Raises:
        RunFailed: `adapter.damaged` when one has changed, or some are missing.
    """
    paths = {name: inside(folder, name, links_into=links_into) for name in digests}
    if not any(path.is_file() for path in paths.values()):
        return
    for name, path in paths.items():
        if not path.is_file():
            message = f"{printable(name)} is missing beside the tokenizer's other files"
            raise RunFailed("adapter.damaged", message, where=str(folder))
        check_sha256(path, str(digests[name]), "adapter")


def _method(config: PeftConfig, passport: Mapping[str, Any] | None) -> type[Method]:
    """Return the method that reads these settings, the passport's when there are several.

    Raises:
        BadInput: `adapter.unknown-type` when there is none.
    """
    methods = {name: adapters.get(name) for name in adapters.names()}
    fits = [name for name, method in methods.items() if method.reads(config.values)]
    named = (passport or {}).get("method")
    if named is None and fits:
        return methods[fits[0]]
    if named in fits:
        return methods[named]
    types = one_of(sorted({method.PEFT_TYPE for method in methods.values()}))
    message = f"expected {types}, found {shown(config.values.get('peft_type'))}"
    if named is not None:
        message += f" with these flags, and {PASSPORT} names the method {shown(named)}"
    raise config.wrong("peft_type", message, "adapter.unknown-type")


def _settings(method: type[Method], config: PeftConfig, found: Found) -> MethodSettings:
    """Return the method's settings; what they forbid is wrong in the file too."""
    try:
        return method.from_peft(config, found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise config.wrong(key, f"{first['msg']}, found {shown(first['input'])}") from None


def _check_dtypes(file: TensorFile) -> None:
    codes = {dtype: code for code, dtype in DTYPES.items()}
    for name in file.names:
        if (code := codes[file.dtype(name)]) not in CODES:
            raise BadInput(
                "adapter.wrong-dtype",
                f"{printable(name, 200)} is {code}; expected {one_of(CODES)}",
                where=str(file.path),
                help="save the adapter again in one of these",
            )


def _finite(file: TensorFile, key: str) -> Tensor:
    """Read a tensor whose every value is finite.

    Raises:
        RunFailed: `adapter.not-finite`.
    """
    tensor = file.read(key)
    if wrong := tensor.numel() - int(tensor.isfinite().sum()):
        message = f"{printable(key, 200)} holds {wrong:,} values that are NaN or infinite"
        help = "train the adapter or fetch it again"
        raise RunFailed("adapter.not-finite", message, where=str(file.path), help=help)
    return tensor
