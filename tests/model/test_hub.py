"""The hub: never reached in a test; its errors and its cache folders are."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from lorakit.errors import LorakitError
from lorakit.model import base, hub
from lorakit.recipe.sections import Model
from tests.model.finding import load
from tests.tiny import write_tiny_model

ID, COMMIT = "org/tiny", "0123456789abcdef0123456789abcdef01234567"


def failing(error: type[Exception]) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> None:
        failure = error.__new__(error)
        Exception.__init__(failure, "it went wrong")
        raise failure

    return call


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return a snapshot as the hub's library keeps it: a folder of links into `blobs`."""
    repository = tmp_path / "hub/models--org--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / COMMIT
    write_tiny_model(blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def find(tmp_path: Path, *, offline: bool = False, revision: str | None = None) -> base.Base:
    section = Model(path=ID, revision=revision)
    return base.find(
        section, tmp_path, offline=offline, allow_remote_code=False, cache=tmp_path / "none"
    )


def answer(
    monkeypatch: pytest.MonkeyPatch, names: list[str], snapshot: Path | None = None
) -> list[Any]:
    """Let the hub hold these files; return the calls that fetch."""
    calls: list[Any] = []
    info = SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=n) for n in names])
    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(model_info=lambda *_, **__: info))

    def fetch(*arguments: Any, **options: Any) -> str:
        calls.append((arguments, options))
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    return calls


def test_a_cached_model_loads_over_its_links(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = answer(monkeypatch, [], cache)
    found = find(tmp_path, offline=True)
    assert (found.name, found.revision) == (ID, COMMIT)
    load(found)
    base.load_tokenizer(found)
    assert calls == [((ID,), {"revision": None, "local_files_only": True})]


def test_a_link_out_of_the_cache_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, [], cache)
    elsewhere = write_tiny_model(tmp_path / "elsewhere")
    (cache / "model.safetensors").unlink()
    (cache / "model.safetensors").symlink_to(elsewhere / "model.safetensors")
    with pytest.raises(LorakitError) as error:
        find(tmp_path, offline=True)
    assert error.value.id == "security.path"


def test_only_needed_files_of_one_commit_are_fetched(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ["config.json", "model.safetensors", "tokenizer.json", "merges.txt", "chat.jinja"]
    left = ["pytorch_model.bin", "consolidated.safetensors", "sub/model.safetensors", "code.py"]
    calls = answer(monkeypatch, wanted + left, cache)
    find(tmp_path, revision="main")
    assert calls == [((ID,), {"revision": COMMIT, "allow_patterns": wanted})]
    hub.snapshot(ID, None, offline=False, code=True)
    assert calls[-1][1]["allow_patterns"] == [*wanted, "code.py"]


def test_a_model_of_pickles_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answer(monkeypatch, ["config.json", "pytorch_model.bin"])
    with pytest.raises(LorakitError) as error:
        find(tmp_path)
    assert error.value.id == "security.pickle"
    assert calls == []


@pytest.mark.parametrize(
    ("failure", "id", "exit_code", "help"),
    [
        (errors.GatedRepoError, "env.gated", 4, "accept its terms"),
        (errors.RepositoryNotFoundError, "model.not-found", 2, "token found"),
        (errors.RevisionNotFoundError, "model.not-found", 2, ""),
        (errors.HFValidationError, "model.not-found", 2, ""),
        (errors.OfflineModeIsEnabled, "env.offline", 4, "network"),
        (errors.HfHubHTTPError, "env.offline", 4, "network"),
        (ConnectionError, "env.offline", 4, "network"),
        (errors.HfHubHTTPError.__bases__[0], "env.offline", 4, "network"),
    ],
)
def test_each_failure_is_told_apart(
    failure: type[Exception],
    id: str,
    exit_code: int,
    help: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub, "HfApi", failing(failure))
    monkeypatch.setattr(hub, "snapshot_download", failing(errors.LocalEntryNotFoundError))
    with pytest.raises(LorakitError) as error:
        find(tmp_path, revision="main")
    assert (error.value.id, error.value.exit_code) == (id, exit_code)
    assert help in (error.value.help or "")
    assert ID in error.value.message


def test_without_network_it_says_that_the_cache_has_the_files(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, [], cache)
    monkeypatch.setattr(hub, "HfApi", failing(ConnectionError))
    with pytest.raises(LorakitError, match="its files are in the cache") as error:
        find(tmp_path)
    assert "--offline" in (error.value.help or "")


def test_offline_without_the_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", failing(errors.LocalEntryNotFoundError))
    with pytest.raises(LorakitError) as error:
        find(tmp_path, offline=True)
    assert error.value.id == "env.offline"
    assert ID in error.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", True),
        ("gpt2", True),
        ("org/name-1.5_b", True),
        ("./name", False),
        ("/abs/name", False),
        ("a/b/c", False),
        ("../name", False),
        ("org/na..me", False),
        ("model.gguf", False),
        ("~/name", False),
        ("a b", False),
    ],
)
def test_what_can_be_an_id(text: str, expected: bool) -> None:
    assert hub.is_id(text) is expected
