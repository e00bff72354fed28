"""Several processes on this machine, and the signals that stop them.

Standard library only: what starts and watches the others needs no torch itself.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Self

from lorakit import environment
from lorakit.errors import Interrupted, RunFailed

TUNABLES = "GLIBC_TUNABLES"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run lorakit with these arguments in several processes on this machine; return the exit code.

    The first process that fails decides the code; the others are then stopped. Signals are
    passed on, so that every process saves and stops by itself. What goes wrong alike in all of
    them is said once, by the main process.

    Raises:
        RunFailed: when the main process could not say itself what ended it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # They find modules where this process does: `-m` alone would look in the working folder first.
    here = {"", os.getcwd()} & set(sys.path)
    command = [sys.executable, *([] if here else ["-P"]), "-m", "lorakit", *arguments]
    started: list[subprocess.Popen[bytes]] = []
    hung_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL else []
    for number in (*SIGNALS, *hung_up):
        signal.signal(number, lambda received, _: _pass_on(received, started))
    with ExitStack() as files:
        errors = [files.enter_context(tempfile.TemporaryFile()) for _ in range(1, processes)]
        for process, said in enumerate([None, *errors]):
            place = {
                "RANK": str(process),
                "LOCAL_RANK": str(process),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            started.append(
                subprocess.Popen(
                    command,
                    env={**environment.all_variables(), **place},
                    stdout=subprocess.DEVNULL if said else None,
                    stderr=said,
                    # Of its own, or a terminal's Ctrl-C would come twice: from there and from here.
                    process_group=0,
                )
            )
        first = _first_failure(started)
        if first is not started[0] and started[0].returncode in (RunFailed.exit_code, -9):
            # The main process can only say that it lost another one: this is why.
            said = errors[started.index(first) - 1]
            said.seek(0)
            sys.stderr.write(said.read().decode(errors="replace"))
    main, code = started[0].returncode, first.returncode
    if -code in (*SIGNALS, *hung_up):
        end_by(signal.Signals(-code))
    if main >= 0:
        return code if code > 0 else main
    reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    raise RunFailed(
        "run.worker-died",
        f"process {started.index(first)} of {processes} {reason}",
        help="SIGKILL often means that memory ran out; run the same command with --resume",
    )


def tunables() -> dict[str, str]:
    """Return what a process is to be started with whose tensors are in host memory.

    A tensor is an aligned block. glibc before 2.39 sets the leftovers of such a block aside, where
    small objects take them, so that no tensor of its size ever fits there again (its bugs 14581
    and 30723). Measured on 2.36: with this the gaps are 12 to 29 % of a step's tensors, else 43 %.
    """
    try:
        library, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        affected = library == "glibc" and tuple(map(int, version.split("."))) < (2, 39)
    except (AttributeError, OSError, ValueError):  # another C library
        return {}
    if not affected or environment.variable(TUNABLES):
        return {}
    return {TUNABLES: "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}


def start_again(changes: Mapping[str, str]) -> None:
    """Become the same command in an environment with these changes; return where there are none.

    And where the arguments are not those of this process: then somebody calls it from Python.
    """
    given = sys.argv[1:]
    if changes and given and sys.orig_argv[-len(given) :] == given:
        os.execve(sys.executable, sys.orig_argv, {**environment.all_variables(), **changes})


def end_by(number: signal.Signals) -> None:
    """End this process by a signal, so that its parent sees which."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _pass_on(number: int, started: list[subprocess.Popen[bytes]]) -> None:
    for process in started:
        process.send_signal(number)


def _first_failure(started: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Wait for all processes; return the first that failed, the main one when none did."""
    failed = None
    while any(running := [p.poll() is None for p in started]):
        if failed is None:
            failed = next((p for p in started if p.returncode), None)
            if failed and failed.returncode != Interrupted.exit_code:
                _stop([p for p, runs in zip(started, running, strict=True) if runs])
        time.sleep(0.05)
    return failed or next((p for p in started if p.returncode), started[0])


def _stop(running: list[subprocess.Popen[bytes]]) -> None:
    """Give the others a moment to say what they saw, then end them."""
    deadline = time.monotonic() + 10
    for other in running:
        try:
            other.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            other.kill()


class Signalled(KeyboardInterrupt):
    """One of `SIGNALS` came where no step had to be finished first."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """Raise `Signalled` in the block on the first of `SIGNALS`; a second one ends the process.

    So what was begun is cleaned up wherever the signal arrives: loading, tokenising, merging.
    """

    def receive(number: int, _: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        raise Signalled(number)

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stop:
    """A flag that, in a `with` block, the first of `SIGNALS` sets; a second one ends the process.

    Steps and evaluations poll `requested`. What `heard` and `given_up` do comes between any two
    instructions of the process: it must neither wait for a lock nor write into a buffer.

    Args:
        grace: seconds from the signal to the end of the process, where they are limited.
    """

    def __init__(self, grace: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        self.grace = grace
        self.doing = "finishing what is begun"  # what still happens once somebody asks to stop
        self._received = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def comes_before(self, seconds: float) -> bool:
        """Tell whether the process must end before so many seconds of work are done."""
        if self.signal is None or self.grace is None:
            return False
        return time.monotonic() + seconds > self._received + self.grace

    def heard(self) -> None:
        """Answer the first signal; nobody does here."""

    def given_up(self) -> None:
        """Answer the second signal, before it ends the process; nobody does here."""

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._received = signal.Signals(number), time.monotonic()
            self.heard()
            return
        self.signal = signal.Signals(number)
        for other in SIGNALS:  # a third one does not wait for the answer
            signal.signal(other, signal.SIG_DFL)
        try:
            self.given_up()
        finally:
            end_by(signal.Signals(number))
