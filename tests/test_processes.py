"""Signals, and commands in several processes."""

import os
import signal
import subprocess
import sys

import pytest

from lorakit.processes import SIGNALS, Signalled, Stop, raising_on_signals, tunables


def test_the_first_signal_sets_the_flag_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = Stop()
    with stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert stop.signal is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_grace_counts_from_the_signal() -> None:
    for stop in (Stop(), Stop(grace=30)):
        with stop:
            assert not stop.comes_before(1e9)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not stop.comes_before(20)
            assert stop.comes_before(1e9) is (stop.grace is not None)


@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_has_to_be_finished_a_signal_is_raised(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    try:
        with raising_on_signals():
            try:
                os.kill(os.getpid(), number)
            finally:
                assert signal.getsignal(number) == signal.SIG_DFL  # a second one ends it all
    except Signalled as caught:
        raised = caught.signal
    assert raised is number
    assert signal.getsignal(number) == before


def test_a_second_signal_ends_the_process_by_that_signal() -> None:
    program = (
        "import os, signal; from lorakit.processes import Stop; Stop().__enter__();"
        "os.kill(os.getpid(), signal.SIGINT); print('first', flush=True);"
        "os.kill(os.getpid(), signal.SIGINT); print('second', flush=True)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "first\n"
    assert ended.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    "answer", ["print('given up', flush=True)", "raise OSError", "os.kill(os.getpid(), number)"]
)
def test_a_second_signal_is_answered_and_ends_the_process_whatever_the_answer(answer: str) -> None:
    """Also where the answer hangs and a third one comes."""
    program = (
        "import os, signal; from lorakit.processes import Stop; number = signal.SIGTERM\n"
        "class Answered(Stop):\n"
        "    def heard(self): print('heard', self.doing, flush=True)\n"
        f"    def given_up(self): {answer}\n"
        "stop = Answered().__enter__(); stop.doing = 'step 2'\n"
        "for _ in range(2): os.kill(os.getpid(), number)\n"
        "print('lives')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "heard step 2\n" + "given up\n" * ("print" in answer)
    assert ended.returncode == -signal.SIGTERM


@pytest.mark.slow  # starts Python three times
def test_a_launched_command_hands_its_exit_code_on() -> None:
    program = (
        "import sys; from lorakit.processes import launch; sys.exit(launch(['no-such-command'], 2))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("No such command") == 1


def python(program: str, *arguments: str, **variables: str) -> str:
    """Return what a program prints in a process that is started with these variables."""
    command = [sys.executable, "-c", program, *arguments]
    rest = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(command, env=rest | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_command_starts_again_with_what_it_is_told_and_only_as_itself() -> None:
    program = (
        "import os, sys; from lorakit.processes import start_again; print('at', flush=True)\n"
        "if 'called' in sys.argv: sys.argv = ['lorakit', 'train']\n"
        "if 'X' not in os.environ: start_again({'X': '1'} if 'asked' in sys.orig_argv else {})\n"
        "print(os.environ.get('X'), *sys.argv[1:])"
    )
    assert python(program, "train", "asked") == "at\nat\n1 train asked\n"
    assert python(program, "train") == "at\nNone train\n"
    assert python(program, "asked", "called") == "at\nNone train\n"


def test_settings_of_the_allocator_are_for_libraries_that_need_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for library, needs in (("glibc 2.36", True), ("glibc 2.39", False), (None, False)):
        monkeypatch.setattr(os, "confstr", lambda _, library=library: library)
        assert bool(tunables()) is needs
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.36")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert not tunables(), "what a user sets stays"
