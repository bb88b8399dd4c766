"""Queues in which urgent work comes first, and equally urgent work in the order of its arrival."""

from collections import OrderedDict
from typing import Protocol, TypeVar

K = TypeVar("K")


class Prioritized(Protocol):
    """Something that waits in a queue."""

    @property
    def priority(self) -> int:
        """Lower values come first."""
        ...


V = TypeVar("V", bound=Prioritized)


def enqueue(queue: OrderedDict[K, V], key: K, value: V, first: bool = False) -> None:
    """Add a value behind all that are as urgent, or before them if it comes `first`.

    If nothing in the queue is more or less urgent, this takes the same short time in any queue.
    """
    if first:
        queue[key] = value
        queue.move_to_end(key, last=False)
        _move_behind_urgent(queue, key, value.priority)
        return
    last = queue[next(reversed(queue))] if queue else value
    behind = []
    if last.priority > value.priority:
        behind = [other for other in queue if queue[other].priority > value.priority]
    queue[key] = value
    for other in behind:
        queue.move_to_end(other)


def _move_behind_urgent(queue: OrderedDict[K, V], key: K, priority: int) -> None:
    """Move the first value of the queue behind those that are more urgent."""
    urgent = []
    for other, value in queue.items():
        if other != key:
            if value.priority >= priority:
                break
            urgent.append(other)
    for other in reversed(urgent):
        queue.move_to_end(other, last=False)
