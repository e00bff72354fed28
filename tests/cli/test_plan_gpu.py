"""`lorakit plan --gpu`: from config.json alone, what fits a card and what would make it fit.

The screens are kept in `screens/`; `python -m tests.cli.test_plan_gpu` writes them again.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lorakit.cli.app import app
from lorakit.errors import BadInput
from lorakit.recipe.files import packaged_recipes
from lorakit.recipe.sections import Recipe
from lorakit.training import plan, summary
from lorakit.training.speed import CARDS, card
from tests.tiny import tiny_tokenizer
from tests.training.shapes import llama

SCREENS = Path(__file__).parent / "screens"
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "max_position_embeddings": 4096}
MODELS = {
    "llama-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-70b": (8192, 28672, 80, 64, 8, 128256),
}
# The tiny tokenizer makes rows about four times as long as the model's own would.
LONG = ["-s", "data.max_length=2048"]
CASES = {
    "llama7b-qv-24gib": ("llama-7b", 0, ["--gpu", "24GiB"]),
    "llama7b-qv-4090": ("llama-7b", 0, ["--gpu", "RTX 4090"]),
    "llama7b-qv-12gib": ("llama-7b", 1, ["--gpu", "12GiB"]),
    "llama70b-qv-48gib": ("llama-70b", 1, ["--gpu", "48GiB"]),
    "llama70b-qv-nf4-48gib": (
        "llama-70b",
        0,
        ["--gpu", "48GiB", "-s", "model.quantization=nf4"],
    ),
    "llama70b-qv-h100": ("llama-70b", 1, ["--gpu", "H100"]),
}


def write_model(folder: Path, name: str) -> Path:
    """Write config.json and a tokenizer, and no weights."""
    target = folder / name
    if not target.is_dir():
        llama(*MODELS[name], **IDS).save_pretrained(target)
        tiny_tokenizer().save_pretrained(target)
    return target


def shown(folder: Path, name: str) -> tuple[int, str]:
    """Return the exit code and the screen of a case, without what depends on the machine."""
    model, _, options = CASES[name]
    path = write_model(folder, model)
    arguments = ["plan", "llama7b-qv", "-s", f"model.path={path}", *LONG, *options]
    ended = CliRunner().invoke(app, arguments)
    text = ended.stdout.replace(str(packaged_recipes()["llama7b-qv"]), "llama7b-qv.yaml")
    text += "".join(f"{line}\n" for line in ended.stderr.splitlines() if "plan.will" in line)
    text += "".join(f"{line}\n" for line in ended.stderr.splitlines() if "help:" in line)
    return ended.exit_code, text


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def _enough_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "free_space", lambda _: 500 * 2**30)


@pytest.mark.parametrize("name", CASES)
def test_the_screen_is_the_one_that_was_agreed(models: Path, name: str) -> None:
    code, text = shown(models, name)
    assert code == CASES[name][1], text
    assert text == (SCREENS / f"{name}.txt").read_text(encoding="utf-8")


def test_an_old_card_is_planned_with_its_own_kernels(models: Path) -> None:
    """Torch's flash attention begins with the next generation; without it more is kept."""
    path = write_model(models, "llama-70b")
    options = ["-s", f"model.path={path}", "-s", "model.dtype=fp16", *LONG, "--json"]
    memory = [
        json.loads(CliRunner().invoke(app, ["plan", "llama7b-qv", *options, "--gpu", gpu]).stdout)[
            "memory"
        ]
        for gpu in ("V100", "32GiB")
    ]
    old, new = (part["activations"] for part in memory)
    assert old > new


def test_the_recipe_that_is_written_fits(models: Path, tmp_path: Path) -> None:
    path = write_model(models, "llama-70b")
    options = ["-s", f"model.path={path}", *LONG, "--gpu", "48GiB"]
    fitted = tmp_path / "fitted.yaml"
    ended = CliRunner().invoke(app, ["plan", "llama7b-qv", *options, "--fit", str(fitted)])
    assert ended.exit_code == 1
    assert yaml.safe_load(fitted.read_text())["model"]["quantization"] == "nf4"
    again = CliRunner().invoke(app, ["plan", str(fitted), "--gpu", "48GiB", "--json"])
    assert again.exit_code == 0, again.stderr
    planned: dict[str, Any] = json.loads(again.stdout)
    assert planned["memory"]["total"] <= planned["free_bytes"] == 48 * 2**30
    taken = CliRunner().invoke(app, ["plan", str(fitted), "--gpu", "48GiB", "--fit", str(fitted)])
    assert "output.not-empty" in taken.stderr


def test_rows_that_become_shorter_are_cut_not_dropped(models: Path, tmp_path: Path) -> None:
    """Beyond NF4 and offload only the length is left: dropping most rows is no answer."""
    rows = [{"prompt": "ask", "completion": "answer " * 1000} for _ in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe, fitted = tmp_path / "recipe.yaml", tmp_path / "fitted.yaml"
    model = write_model(models, "llama-7b")
    recipe.write_text(f"model: {model}\ndata: {{train: rows.jsonl, max_length: 2048}}\n")
    settings = ["model.quantization=nf4", "train.gradient_checkpointing=offload"]
    settings += ["train.micro_batch_size=1"]
    smallest = [word for one in settings for word in ("-s", one)]
    ended = CliRunner().invoke(app, ["plan", str(recipe), *smallest, "--gpu", "24GiB", "--json"])
    total = json.loads(ended.stdout)["memory"]["total"]
    card = f"{0.99 * total / 0.95 / 2**30:.4f}GiB"
    arguments = ["plan", str(recipe), "--gpu", card, "--fit", str(fitted), "--json"]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 1, ended.stderr
    change = json.loads(ended.stdout)["change"]
    assert change["data.max_length"] < 2048
    assert change["data.too_long"] == "truncate"
    again = CliRunner().invoke(app, ["plan", str(fitted), "--gpu", card, "--json"])
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["rows"] == json.loads(ended.stdout)["rows"]


@pytest.mark.parametrize("answer", [1, BadInput("data.too-long", "all rows are gone")])
def test_a_change_that_cannot_be_planned_is_no_answer(
    models: Path, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    real = plan.make

    def make(recipe: Recipe, *arguments: Any, **options: Any) -> Any:
        if answer != 1 and recipe.model.quantization == "nf4":
            raise answer
        return real(recipe, *arguments, **options)

    monkeypatch.setattr(plan, "make", make)
    path = write_model(models, "llama-70b")
    arguments = ["-s", f"model.path={path}", *LONG, "--gpu", "48GiB", "--json"]
    ended = CliRunner().invoke(app, ["plan", "llama7b-qv", *arguments])
    assert ended.exit_code == 1, ended.stderr
    assert ("change" in json.loads(ended.stdout)) is (answer == 1)


def test_a_card_of_a_size_alone_has_no_time(models: Path) -> None:
    path = write_model(models, "llama-7b")
    arguments = ["plan", "llama7b-qv", "-s", f"model.path={path}", *LONG, "--gpu"]
    shown = CliRunner().invoke(app, [*arguments, "24GiB"]).stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("Time ")]
    assert "--gpu 'RTX 3090'" in line
    assert (
        json.loads(CliRunner().invoke(app, [*arguments, "24GiB", "--json"]).stdout)["seconds"]
        is None
    )
    shown = CliRunner().invoke(app, [*arguments, "RTX 3090"]).stdout
    assert "RTX 3090's 71 TFLOP/s on paper" in shown


def test_the_host_holds_a_base_that_the_merge_measures(models: Path) -> None:
    """In 4 bits, as training held it; into the original weights without measuring nothing is."""
    path = write_model(models, "llama-7b")
    arguments = ["plan", "llama7b-qv", "-s", f"model.path={path}", *LONG, "--gpu", "24GiB"]
    arguments += ["--json", "-s", "model.quantization=nf4"]

    def host(*settings: str) -> int:
        options = [word for one in settings for word in ("-s", one)]
        planned = json.loads(CliRunner().invoke(app, [*arguments, *options]).stdout)
        return int(planned["host_bytes"])

    without = host("merge.enabled=false")
    assert host("merge.measure=false") == without
    linears = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert host() - without == pytest.approx(0.516 * linears, rel=1e-3)
    assert host("merge.measure=false", "merge.base_weights=dequantised") == host()


def test_nothing_may_help(models: Path) -> None:
    path = write_model(models, "llama-70b")
    options = ["-s", f"model.path={path}", *LONG, "--gpu", "8GiB", "--json"]
    ended = CliRunner().invoke(app, ["plan", "llama7b-qv", *options])
    assert ended.exit_code == 1
    assert "change" not in json.loads(ended.stdout)


def test_a_disk_that_is_too_small_is_told(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "free_space", lambda _: 2**30)
    path = write_model(models, "llama-7b")
    arguments = ["-s", f"model.path={path}", *LONG, "--gpu", "24GiB"]
    ended = CliRunner().invoke(app, ["plan", "llama7b-qv", *arguments])
    assert ended.exit_code == 1
    assert "12.75 GiB of disk, 1.00 GiB are there" in ended.stderr


def test_a_card_is_a_name_or_a_size() -> None:
    assert card("24GiB").memory == card("24").memory == 24 * 2**30
    assert card("24GB").memory == 24 * 10**9
    assert card(" rtx  4090 ") is CARDS["rtx 4090"]


@pytest.mark.parametrize(
    ("arguments", "code", "id"),
    [
        (["--gpu", "some"], 2, "usage"),
        (["--gpu", "0GiB"], 2, "usage"),
        (["--gpu", "24GiB", "--measure"], 2, "usage"),
        (["--gpu", "T4"], 4, "env.dtype"),  # the recipe says bf16
    ],
)
def test_what_cannot_be_planned_for(models: Path, arguments: list[str], code: int, id: str) -> None:
    path = write_model(models, "llama-7b")
    ended = CliRunner().invoke(
        app, ["plan", "llama7b-qv", "-s", f"model.path={path}", *arguments, "--json"]
    )
    assert ended.exit_code == code
    assert json.loads(ended.stdout)["error"]["id"] == id


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    summary.free_space = lambda _: 500 * 2**30
    SCREENS.mkdir(exist_ok=True)
    with TemporaryDirectory() as temporary:
        for case in sys.argv[1:] or CASES:
            (SCREENS / f"{case}.txt").write_text(shown(Path(temporary), case)[1], encoding="utf-8")
