"""Work is done once each, bounded, and ended by the first error."""

from collections.abc import Iterator
from threading import Event, Timer

import pytest
import torch

from lorakit.threads import BESIDE, Threads


def test_work_in_threads_is_done_once_each_and_bounded() -> None:
    begun: list[int] = []
    ahead = 0
    results: list[int] = []

    def items() -> Iterator[int]:
        nonlocal ahead
        for item in range(50):
            ahead = max(ahead, item - len(results))
            yield item

    def work(item: int) -> int:
        begun.append(item)
        assert torch.get_num_threads() == 1
        return item * item

    threads = torch.get_num_threads()
    with Threads() as shared:
        shared.each(work, items(), results.append)
    assert sorted(results) == [item * item for item in range(50)]
    assert sorted(begun) == list(range(50))
    assert ahead <= 2 * threads
    assert torch.get_num_threads() == threads


def test_an_error_in_a_thread_ends_the_work() -> None:
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 3:
            raise KeyError(item)

    threads = torch.get_num_threads()
    with pytest.raises(KeyError), Threads() as shared:
        shared.each(work, range(10_000))
    assert len(begun) <= 4 + 2 * threads
    assert torch.get_num_threads() == threads


def test_work_beside_ends_with_the_block() -> None:
    """What has begun is waited for, what has not never begins; an error comes with its result."""
    go, ended = Event(), []

    def wait_for_it() -> None:
        assert go.wait(10)
        ended.append(True)

    with Threads() as shared:
        assert shared.beside(divmod, 7, 2).result() == (3, 1)
        failed = shared.beside(divmod, 1, 0)
        with pytest.raises(ZeroDivisionError):
            failed.result()
        begun = [shared.beside(wait_for_it) for _ in range(BESIDE)]
        late = shared.beside(wait_for_it)
        Timer(0.1, go.set).start()
        go.wait(0.01)
    assert all(future.done() for future in begun)
    assert late.cancelled()
    assert len(ended) == BESIDE
