"""The folder as the registry: names, summaries, settings, and what a method's file must have."""

import ast
import subprocess
import sys

import pytest
from pydantic import ValidationError

from lorakit import adapters
from lorakit.adapters import Method
from lorakit.errors import BadInput

FOLDER = adapters._FOLDER


@pytest.fixture(params=adapters.names())
def name(request):
    return request.param


def test_listing_imports_nothing_heavy():
    code = (
        "import sys; from lorakit import adapters; adapters.foreign();"
        "[adapters.summary(name) for name in adapters.names()];"
        "print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_file_defines_one_method_with_its_source(name):
    method = adapters.get(name)
    assert issubclass(method, Method)
    assert method.name() == name
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    assert adapters.summary(name) == text.splitlines()[0]
    assert len(adapters.summary(name)) <= 95
    assert "arXiv" in text
    assert "eviation" in text


def test_settings_are_closed_and_described(name):
    settings = adapters.settings_for(name)
    made = settings(method=name)
    assert settings.model_validate(made.model_dump(mode="json")) == made
    assert all(field.description for field in settings.model_fields.values())
    with pytest.raises(ValidationError, match="rnak"):
        settings(method=name, rnak=4)
    assert settings.model_json_schema()["additionalProperties"] is False


BAD = {
    "rank": (0, -1, "8", True, 2.5),
    "alpha": (0, -1, float("nan"), float("inf"), "8"),
    "dropout": (1.0, 2, -0.1, "0.1"),
    "target_modules": ([], "q_proj", [""][:0], 3, [3]),
    "layers": ("8", "a-b", [], [-1], [True], ["1"], 3),
    "rank_pattern": ({"q": 0}, {"q": "8"}, []),
    "alpha_pattern": ({"q": 0.0},),
    "init": ("pissa", None),
    "modules_to_save": ("lm_head", [1]),
    "feedforward_modules": ("down_proj", [1]),
    "tokens": (0, "20"),
}


def test_values_out_of_range_are_refused(name):
    settings = adapters.settings_for(name)
    for key in BAD.keys() & settings.model_fields.keys():
        for value in BAD[key]:
            with pytest.raises(ValidationError):
                settings(method=name, **{key: value})


def test_good_values_are_taken():
    made = adapters.settings_for("lora")(
        rank=8,
        alpha=16,
        dropout=0.1,
        target_modules=["q_proj", "re:.*v_proj"],
        exclude_modules=["layers.0"],
        layers="1-3",
        rank_pattern={"q_proj": 2},
        modules_to_save=["lm_head"],
    )
    assert made.target_modules == ("q_proj", "re:.*v_proj")
    assert adapters.settings_for("lora")(layers=[0, 2]).layers == (0, 2)
    assert adapters.settings_for("lora")(target_modules="re:.*").target_modules == "re:.*"


def test_settings_of_another_method_are_a_mistake():
    with pytest.raises(TypeError, match="ia3"):
        adapters.get("lora")(adapters.settings_for("ia3")(method="ia3"))


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("loar", "lora"), ("use_dora", "dora"), ("DoRA", "dora"), ("prefix_tuning", "prefix")],
)
def test_an_unknown_method_names_the_nearest(wrong, meant):
    with pytest.raises(BadInput) as refused:
        adapters.get(wrong)
    assert refused.value.id == "adapter.unknown-method"
    assert f"did you mean '{meant}'?" in refused.value.help


@pytest.mark.parametrize("wrong", ["_file", "../errors", "__init__", "os", ""])
def test_only_files_of_methods_are_methods(wrong):
    with pytest.raises(BadInput) as refused:
        adapters.get(wrong)
    assert refused.value.id == "adapter.unknown-method"
    assert all(known in refused.value.help for known in adapters.names())


def test_foreign_names_are_said_in_our_words():
    foreign = adapters.foreign()
    assert foreign["use_dora"] == "adapter.method (= dora)"
    assert not set(foreign) & set(adapters.names())


def test_a_broken_file_shows_its_own_error(tmp_path, monkeypatch):
    for source in (*FOLDER.glob("_*.py"), FOLDER / "lora.py"):
        (tmp_path / source.name).write_text(source.read_text())
    (tmp_path / "broken.py").write_text('"""Broken."""\nimport no_such_package\n')
    monkeypatch.setattr(adapters, "_FOLDER", tmp_path)
    monkeypatch.setattr(adapters, "__path__", [str(tmp_path), *adapters.__path__])
    assert "broken" in adapters.names()
    assert adapters.summary("broken") == "Broken."
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        adapters.get("broken")


def test_no_method_is_named_outside_the_folder():
    """But for the default in the recipe's schema no quoted literal elsewhere is a method's name."""
    package = FOLDER.parent
    for path in package.rglob("*.py"):
        if path.parent == FOLDER or path.name == "sections.py":
            continue
        literals = {
            n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)
        }
        assert not literals & set(adapters.names()), path


def test_the_package_gives_what_it_lists():
    assert set(adapters._HOMES) | {
        "names",
        "summary",
        "paper",
        "servable",
        "foreign",
        "get",
        "settings_for",
    } == set(adapters.__all__)
    for listed in adapters.__all__:
        assert getattr(adapters, listed)
    with pytest.raises(AttributeError, match="nothing"):
        adapters.nothing  # noqa: B018
