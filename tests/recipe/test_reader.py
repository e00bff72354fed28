"""What a read recipe is: defaults filled in, frozen, with its places; and what reading costs."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorakit.errors import BadInput, Place, UnknownMethod
from lorakit.recipe.files import packaged_recipes
from lorakit.recipe.reader import read
from lorakit.recipe.sections import Adapter
from tests.recipe.stand_ins import MINIMAL, LowRank, problems, read_text, settings_for


def test_the_minimal_recipe(tmp_path: Path) -> None:
    recipe = read_text(tmp_path, "model: some/path\ndata: {train: file.jsonl}\n")
    assert recipe.model.path == "some/path"
    assert [source.path for source in recipe.data.train] == ["file.jsonl"]
    assert recipe.adapter == LowRank()
    assert recipe.train.epochs == 1
    assert not recipe.merge.enabled
    assert recipe.run_folder == Path("runs/recipe")


def test_origin(tmp_path: Path) -> None:
    text = MINIMAL + "train:\n  epochs: 2\n"
    recipe = read_text(tmp_path, text, ["seed=3"])
    origin = recipe.origin
    file = str(tmp_path / "recipe.yaml")
    assert (origin.path, origin.folder, origin.name) == (Path(file), tmp_path, "recipe")
    assert origin.text == text.encode()
    assert origin.place("train", "epochs") == Place(file, 5, 11)
    assert origin.place("train", "max_steps") == Place(file, 4, 1)
    assert origin.place("data", "train", 0, "path") == Place(file, 3, 10)
    assert origin.place("seed") == Place("--set seed")
    assert origin.place("merge", "out") == Place(file, 1, 1)


def test_the_folder_of_a_run_means_the_recipe_that_was_carried_out(tmp_path: Path) -> None:
    run = tmp_path / "first"
    (run / "adapter").mkdir(parents=True)
    with pytest.raises(BadInput) as caught:
        read(run, settings_for, environ={})
    assert caught.value.id == "recipe.not-a-file"
    assert "the folder of a finished run" in str(caught.value.help)
    (run / "resolved.yaml").write_text(MINIMAL)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    for given in (run, run / "adapter", run / "resolved.yaml"):
        recipe = read(given, settings_for, environ={})
        assert recipe.origin.path == run / "resolved.yaml"
        assert recipe.origin.name == "first"


def test_a_methods_settings_arrive_typed(tmp_path: Path) -> None:
    recipe = read_text(tmp_path, MINIMAL + "adapter: {rank: 4}\n")
    assert isinstance(recipe.adapter, LowRank)
    assert recipe.adapter.rank == 4
    assert read_text(tmp_path, MINIMAL + "adapter: {method: virtual}\n").adapter.method == "virtual"


def test_an_error_from_the_settings_lands_at_the_method(tmp_path: Path) -> None:
    def refuse(method: str) -> type[Adapter]:
        raise UnknownMethod("adapter.unknown-method", "no", help="yes")

    (tmp_path / "x.yaml").write_text(MINIMAL + "adapter: {method: x}\n")
    with pytest.raises(BadInput) as caught:
        read(tmp_path / "x.yaml", refuse, environ={})
    assert caught.value.id == "adapter.unknown-method"
    assert caught.value.where == Place(str(tmp_path / "x.yaml"), 4, 19)


def test_a_relative_path_is_shown_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a b").mkdir()
    Path("a b", "-é.yaml").write_text(MINIMAL + "seed: x\n")
    with pytest.raises(BadInput) as caught:
        read("a b/-é.yaml", settings_for, environ={})
    assert str(caught.value.where) == "a b/-é.yaml:4:7"


def test_packaged_recipes_by_name() -> None:
    for name, path in packaged_recipes().items():
        assert read(name, settings_for, environ={}).origin.path == path


def test_a_file_comes_before_a_packaged_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = next(iter(packaged_recipes()))
    Path(name).write_text(MINIMAL)
    assert read(name, settings_for, environ={}).model.path == "hub/base"


def test_reading_takes_milliseconds(tmp_path: Path) -> None:
    """The goal is 50 ms on a quiet machine; ten times that is a mistake anywhere."""
    path = max(packaged_recipes().values(), key=lambda path: path.stat().st_size)
    read(path, settings_for, environ={})
    best = min(_seconds(path) for _ in range(5))
    assert best < 0.5


def _seconds(path: Path) -> float:
    start = time.perf_counter()
    read(path, settings_for, environ={})
    return time.perf_counter() - start


@pytest.mark.slow  # a process of its own
def test_the_room_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from lorakit.recipe import reader, schema, reference\n"
        "from lorakit.recipe.files import packaged_recipes\n"
        "for path in packaged_recipes().values():\n"
        "    reader.dump(reader.read(path, schema.settings_for, environ={}))\n"
        "print(*sorted({'torch', 'transformers', 'numpy', 'rich', 'typer'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_null_is_no_default_where_it_means_nothing(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL + "seed:\n")
    assert not problems(tmp_path, MINIMAL + "train: {max_steps: null}\n")
