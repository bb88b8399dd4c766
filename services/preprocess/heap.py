"""A heap of things whose places change often: old entries stay in it until they are met."""

import heapq
import itertools
from typing import Generic, Protocol, TypeVar

STALE_FACTOR = 4
"""A heap is cleaned when it has this many times more entries than valid ones."""
LEAST_CLEANED = 64

_entries = itertools.count()


class Placed(Protocol):
    """What can be in a heap, in one at a time."""

    entry: int
    """Names its valid entry; NO_ENTRY if it has none."""


NO_ENTRY = -1
T = TypeVar("T", bound=Placed)


class Heap(Generic[T]):
    """Things in the order of their places. Things at equal places take turns."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []

    def put(self, thing: T, place: float, num_valid: int) -> None:
        """Put a thing here, at another place than before or out of another heap.

        `num_valid` is about how many things are here.
        """
        thing.entry = next(_entries)
        heapq.heappush(self._heap, (place, thing.entry, thing))
        if len(self._heap) > max(LEAST_CLEANED, STALE_FACTOR * num_valid):
            self._heap = [entry for entry in self._heap if is_valid(entry)]
            heapq.heapify(self._heap)

    def first(self, count: int) -> list[T]:
        """Return the things with the lowest places, at most `count`."""
        found: list[tuple[float, int, T]] = []
        while self._heap and len(found) < count:
            entry = heapq.heappop(self._heap)
            if is_valid(entry):
                found.append(entry)
        for entry in found:
            heapq.heappush(self._heap, entry)
        return [thing for _, _, thing in found]


def is_valid(entry: tuple[float, int, Placed]) -> bool:
    """Whether an entry is the latest one of its thing."""
    return entry[2].entry == entry[1]
