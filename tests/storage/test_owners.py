"""Who else may change what a run writes to and goes on from."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.storage.owners import of_another, open_to_all


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every account can enter; those of pytest are private."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "above" / "run").mkdir(parents=True)
        yield folder


@pytest.mark.parametrize(
    ("above", "run", "warns"),
    [
        (0o755, 0o755, None),
        (0o777, 0o755, "above"),
        (0o755, 0o777, "above/run"),
        (0o1777, 0o755, None),  # only the owner of a name may rename it
        (0o775, 0o775, None),  # a group is a choice
    ],
)
def test_a_folder_is_told_in_which_all_may_replace_the_run(
    place: Path, above: int, run: int, warns: str | None
) -> None:
    (place / "above" / "run").chmod(run)
    (place / "above").chmod(above)
    found = open_to_all(place / "above" / "run")
    assert (found and str(found.where)) == (warns and str(place / warns))


def test_what_others_cannot_enter_is_not_open_to_them(place: Path) -> None:
    (place / "above" / "run").chmod(0o777)
    (place / "above").chmod(0o700)
    assert open_to_all(place / "above" / "run") is None


def test_a_run_that_is_not_there_yet_is_judged_by_where_it_will_be(place: Path) -> None:
    (place / "above").chmod(0o777)
    found = open_to_all(place / "above" / "new" / "run")
    assert found
    assert str(found.where) == str(place / "above")


def test_a_link_is_judged_by_where_it_leads(place: Path) -> None:
    (place / "above").chmod(0o777)
    (place / "link").symlink_to(place / "above")
    assert open_to_all(place / "link" / "run")


def test_what_another_account_owns_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = place / "above" / "run"
    (step / "state.json").write_text("{}")
    assert of_another(step) is None
    if os.geteuid() == 0:
        os.chown(step / "state.json", 65534, -1)
        found = of_another(step)
        assert found
        assert "uid 65534 owns it and this is uid 0" in found.message
        assert str(found.where) == str(step / "state.json")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    found = of_another(step)
    assert found
    assert str(found.where) == str(step)
