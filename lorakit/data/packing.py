"""Packing: which rows share a micro-batch. No row is dropped, repeated or split."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from heapq import heapreplace

import numpy as np


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return packs of indices whose lengths add up to at most `capacity`, best fit decreasing.

    Longest first, each goes where the least room is left. One that is longer than the capacity
    gets a pack of its own. Takes O(n log n) for n lengths (Johnson 1974: at most 11/9 of the
    fewest packs possible, and one more).

    >>> pack([3, 5, 2, 4], capacity=7)
    [[1, 2], [3, 0]]
    """
    packs: list[list[int]] = []
    rooms: list[int] = []  # the distinct sizes of room left, ascending
    with_room: dict[int, list[int]] = defaultdict(list)  # room left: packs
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = lengths[index]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            number, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[at]
            number = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        packs[number].append(index)
        room -= length
        if room > 0:
            if not with_room[room]:
                insort(rooms, room)
            with_room[room].append(number)
    return packs


def spread(lengths: Sequence[int], capacity: int, multiple: int = 1) -> list[list[int]]:
    """Return as few packs as `pack` makes, or the next multiple of them, as even as can be.

    Longest first, each goes where least is (Graham 1969: the fullest has at most 4/3 of the least
    possible); where a pack so becomes larger than the capacity, the packs of `pack`.

    >>> spread([3, 5, 2, 4], capacity=12)
    [[1, 2], [3, 0]]
    """
    packs = pack(lengths, capacity)
    count = min(-(-len(packs) // multiple) * multiple, len(lengths))
    even: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, number) for number in range(count)]
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        tokens, number = filled[0]
        even[number].append(index)
        heapreplace(filled, (tokens + lengths[index], number))
    fits = max(tokens for tokens, _ in filled) <= max(capacity, *lengths)
    return even if fits else packs


def padded_groups(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return groups of indices, longest first, that take at most `budget` tokens when padded.

    >>> padded_groups([3, 5, 2, 4], budget=10)
    [[1, 3], [0, 2]]
    """
    groups: list[list[int]] = []
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
