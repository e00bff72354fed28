"""How a run answers the signals that stop it."""

import shlex
import signal
import sys
from contextlib import suppress

from lorakit.cli.screen import Screen
from lorakit.errors import LorakitError
from lorakit.processes import Stop
from lorakit.training.checkpoint import saved_steps
from lorakit.training.folder import RunFolder


class AnsweredStop(Stop):
    """A flag of the main process, which says at once that it was set, and what a second one does.

    The process may be deep in a step that takes another minute: without an answer a user takes it
    for dead and stops it again, which loses that step.
    """

    def __init__(
        self, screen: Screen, folder: RunFolder, processes: int, grace: float | None
    ) -> None:
        super().__init__(grace)
        self._screen, self._folder, self._processes = screen, folder, processes

    def heard(self) -> None:
        """Say what still happens; with `--quiet` only the log holds it."""
        again = "Ctrl-C again" if self.signal is signal.SIGINT else "a second signal"
        self._screen.answer(f"{self.doing}; {again} stops without saving", progress=True)

    def given_up(self) -> None:
        """Write down that the run was interrupted, and say what there is to go on from."""
        name = self.signal.name if self.signal else "a signal"
        with suppress(LorakitError):  # the disk may be why somebody stops it
            saved = saved_steps(self._folder.checkpoints)[-1:]
        if saved:
            what, mode = f"what came after step {saved[0]} is not saved; go on with", "--resume"
        else:
            what, mode = "nothing was saved; start again with", "--overwrite"
        way = command_again(mode, self._processes)
        self._screen.answer(f"stopped by {name} without saving: {what}: {way}")
        self._folder.end("interrupted", f"a second {name}")


def command_again(mode: str, processes: int) -> str:
    """Return the command line of this process with another mode."""
    modes = ("--resume", "--resume-or-start", "--overwrite")
    words = [word for word in sys.argv[1:] if word not in modes]
    several = ["--nproc", str(processes)] if processes > 1 else []
    return shlex.join(["lorakit", *words, *several, mode])
