"""Signals, and commands in several processes."""

import os
import signal
import subprocess
import sys

import pytest

from lorakit.processes import Stop


def test_the_first_signal_sets_the_flag_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = Stop()
    try:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert stop.signal is signal.SIGTERM
    finally:
        stop.release()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_ends_the_process_by_that_signal() -> None:
    program = (
        "import os, signal; from lorakit.processes import Stop; stop = Stop();"
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
