"""Best-fit decreasing over a stream, window by window."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def best_fit(items: Iterable[T], *, size: Callable[[T], int], capacity: int, window: int) -> Iterator[list[T]]:
    """Group items so that the sizes in a group sum to at most ``capacity``, with groups as full as possible.

    Within a window the largest item is placed first, each into the fullest group that still has room; groups are not
    carried from one window to the next, so that memory is bounded by the window. Deterministic; every item comes out
    once.

    Args:
        items: each of size 1 to ``capacity``.
        window: number of items that are placed together.
    """
    iterator = iter(items)
    while chunk := list(islice(iterator, window)):
        groups: list[list[T]] = []
        room: list[tuple[int, int]] = []  # (free, group), sorted
        for item in sorted(chunk, key=size, reverse=True):
            need = size(item)
            at = bisect.bisect_left(room, (need, -1))
            if at == len(room):
                groups.append([item])
                free, group = capacity - need, len(groups) - 1
            else:
                free, group = room.pop(at)
                groups[group].append(item)
                free -= need
            if free:
                bisect.insort(room, (free, group))
        yield from groups
