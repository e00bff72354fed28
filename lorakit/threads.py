"""Threads that share out work on many items."""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import ParamSpec, Self, TypeVar

import torch

BESIDE = 2  # threads for what mostly waits, as for the disk

Given = ParamSpec("Given")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Threads:
    """As many threads as torch may use, while each of its operations takes one.

    So a result does not depend on how many there are. On leaving the `with` block what has begun
    is waited for, and what has not never begins.
    """

    def __enter__(self) -> Self:
        self.count = torch.get_num_threads()
        torch.set_num_threads(1)
        self._workers, self._beside = ThreadPoolExecutor(self.count), ThreadPoolExecutor(BESIDE)
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._workers, self._beside):
            pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.count)

    def each(
        self,
        work: Callable[[Item], Result],
        items: Iterable[Item],
        then: Callable[[Result], object] = lambda _: None,
    ) -> None:
        """Do `work` for each item, and hand each result to `then`, in any order, in this thread.

        At most two items a thread are begun or wait. This thread is the one that a signal or an
        error ends.
        """
        begun: set[Future[Result]] = set()
        for item in items:
            if len(begun) == 2 * self.count:
                begun = _handed_on(begun, then)
            begun.add(self._workers.submit(work, item))
        while begun:
            begun = _handed_on(begun, then)

    def beside(
        self, work: Callable[Given, Result], *arguments: Given.args, **options: Given.kwargs
    ) -> Future[Result]:
        """Do work while this thread goes on; its error comes with its result."""
        return self._beside.submit(work, *arguments, **options)


def _handed_on(begun: set[Future[Result]], then: Callable[[Result], object]) -> set[Future[Result]]:
    done, still = wait(begun, return_when=FIRST_COMPLETED)
    for future in done:
        then(future.result())
    return still
