"""A poller for many ZeroMQ sockets, which costs only as much as the sockets that have a message.

zmq's own poll asks every socket twice each time. This one waits on the sockets' file descriptors
with epoll. The catch is that such a descriptor only signals a change, and that every call on the
socket may consume the signal. So after a socket was used, it must be asked itself once more before
the next wait. `note_use` remembers that, and `has_unreported` asks.
"""

import select

import zmq

from common.sockets import Socket, has_message

Source = Socket | int
"""A socket, or the descriptor of an open file."""


class Poller:
    """Waits for sockets and plain file descriptors.

    The caller must read a socket that `ready` returned until it has no more messages. Otherwise its
    descriptor stays readable.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._sources: dict[int, Source] = {}
        self._unchecked: set[Socket] = set()
        """Sockets whose descriptor may be silent although they have a message."""

    def register(self, source: Source) -> None:
        descriptor = descriptor_of(source)
        self._sources[descriptor] = source
        self._epoll.register(descriptor, select.EPOLLIN)
        if not isinstance(source, int):
            self._unchecked.add(source)

    def unregister(self, socket: Socket) -> None:
        """Forget a socket. Call this before the socket is closed."""
        descriptor = descriptor_of(socket)
        del self._sources[descriptor]
        self._epoll.unregister(descriptor)
        self._unchecked.discard(socket)

    def note_use(self, socket: Socket) -> None:
        """Note that something was sent on a socket, which may have consumed its signal."""
        self._unchecked.add(socket)

    def has_unreported(self) -> bool:
        """Whether a socket has a message that its descriptor may not signal.

        If so, the caller must not wait, but call `ready`.
        """
        self._unchecked = {socket for socket in self._unchecked if has_message(socket)}
        return bool(self._unchecked)

    def wait(self, seconds: float) -> list[int]:
        """Wait for descriptors, and return those that are readable, for `ready`.

        This touches no socket, so other threads may use the sockets in the meantime.
        """
        return [descriptor for descriptor, _ in self._epoll.poll(seconds)]

    def ready(self, descriptors: list[int]) -> list[Source]:
        """Return the sources of these descriptors, and all sockets with unreported messages."""
        signalled = [
            source
            for descriptor in descriptors
            if (source := self._sources.get(descriptor)) is not None
        ]
        unreported = [
            socket for socket in self._unchecked if socket not in signalled and has_message(socket)
        ]
        self._unchecked.clear()
        return signalled + unreported

    def fileno(self) -> int:
        """Return a descriptor that is readable when `wait` would return at once."""
        return self._epoll.fileno()

    def close(self) -> None:
        self._epoll.close()


def descriptor_of(source: Source) -> int:
    return source if isinstance(source, int) else int(source.getsockopt(zmq.FD))
