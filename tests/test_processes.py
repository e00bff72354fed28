"""Signals, and commands in several processes."""

import os
import signal
import subprocess
import sys

import pytest

from lorakit.processes import SIGNALS, Signalled, Stop, raising_on_signals


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


@pytest.mark.slow  # starts Python three times
def test_a_launched_command_hands_its_exit_code_on() -> None:
    program = (
        "import sys; from lorakit.processes import launch; sys.exit(launch(['no-such-command'], 2))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("No such command") == 1
