"""Waits for many ZeroMQ sockets at the cost of those that have something: zmq's own poll asks every
socket each time, twice."""

import select
from typing import Any

import zmq

from common.sockets import has_message

Socket = zmq.Socket[bytes]
Source = Any
"""A socket, or the number of an open file."""


class Poller:
    """Of sockets and plain file descriptors. Whoever is told of a socket must read it until it has
    nothing more, or ask it: that takes the news from the descriptor, which would else be
    readable for ever."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._sources: dict[int, Source] = {}
        self._used: set[Source] = set()

    def register(self, source: Source) -> None:
        self._sources[number_of(source)] = source
        self._epoll.register(number_of(source), select.EPOLLIN)
        self._used.add(source)

    def unregister(self, source: Source) -> None:
        """Before the socket is closed."""
        number = number_of(source)
        del self._sources[number]
        self._epoll.unregister(number)
        self._used.discard(source)

    def used(self, socket: Socket) -> None:
        """It was sent on, in which ZeroMQ may have taken the news that something arrived: its
        descriptor does not tell of it any more. Nor does that of a socket in which the last look
        found something."""
        self._used.add(socket)

    def has_missed(self) -> bool:
        """Whether something can be read that no descriptor tells of: then `wait` must not wait."""
        self._used = {
            source for source in self._used if not isinstance(source, int) and has_message(source)
        }
        return bool(self._used)

    def wait(self, seconds: float) -> list[int]:
        """Descriptors with news, for `ready`. Touches no socket: others may use them meanwhile."""
        return [number for number, _ in self._epoll.poll(seconds)]

    def ready(self, numbers: list[int]) -> list[Source]:
        """The sources of these descriptors, which may have something, and those where something was
        missed."""
        told = [source for number in numbers if (source := self._sources.get(number)) is not None]
        missed = [
            source
            for source in self._used
            if source not in told and not isinstance(source, int) and has_message(source)
        ]
        self._used.clear()
        return told + missed

    def fileno(self) -> int:
        """Can be read when `wait` would not wait."""
        return self._epoll.fileno()

    def close(self) -> None:
        self._epoll.close()


def number_of(source: Source) -> int:
    return source if isinstance(source, int) else int(source.getsockopt(zmq.FD))
