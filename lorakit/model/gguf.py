"""GGUF files: read by transformers, dequantised, with their faults told apart."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from lorakit.errors import BadInput, EnvironmentLacks, RunFailed
from lorakit.model.weights import refuse_disguises
from lorakit.storage.paths import open_regular
from lorakit.storage.redact import printable

MAGIC = b"GGUF"


def read_gguf_config(path: Path) -> PretrainedConfig:
    """Return the configuration that a GGUF file's metadata describes.

    Raises:
        BadInput: `model.unknown-type` when transformers cannot read this kind of model.
        RunFailed: `model.damaged` when the file is no GGUF file, or is cut off.
        EnvironmentLacks: when the gguf package is needed and missing.
    """
    with open_regular(path, "model") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise RunFailed("model.damaged", "the file does not begin as GGUF", where=str(path))
    refuse_disguises(path.parent)
    with reading(path):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False, local_files_only=True
        )
    return config


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Let transformers read a GGUF file: say what its errors mean, and keep its bars to itself.

    Raises:
        BadInput: `model.unknown-type`.
        RunFailed: `model.damaged`.
        EnvironmentLacks: `env.missing-package`.
    """
    try:
        with redirect_stderr(io.StringIO()):  # no other switch reaches that bar
            yield
    except ImportError as error:
        raise EnvironmentLacks(
            "env.missing-package",
            f"reading {path.name} needs the gguf package",
            help='pip install "lorakit[gguf]"',
        ) from error
    except Exception as error:  # its reader meets damage as any kind of error
        text = printable(" ".join(str(error).split()), 200)
        if isinstance(error, NotImplementedError) or "not supported" in text:
            raise BadInput("model.unknown-type", text, where=str(path)) from error
        raise RunFailed(
            "model.damaged",
            f"the file cannot be read as GGUF: {text}",
            where=str(path),
            help="fetch the file again",
        ) from error
