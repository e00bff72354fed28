"""A copy of this process that carries out one action, so that imports are paid once."""

import gc
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Self

from lorakit.processes import SIGNALS

CRASHED = 99  # exit code of a child whose action raised


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal that ended it, and what it printed."""

    code: int
    said: str

    def __str__(self) -> str:
        return f"exit {self.code}: {self.said[-600:]}"


class Child:
    """A forked process; a held one waits until `release`, for instance until it is traced."""

    def __init__(self, action: Callable[[], int | None], *, held: bool = False) -> None:
        self._printed = os.memfd_create("printed")
        waiting, self._gate = os.pipe()
        # A signal may come before the child is on its own: it waits until then.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        gc.freeze()  # else a look for garbage in the child copies every page of this process
        with warnings.catch_warnings():  # torch has threads; the child runs none of their code
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        else:
            os.close(self._gate)
            if held:
                os.read(waiting, 1)
            self._become(action)
        os.close(waiting)

    def _become(self, action: Callable[[], int | None]) -> NoReturn:
        code: int | None = CRASHED
        try:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            for descriptor in (1, 2):
                os.dup2(self._printed, descriptor)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            code = action()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)

    def release(self) -> Self:
        """Let a held child begin."""
        os.write(self._gate, b"!")
        return self

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a child that has ended hears nothing, for it is waited for later."""
        os.kill(self.pid, number)

    def ended(self, patience: float = 120) -> Ended:
        """Wait for the child's end; one that takes longer is killed and is a failure."""
        deadline = time.monotonic() + patience
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                found = os.waitpid(self.pid, 0)
                raise AssertionError(f"no end after {patience} s: {self._read()[-600:]}")
            time.sleep(0.002)
        os.close(self._gate)
        return Ended(os.waitstatus_to_exitcode(found[1]), self._read())

    def _read(self) -> str:
        os.lseek(self._printed, 0, os.SEEK_SET)
        with open(self._printed, "rb") as file:
            return file.read().decode(errors="replace")


def run(action: Callable[[], int | None]) -> Ended:
    """Carry out an action in a child and wait for its end."""
    return Child(action).ended()
