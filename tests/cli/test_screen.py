"""What every command does alike: streams, JSON, warnings, errors and exit codes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lorakit.cli.app import main
from lorakit.cli.command import command
from lorakit.cli.screen import Screen
from lorakit.errors import (
    BadInput,
    CheckFailed,
    EnvironmentLacks,
    Notice,
    Place,
    RecipeError,
    RunFailed,
)

runner = CliRunner()
SECRET = "hf_" + "a" * 30

ERRORS = [
    CheckFailed("check.gate-missed", "missed"),
    BadInput("usage", "wrong", where=Place("a.yaml", 3, 5), help="do this"),
    RunFailed("run.not-finite", "NaN"),
    EnvironmentLacks("env.offline", "no network"),
]

HERE = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


def app_that(act: Any) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @command
    def work(screen: Screen) -> None:
        act(screen)

    return app


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fail_with(error: Exception) -> Any:
    def act(_: Screen) -> None:
        raise error

    return act


def test_the_result_goes_to_stdout_and_everything_else_to_stderr() -> None:
    def act(screen: Screen) -> None:
        screen.say("working")
        screen.notice(Notice("data.dropped", "3 rows"))
        screen.result("the result", {"rows": 3})

    ended = runner.invoke(app_that(act))
    assert ended.stdout == "the result\n"
    assert ended.stderr == "working\nwarning[data.dropped]: 3 rows\n"
    ended = runner.invoke(app_that(act), ["--json", "--quiet"])
    document = json.loads(ended.stdout)
    assert document["schema"] == "lorakit.work/1"
    assert document["ok"]
    assert document["rows"] == 3
    assert document["warnings"] == [{"id": "data.dropped", "message": "3 rows"}]
    assert "working" not in ended.stderr


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error.id))
def test_an_error_is_one_message_with_its_exit_code(error: Any) -> None:
    ended = runner.invoke(app_that(fail_with(error)))
    assert ended.exit_code == error.exit_code
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"error[{error.id}]: {error.message}\n")
    assert "Traceback" not in ended.stderr
    assert (f"where: {error.where}" in ended.stderr) is (error.where is not None)
    ended = runner.invoke(app_that(fail_with(error)), ["--json"])
    document = json.loads(ended.stdout)
    assert document["exit"] == error.exit_code
    assert not document["ok"]
    assert document["error"]["id"] == error.id
    assert document["error"]["hint"] == error.help


def test_a_recipe_shows_all_its_problems_sorted_by_line() -> None:
    problems = [
        BadInput("recipe.unknown-key", "train.lr: unknown key", where=Place("r.yaml", 9, 3)),
        BadInput("recipe.wrong-type", "seed: expected an integer", where=Place("r.yaml", 2, 7)),
    ]
    ended = runner.invoke(app_that(fail_with(RecipeError(problems))), ["--json"])
    assert ended.exit_code == 2
    assert ended.stderr.splitlines() == [
        "r.yaml:2:7: seed: expected an integer",
        "r.yaml:9:3: train.lr: unknown key",
    ]
    document = json.loads(ended.stdout)
    assert [one["line"] for one in document["errors"]] == [2, 9]
    assert document["error"] == document["errors"][0]


def test_what_nobody_foresaw_is_one_line_and_a_crash_file_for_the_user_alone(
    tmp_path: Path,
) -> None:
    ended = runner.invoke(app_that(fail_with(ZeroDivisionError("by zero"))))
    assert ended.exit_code == 70
    assert "Traceback" not in ended.stderr
    assert "ZeroDivisionError: by zero" in ended.stderr
    (crash,) = tmp_path.glob("lorakit-crash-*.txt")
    assert "Traceback" in crash.read_text()
    assert crash.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "arguments", [["plan", "--offlin"], ["pln"], ["train", "--max-steps", "two"], ["merge", "x"]]
)
def test_wrong_usage_is_one_document_too(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lorakit", *arguments, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert (ended.value.code, document["exit"], document["error"]["id"]) == (2, 2, "usage")
    assert document["error"]["message"] in shown.err


@pytest.mark.parametrize("arguments", [[], ["data"], ["recipes"]])
def test_a_command_without_arguments_is_explained_as_by_help(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for more, code in (([], 2), (["--help"], 0)):
        monkeypatch.setattr(sys, "argv", ["lorakit", *arguments, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
        shown.append(capsys.readouterr())
    assert shown[0] == shown[1]
    assert len(shown[0].out.splitlines()) > 5
    assert not shown[0].err


def test_debug_shows_the_traceback() -> None:
    ended = runner.invoke(app_that(fail_with(BadInput("usage", "wrong"))), ["--debug"])
    assert ended.exit_code == 2
    assert "Traceback" in ended.stderr


def test_strict_turns_a_warning_into_an_error() -> None:
    act = lambda screen: screen.notice(Notice("data.dropped", "3 rows"))  # noqa: E731
    assert runner.invoke(app_that(act)).exit_code == 0
    ended = runner.invoke(app_that(act), ["--strict"])
    assert ended.exit_code == 2
    assert "--strict: 3 rows" in ended.stderr


def test_secrets_never_reach_a_stream_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")

    def act(screen: Screen) -> None:
        screen.log_to(tmp_path / "log.txt")
        screen.say(f"token {SECRET} and correct-horse-battery")
        raise RuntimeError(f"sent {SECRET} with correct-horse-battery")

    ended = runner.invoke(app_that(act), ["--json", "--debug"])
    written = ended.stdout + ended.stderr + "".join(path.read_text() for path in tmp_path.iterdir())
    assert SECRET not in written
    assert "correct-horse-battery" not in written


def test_no_escape_codes_off_a_terminal_and_markup_is_only_text() -> None:
    def act(screen: Screen) -> None:
        screen.notice(Notice("data.dropped", "[bold red]text[/]"))
        screen.result("[link=x]text[/link]", {})

    ended = runner.invoke(app_that(act))
    assert "\x1b" not in ended.stdout + ended.stderr
    assert "[bold red]text[/]" in ended.stderr
    assert ended.stdout == "[link=x]text[/link]\n"


def test_nothing_is_drawn_off_a_terminal_even_with_forced_colour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    seen = []
    assert runner.invoke(app_that(lambda screen: seen.append(screen.live))).exit_code == 0
    assert seen == [False]


def test_a_log_that_cannot_be_written_hides_no_error(tmp_path: Path) -> None:
    def act(screen: Screen) -> None:
        screen.log_to(tmp_path / "absent" / "log.txt")
        raise RunFailed("storage.full", "the disk is full")

    ended = runner.invoke(app_that(act))
    assert ended.exit_code == 3
    assert "the disk is full" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_with_nothing_to_save_cleans_up_and_ends_the_process(
    number: signal.Signals,
) -> None:
    program = (
        "import os, signal; from lorakit.cli.command import command\n"
        "def work(screen):\n"
        f"    try: os.kill(os.getpid(), {int(number)})\n"
        "    finally: print('cleaned up', flush=True)\n"
        "command(work)()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], env=HERE, capture_output=True, text=True
    )
    assert ended.stdout == "cleaned up\n"
    assert ended.returncode == -number


def test_work_goes_on_when_nobody_reads_what_it_says() -> None:
    program = (
        "import os; from lorakit.cli.command import command\n"
        "def work(screen):\n"
        "    for n in range(3): screen.say('x' * 9999)\n"
        "    os.write(3, b'done')\n"
        "command(work)()"
    )
    unread, said = os.pipe()
    os.close(unread)
    done, result = os.pipe()
    run = subprocess.Popen(
        ["bash", "-c", f'exec "$0" -c "$1" 3>&{result}', sys.executable, program],
        env=HERE,
        stderr=said,
        pass_fds=(result,),
    )
    assert run.wait() == 0
    os.close(result)
    assert os.read(done, 10) == b"done"


@pytest.mark.parametrize("live", [False, True])
def test_a_signal_is_answered_past_the_buffer_of_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as said, os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(Screen, "live", live)
        stream.write("half of a line")
        screen = Screen("train", quiet=True)
        screen.log_to(tmp_path / "log.txt")
        screen.answer("finishing step 2", progress=True)
        screen.answer("stopped")
        assert os.read(said.fileno(), 100) == b"\r\x1b[2K" * live + b"stopped\n"
    assert (tmp_path / "log.txt").read_text() == "finishing step 2\nstopped\n"


def test_the_log_holds_what_was_said_before_there_was_one(tmp_path: Path) -> None:
    screen = Screen("train")
    screen.say("the plan")
    screen.log_to(tmp_path / "log.txt")
    screen.say("step 1")
    assert (tmp_path / "log.txt").read_text() == "the plan\nstep 1\n"


def test_ctrl_c_with_nothing_to_save_ends_the_process_by_that_signal() -> None:
    program = """
import typer
from lorakit.cli.command import command

app = typer.Typer()

@app.command()
@command
def work(screen):
    raise KeyboardInterrupt

app()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], env=HERE, capture_output=True, text=True
    )
    assert ended.returncode == -signal.SIGINT
    assert ended.stdout == ended.stderr == ""
