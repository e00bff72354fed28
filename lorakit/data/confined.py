"""A stranger's template runs in a process of its own, which is ended when it takes too much.

The sandbox bounds what one operation makes; loops, doublings and filters go beyond any such bound
in time, and code in C cannot be interrupted. So every template shares one child with limits of the
kernel: processor time a call, and address space.
"""

import atexit
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from lorakit.data.sandbox import Template
from lorakit.errors import BadInput

SECONDS = 2  # of processor time, to compile a template or to render one conversation
PATIENCE = 60  # seconds by the clock, for a machine that is busy
MEMORY = 1 << 30  # bytes
# Of all renderings together: a generous pace, and what is spent before it is asked for.
PACE = 0.05  # seconds of processor time a rendering; templates that people write take one or two ms
ALLOWANCE = 10.0  # seconds

_SERVE = "from lorakit.data.confined import serve; serve()"
_READY = b"ready\n"
_NO_MEMORY = 3  # the child's exit status where Python itself said so


class ConfinedTemplate:
    """A chat template that cannot take more time or memory than it is given."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        """Compile.

        Args:
            source: the template's text.
            variables: what it sees beside the messages: special tokens by name.

        Raises:
            BadInput: as `Template` does, and `template.limit` when it takes too much.
        """
        self.source, self._variables = source, dict(variables)
        self._renderings, self._seconds = 0, 0.0
        self._worker, self._number = self._compiled()

    def render(self, messages: Sequence[Mapping[str, str]], *, generation: bool) -> str:
        """Return the text of the messages; with `generation`, up to where an answer would begin.

        Raises:
            BadInput: as `Template.render` does, and `template.limit` when it takes too much.
        """
        with _turn:
            if self._worker is not _workers.get(os.getpid()):  # it was ended, or this is a fork
                self._worker, self._number = self._compiled()
            request = {"number": self._number, "messages": messages, "generation": generation}
            text, seconds = self._worker.ask(request)
            self._renderings += 1
            self._seconds += seconds
        if self._seconds > ALLOWANCE + PACE * self._renderings:
            raise _limit(
                f"{self._renderings:,} renderings took {self._seconds:.0f} seconds; at most "
                f"{PACE * 1000:.0f} ms each are given to a data set"
            )
        return str(text)

    def _compiled(self) -> tuple["_Worker", int]:
        with _turn:
            worker = _workers.get(os.getpid()) or _Worker()
            number, _ = worker.ask({"source": self.source, "variables": self._variables})
            return worker, int(number)


class _Worker:
    """The child of this process that runs templates."""

    def __init__(self) -> None:
        ours, theirs = (os.pipe() for _ in range(2))
        self._process = subprocess.Popen(
            # It finds modules where this process does.
            [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {sys.path}; {_SERVE}"],
            stdin=theirs[0],
            stdout=ours[1],
            stderr=subprocess.DEVNULL,
            process_group=0,  # a terminal's Ctrl-C is for the parent, which then ends the child
        )
        for descriptor in (theirs[0], ours[1]):
            os.close(descriptor)
        self._asking, self._answering = os.fdopen(theirs[1], "wb"), os.fdopen(ours[0], "rb")
        atexit.register(self.close)
        _workers[os.getpid()] = self
        if self._read() != _READY:
            raise RuntimeError("the process for templates did not start")

    def ask(self, request: Mapping[str, Any]) -> tuple[Any, float]:
        """Return what the child answers, and the seconds of processor time that it took.

        Raises:
            BadInput: what the child raised; `template.limit` when it was ended.
            RuntimeError: when it ended by itself, which is a fault of ours.
        """
        answer = b""
        with suppress(BrokenPipeError):
            self._asking.write(json.dumps(request).encode() + b"\n")
            self._asking.flush()
            answer = self._read()
        if not answer.endswith(b"\n"):
            status = self._ended()
            if status not in (None, _NO_MEMORY) and status >= 0:
                raise RuntimeError(f"the process for templates ended with status {status}")
            raise _limit(
                f"it takes more than {SECONDS} seconds, or more than {MEMORY >> 20} MiB of memory"
            )
        found = json.loads(answer)
        if "id" in found:
            raise BadInput(found["id"], found["message"])
        return found["answer"], found["seconds"]

    def _ended(self) -> int | None:
        """End the child; return its exit status, negative by a signal, None where it was at work.

        The kernel's limits are signals; a bug in the child is a status.
        """
        try:
            return self._process.wait(1)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.close()

    def _read(self) -> bytes:
        """Read a line; what is there, or nothing, when the child ends or takes too long."""
        ready, _, _ = select.select([self._answering], [], [], PATIENCE)
        return self._answering.readline() if ready else b""

    def close(self) -> None:
        """End the child; the next template starts another."""
        if _workers.get(os.getpid()) is self:
            del _workers[os.getpid()]
            self._process.kill()
            self._process.wait()
            with suppress(BrokenPipeError):
                self._asking.close()
            self._answering.close()
        atexit.unregister(self.close)


_turn = threading.RLock()  # threads share the child, and an answer belongs to who asked
_workers: dict[int, _Worker] = {}  # by process: a fork must not talk to its parent's


def _limit(said: str) -> BadInput:
    return BadInput("template.limit", f"the chat template goes beyond a limit: {said}")


def serve() -> None:
    """Answer requests on stdin until it ends: what the child does."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stdout.buffer.write(_READY)
    sys.stdout.flush()
    templates: list[Template] = []
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        # Whole seconds: the one that has begun does not count.
        limit = int(used.ru_utime + used.ru_stime) + 1 + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        began = time.process_time()
        try:
            answer = _answer(json.loads(line), templates)
            answer["seconds"] = time.process_time() - began
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        except MemoryError:
            os._exit(_NO_MEMORY)


def _answer(request: Mapping[str, Any], templates: list[Template]) -> dict[str, Any]:
    try:
        if "source" in request:
            templates.append(Template(request["source"], request["variables"]))
            return {"answer": len(templates) - 1}
        template = templates[request["number"]]
        return {"answer": template.render(request["messages"], generation=request["generation"])}
    except BadInput as error:
        return {"id": error.id, "message": error.message}
