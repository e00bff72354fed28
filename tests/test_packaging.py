"""What users install: the wheel's files, its extras, and pins that agree with the ranges."""

import email
import importlib
import re
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lorakit import __version__
from lorakit.cli import doctor
from tests.source_tree import MODULES, ROOT, declared

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel as a user's pip does, but in this process and offline."""
    backend = importlib.import_module("hatchling.build")
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return zipfile.ZipFile(folder / backend.build_wheel(str(folder)))


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_package_and_the_recipes(wheel: zipfile.ZipFile) -> None:
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {f"lorakit/{name}" for name in files_below(ROOT / "lorakit")}
    recipes = {f"lorakit/_recipes/{name}" for name in files_below(ROOT / "recipes")}
    assert shipped == package | recipes
    assert "lorakit/recipe/schema.json" in shipped
    assert "lorakit/_recipes/quickstart.yaml" in shipped


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    def info(name: str) -> str:
        path = next(each for each in wheel.namelist() if each.endswith(f".dist-info/{name}"))
        return wheel.read(path).decode()

    metadata = email.message_from_string(info("METADATA"))
    assert metadata["Name"] == "lorakit"
    assert metadata["Version"] == __version__
    assert set(metadata.get_all("Provides-Extra", [])) == set(EXTRAS)
    assert "lorakit = lorakit.cli.app:main" in info("entry_points.txt")
    assert "Apache License" in info("licenses/LICENSE")


def test_pins_cover_the_requirements_and_keep_their_ranges() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert str(pins[0]) == "torch==2.13.0"
    versions = {}
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "=="
        versions[canonicalize_name(pin.name)] = exact.version
    assert len(versions) == len(pins)
    for entry in (*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["gguf"]):
        requirement = Requirement(entry)
        pinned = versions[canonicalize_name(requirement.name)]
        assert pinned in requirement.specifier, f"{entry} does not allow the pinned {pinned}"


def test_extras_that_messages_name_exist() -> None:
    named = {
        extra
        for module in MODULES.values()
        for text in module.texts
        for extra in re.findall(r"lorakit\[([\w-]+)\]", text.value)
    }
    assert named <= set(EXTRAS)


def test_doctor_speaks_of_the_extras_that_code_reads_and_no_others() -> None:
    """An extra is read by an import of its package, or where an error names it."""
    said = [text.value for m in MODULES.values() if m.room != "cli" for text in m.texts]
    packages = {each.package for m in MODULES.values() for each in m.imports}
    read = {
        extra
        for extra in EXTRAS.keys() - {"dev"}
        if declared(extra) & packages or any(f"lorakit[{extra}]" in text for text in said)
    }
    assert set(doctor.EXTRAS.values()) == read
    assert all(package in declared(extra) for package, extra in doctor.EXTRAS.items())


def test_ci_and_the_readme_use_the_one_entry() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    assert {"install", "quickstart", "check", "test", "bench", "clean"} <= targets
    for file in ("README.md", "CONTRIBUTING.md", ".ci/run", ".github/workflows/ci.yml"):
        used = re.findall(r"\bmake ([a-z]+)\b", (ROOT / file).read_text(encoding="utf-8"))
        assert used, f"{file} names no target"
        assert set(used) <= targets, f"{file} names a target that is not there"
    commands = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert commands[-1] == "make test"
