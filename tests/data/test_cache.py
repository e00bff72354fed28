"""Tokenised data that outlives a run: equal to fresh data, made again where it might differ."""

import dataclasses
import os
import resource
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.data import cache, source
from lorakit.data.items import Request
from lorakit.data.prepare import Dataset
from lorakit.data.tokens import Example, Examples
from lorakit.errors import BadInput, Place
from lorakit.model.inputs import MASKED
from lorakit.recipe.sections import Source
from lorakit.storage.manifest import NAME, check_manifest, write_manifest
from tests.data.given import ask, base_tokenizer, llama3_like, prepared, rows_file, section
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

ROWS = [ask(f"{k}?", f"{k}.") for k in range(12)]


def cached(at: Path, data: Any, *, tokenizer: Any = None, **more: Any) -> Dataset:
    """Prepare data with the cache in the folder `at`."""
    context, advance = more.pop("context", None), more.pop("advance", lambda _: None)
    request = Request(data, **{"folder": Path(), "seed": 0, **more})
    return cache.prepared(at, request, tokenizer or tiny_tokenizer(), context, advance)


def entries(folder: Path) -> list[Path]:
    tokens = folder / cache.FOLDER
    return sorted(tokens.iterdir()) if tokens.is_dir() else []


def plain(found: Dataset) -> dict[str, Any]:
    """Return every field of a data set as something that compares by value."""
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    for name in ("train", "eval"):
        fields[name] = [
            (example.ids.tolist(), example.labels.tolist(), example.place, example.cut)
            for example in fields[name]
        ]
    return fields


def is_mapped(found: Dataset) -> bool:
    array = found.train.ids
    while isinstance(array.base, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base
    return isinstance(array, np.memmap)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what makes every further preparation a failure."""

    def fail(*_: Any, **__: Any) -> Dataset:
        raise AssertionError("prepared again")

    return lambda: monkeypatch.setattr(cache, "prepare", fail)


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30)
rows = st.lists(st.builds(ask, words, words.filter(str.strip)), min_size=3, max_size=12)
choices = st.fixed_dictionaries(
    {
        "eval": st.sampled_from([None, 0.3, "rows.jsonl"]),
        "train_on": st.sampled_from(["completions", "last", "all"]),
        "too_long": st.sampled_from(["drop", "truncate"]),
        "max_length": st.sampled_from([16, 48, 512]),
        "chat_template": st.sampled_from(["auto", "none", "alpaca"]),
    }
)


@given(rows, choices, st.sampled_from([tiny_tokenizer, base_tokenizer, llama3_like]))
@settings(max_examples=40)
def test_cached_is_fresh(
    tmp_path_factory: pytest.TempPathFactory,
    some: list[dict[str, str]],
    keys: dict[str, Any],
    tokenizer: Callable[[], Any],
) -> None:
    folder = tmp_path_factory.mktemp("law")
    data = section(rows_file(folder, some).name, **keys)
    try:
        fresh = plain(prepared(data, folder, tokenizer=tokenizer()))
    except BadInput:
        return
    first, second = (
        cached(folder / "cache", data, tokenizer=tokenizer(), folder=folder) for _ in range(2)
    )
    assert len(entries(folder / "cache")) == 1
    assert not is_mapped(first)
    assert is_mapped(second)
    assert plain(first) == plain(second) == fresh


def test_the_second_time_maps_what_the_first_has_made(
    tmp_path: Path, never: Callable[[], None]
) -> None:
    data = section(rows_file(tmp_path, ROWS), eval=0.25)
    first = cached(tmp_path, data)
    never()
    done: list[int] = []
    second = cached(tmp_path, data, advance=done.append)
    assert plain(second) == plain(first)
    assert is_mapped(second)
    assert sum(done) == len(ROWS)


def test_only_its_owner_may_read_an_entry(tmp_path: Path) -> None:
    cached(tmp_path / "new" / "cache", section(rows_file(tmp_path, ROWS)))
    folder = tmp_path / "new" / "cache" / cache.FOLDER
    assert folder.stat().st_mode & 0o777 == 0o700


CHANGES: dict[str, dict[str, Any]] = {
    "columns": {"train": {"path": "rows.jsonl", "columns": {"prompt": "prompt"}}},
    "weight": {"train": {"path": "rows.jsonl", "weight": 2}},
    "rows taken": {"train": {"path": "rows.jsonl", "max_samples": 9}},
    "another file with these bytes": {"train": "copy.jsonl"},
    "eval": {"eval": 0.25},
    "format": {"format": "prompt_completion"},
    "template": {"chat_template": "alpaca"},
    "system": {"system": "Be brief."},
    "train_on": {"train_on": "all"},
    "max_length": {"max_length": 100},
    "too_long": {"too_long": "drop"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_setting_is_another_entry(tmp_path: Path, change: str) -> None:
    shutil.copy(rows_file(tmp_path, ROWS), tmp_path / "copy.jsonl")
    for keys in ({}, {}, CHANGES[change]):
        cached(tmp_path, section("rows.jsonl", **keys), folder=tmp_path)
    assert len(entries(tmp_path)) == 2


def test_another_surrounding_is_another_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's bytes, tokenizer, context, seed of a split, eval sources, code: one at a time."""
    path = rows_file(tmp_path, ROWS)
    data, split = section(path), section(path, eval=0.25)
    other = tiny_tokenizer()
    other.add_tokens(["assistant"])
    steps: list[Callable[[], Dataset]] = [
        lambda: cached(tmp_path, data),
        lambda: cached(tmp_path, data, tokenizer=other),
        lambda: cached(tmp_path, data, context=64),
        lambda: cached(tmp_path, data, only="train"),
        lambda: cached(tmp_path, data, eval_sources=[Source(path=str(path))]),
        lambda: cached(tmp_path, split),
        lambda: cached(tmp_path, split, seed=1),
    ]
    for made, step in enumerate(steps, start=1):
        step()
        assert len(entries(tmp_path)) == made
    rows_file(tmp_path, [*ROWS[:-1], ask("11?", "12.")])
    steps[0]()
    monkeypatch.setattr(cache, "_code", lambda: "changed")
    steps[0]()
    assert len(entries(tmp_path)) == len(steps) + 2


def test_the_text_of_a_template_file_counts(tmp_path: Path) -> None:
    data = section(rows_file(tmp_path, ROWS).name, chat_template="mine.jinja")
    for text in (CHAT_TEMPLATE, CHAT_TEMPLATE + "{# another #}"):
        (tmp_path / "mine.jinja").write_text(text)
        assert cached(tmp_path, data, folder=tmp_path).chat_template == text


def test_what_changes_no_row_changes_no_entry(tmp_path: Path, never: Callable[[], None]) -> None:
    path = rows_file(tmp_path, ROWS)
    cached(tmp_path, section(path))
    never()
    cached(tmp_path, section(path, packing=False), seed=1)


def test_an_entry_of_explicit_choices_does_not_hide_an_error(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [*ROWS[:3], ask("what? " * 20, "this")])
    cached(tmp_path, section(path, max_length=50, too_long="drop"))
    with pytest.raises(BadInput, match="1 of 4 rows"):
        cached(tmp_path, section(path, max_length=50))


def test_any_damage_is_noticed_and_mended(tmp_path: Path) -> None:
    data = section(rows_file(tmp_path, ROWS), eval=0.25)
    sound = plain(cached(tmp_path, data))
    (entry,) = entries(tmp_path)
    files = sorted(entry.iterdir())
    assert len(files) == 3
    for path in files:
        whole = path.read_bytes()
        half = len(whole) // 2
        flipped = bytes([*whole[:half], whole[half] ^ 1, *whole[half + 1 :]])
        for bad in (flipped, whole[:half], whole + b"\0", None):
            path.unlink() if bad is None else path.write_bytes(bad)
            assert plain(cached(tmp_path, data)) == sound
            assert (entry / path.name).read_bytes() == whole


def test_an_entry_under_another_name_is_not_believed(tmp_path: Path) -> None:
    """As when somebody copies a folder, or an entry comes from another lorakit."""
    path = rows_file(tmp_path, ROWS)
    cached(tmp_path, section(path))
    (mine,) = entries(tmp_path)
    sound = plain(cached(tmp_path, section(path, train_on="all")))
    (other,) = set(entries(tmp_path)) - {mine}
    shutil.rmtree(other)
    shutil.copytree(mine, other)
    assert plain(cached(tmp_path, section(path, train_on="all"))) == sound


def test_columns_that_came_short_are_not_believed_whatever_the_manifest_says(
    tmp_path: Path,
) -> None:
    """A disk refused a part, nobody said so, and the digests are of what is there."""
    data = section(rows_file(tmp_path, ROWS))
    first = plain(cached(tmp_path / "cache", data))
    (entry,) = entries(tmp_path / "cache")
    whole = (entry / "columns").stat().st_size
    for length in (64, whole // 2 // 64 * 64, 0, 5):
        os.truncate(entry / "columns", length)
        (entry / NAME).unlink()
        write_manifest(entry)
        assert check_manifest(entry) is None
        assert plain(cached(tmp_path / "cache", data)) == first


def test_a_disk_that_refuses_the_columns_leaves_no_entry(tmp_path: Path) -> None:
    """Not even one that lacks the last bytes: a buffer's, which are written when it is closed."""
    data = section(rows_file(tmp_path, 50 * ROWS))
    cached(tmp_path / "cache", data)
    (entry,) = entries(tmp_path / "cache")
    whole = (entry / "columns").stat().st_size
    assert all(path.stat().st_size < whole - 100 for path in entry.glob("*.json"))
    shutil.rmtree(entry)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole - 100, limits[1]))
        found = cached(tmp_path / "cache", data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert len(found.train) == 50 * len(ROWS)
    assert entries(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    data = section(rows_file(tmp_path, ROWS))
    (tmp_path / "file").write_text("in the way")
    assert plain(cached(tmp_path / "file", data)) == plain(prepared(data))


def test_rows_of_the_users_code_are_made_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cached_format.py").write_text("def rows(row):\n    return row\n")
    path = rows_file(tmp_path, ROWS)
    for data in (
        section(path, format="cached_format:rows"),
        section(path, train={"path": str(path), "format": "cached_format:rows"}),
    ):
        assert len(cached(tmp_path, data, allow_local_code=True).train) == len(ROWS)
    assert not entries(tmp_path)


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows_file(tmp_path, ROWS)
    monkeypatch.setattr(cache, "digest", lambda source, **_: (source.path, "as it was"))
    cached(tmp_path, section(path))
    assert not entries(tmp_path)


def test_parquet_is_not_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    data = section(tmp_path / "rows.parquet")
    first = plain(cached(tmp_path, data))
    monkeypatch.setattr(source, "import_module", lambda name: pytest.fail(f"imports {name}"))
    assert plain(cached(tmp_path, data)) == first


def test_rows_of_the_hub_are_kept_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two splits each has its own digest, and other rows are another entry."""
    rows = {"train": ROWS, "test": ROWS[:4]}

    def load_dataset(path: str, subset: str | None, *, split: str) -> Any:
        return datasets.Dataset.from_list(rows[split])

    hub = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setattr(source, "import_module", {"datasets": hub}.__getitem__)
    data = section(
        "some/set", train={"path": "some/set"}, eval={"path": "some/set", "split": "test"}
    )

    def again() -> Dataset:
        source._hub_table.cache_clear()
        return cached(tmp_path, data, offline=False)

    first = again()
    assert list(first.report.sha256) == ["some/set", "some/set test"]
    assert not is_mapped(first)
    second = again()
    assert is_mapped(second)
    assert plain(second) == plain(first)
    rows["train"] = ROWS[1:]
    assert len(again().train) == len(ROWS) - 1
    source._hub_table.cache_clear()


def test_many_who_make_the_same_entry_do_no_harm(tmp_path: Path) -> None:
    data = section(rows_file(tmp_path, ROWS), eval=0.25)
    sound = plain(prepared(data))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: cached(tmp_path, data), range(16)))
    assert len(entries(tmp_path)) == 1
    assert all(plain(one) == sound for one in found)


def test_rows_in_use_outlive_their_entry(tmp_path: Path) -> None:
    data = section(rows_file(tmp_path, ROWS))
    cached(tmp_path, data)
    mapped = cached(tmp_path, data)
    shutil.rmtree(tmp_path / cache.FOLDER)
    assert plain(mapped) == plain(prepared(data))


def test_the_longest_unused_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows_file(tmp_path, ROWS)
    lengths = [100, 101, 102]
    for age, length in enumerate(lengths):
        cached(tmp_path, section(path, max_length=length))
        (new,) = [entry for entry in entries(tmp_path) if entry.stat().st_mtime > 1e9]
        os.utime(new, (age, age))
    size = sum(file.stat().st_size for file in entries(tmp_path)[0].iterdir())
    cached(tmp_path, section(path, max_length=100))  # used again
    monkeypatch.setattr(cache, "MOST_BYTES", 2.5 * size)
    cached(tmp_path, section(path, max_length=103))
    assert len(entries(tmp_path)) == 2
    monkeypatch.setattr(cache, "prepare", lambda *_, **__: pytest.fail("prepared again"))
    for length in (100, 103):
        cached(tmp_path, section(path, max_length=length))
    monkeypatch.undo()
    monkeypatch.setattr(cache, "MOST_BYTES", 0)
    cached(tmp_path, section(path, max_length=104))
    assert len(entries(tmp_path)) == 1


@given(st.lists(st.integers(0, 70_000), max_size=40), st.data())
def test_columns_give_back_each_example(ids: list[int], data: st.DataObject) -> None:
    examples = []
    while ids:
        take = data.draw(st.integers(1, len(ids)))
        some = np.array(ids[:take], np.int32)
        trained = np.array(data.draw(st.lists(st.booleans(), min_size=take, max_size=take)))
        labels = np.where(trained, some, MASKED).astype(np.int32)
        place = Place(data.draw(st.sampled_from("ab")), data.draw(st.sampled_from([None, 1, 7])))
        examples.append(Example(some, labels, place, data.draw(st.booleans())))
        ids = ids[take:]
    columns = Examples.of(examples)
    assert columns.lengths.tolist() == [len(example.ids) for example in examples]
    assert columns.trained.tolist() == [example.trained for example in examples]
    assert len(columns) == len(examples)
    for found, example in zip(columns, examples, strict=True):
        assert found.ids.tolist() == example.ids.tolist()
        assert found.labels.tolist() == example.labels.tolist()
        assert (found.place, found.cut) == (example.place, example.cut)
    assert [example.place for example in columns[-2:]] == [e.place for e in examples[-2:]]
