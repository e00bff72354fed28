"""Models of the hub: found in its cache, or fetched once and pinned to a commit."""

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lorakit import environment
from lorakit.errors import BadInput, EnvironmentLacks, LorakitError

# Weights in safetensors, settings and tokenizers, all at the top of the repository.
_WANTED = re.compile(r"(?!consolidated)[\w.-]+\.(safetensors|json|jinja|model|txt)|[\w.-]+\.py")
# The errors of its HTTP library, whichever that is, and OSError.
_FAILURES: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, ValueError)
_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_id(text: str) -> bool:
    """Tell whether a text can be the id of a model on the hub."""
    return _ID.fullmatch(text) is not None and ".." not in text and not text.endswith(".gguf")


def has_token() -> bool:
    """Tell whether the hub's library has a token: in the environment, or in its file.

    The library's own question may reach the network to refresh a token; this one never does.
    """
    variables = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    if any(environment.variable(name) for name in variables):
        return True
    try:
        return bool(Path(constants.HF_TOKEN_PATH).read_bytes().strip())
    except OSError:
        return False


def snapshot(
    id: str, revision: str | None, *, offline: bool, code: bool, weights: bool = True
) -> Path:
    """Return the folder of a model in the hub's cache, fetched when it is not there.

    The folder is named after the commit, and every file in it is of that commit. `code` asks for
    the model's own Python files as well; without `weights` those are not fetched.

    Raises:
        BadInput: `model.not-found` when there is no such model or revision, `security.pickle`
            when it has no safetensors.
        EnvironmentLacks: `env.offline` or `env.gated`.
    """
    try:
        if offline:
            return Path(snapshot_download(id, revision=revision, local_files_only=True))
        found = HfApi().model_info(id, revision=revision)
        names = [s.rfilename for s in found.siblings or [] if _WANTED.fullmatch(s.rfilename)]
        if not any(name.endswith(".safetensors") for name in names):
            raise BadInput(
                "security.pickle",
                f"{id} has no .safetensors; pickled weights run code when they are loaded",
                help="take a model or a revision that has them",
            )
        left_out = [".py"] * (not code) + [".safetensors"] * (not weights)
        files = [name for name in names if not name.endswith(tuple(left_out))]
        return Path(snapshot_download(id, revision=found.sha, allow_patterns=files))
    except LorakitError:
        raise
    except _FAILURES as error:
        raise _explained(error, id, revision, offline) from error


def _explained(error: Exception, id: str, revision: str | None, offline: bool) -> LorakitError:
    """Return what an error of the hub's library means to the user."""
    token = "yes" if has_token() else "no"
    if isinstance(error, GatedRepoError):
        return EnvironmentLacks(
            "env.gated",
            f"{id} is gated",
            help=f"1. accept its terms at https://huggingface.co/{id}  "
            f"2. `hf auth login` or set HF_TOKEN (token found: {token})",
        )
    if isinstance(error, RevisionNotFoundError):
        return BadInput("model.not-found", f"{id} has no revision '{revision}'")
    if isinstance(error, HFValidationError):
        return BadInput("model.not-found", f"'{id}' is neither a folder nor the id of a model")
    if isinstance(error, RepositoryNotFoundError):
        return BadInput(
            "model.not-found",
            f"no folder {id}, and no such model on the hub",
            help=f"a private model needs `hf auth login` or HF_TOKEN (token found: {token})",
        )
    if "/" not in id:  # much sooner the name of a folder than one of the hub's few without an owner
        return BadInput(
            "model.not-found",
            f"there is no folder {id} with a config.json, and the hub cannot be asked for {id}",
            help="give the path of a folder, or the id of a model of the hub: org/name",
        )
    if offline or isinstance(error, LocalEntryNotFoundError):
        message = f"{id} is no folder here and is not in the hub's cache; the network is off"
        return EnvironmentLacks("env.offline", message, help="run once with the network on")
    cached = _is_cached(id, revision)
    return EnvironmentLacks(
        "env.offline",
        f"the hub cannot be reached for {id}; its files are {'' if cached else 'not '}in the cache",
        help="run with --offline" if cached else "run again with the network on",
    )


def _is_cached(id: str, revision: str | None) -> bool:
    try:
        snapshot_download(id, revision=revision, local_files_only=True)
    except _FAILURES:
        return False
    return True
