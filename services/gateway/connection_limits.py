"""How many HTTP connections there may be, in all and for each client, and which one gives way."""

import resource
from collections.abc import Iterable
from enum import IntEnum
from typing import Protocol

from services.gateway.limits import MAX_CONNECTIONS

OTHER_DESCRIPTORS = 64
"""Descriptors of the process that are neither HTTP nor gRPC connections."""


class Standing(IntEnum):
    """How far a connection has come with its request."""

    SENDING_HEAD = 0
    """It is idle, or has not sent all headers of its next request."""
    SENDING_BODY = 1
    WAITING = 2
    """Its request is complete and is being answered."""


class Connection(Protocol):
    """What ConnectionLimits needs from a connection."""

    @property
    def standing(self) -> Standing: ...

    def evict(self) -> None:
        """Close the connection at once."""
        ...


class ConnectionLimits:
    """Admits connections, so that no client's connections keep another client's out.

    A client gets at most half of the places that the others leave. If it wants more, its oldest
    connection that is not sending a body gives way. If it has none, one of the client with the most
    does, unless that is being answered.
    """

    def __init__(self, most: int, most_per_client: int | None = None) -> None:
        """Admit `most` connections in all, and `most_per_client` of one client if that is fewer
        than half of what the others leave."""
        self._most = most
        self._most_per_client = most if most_per_client is None else most_per_client
        self._by_client = dict[str, dict[Connection, None]]()
        """The connections of each client, in the order in which they came."""
        self._num_connections = 0

    def make_room(self, client: str) -> bool:
        """Whether there is a place for a further connection of the client.

        Another connection may be evicted for it.
        """
        own = self._by_client.get(client, {})
        left_by_others = self._most - (self._num_connections - len(own))
        if len(own) < min(left_by_others // 2, self._most_per_client):
            return True
        if self._evict(client, own, Standing.SENDING_HEAD):
            return True
        if len(own) >= self._most_per_client or not self._by_client:
            return False
        heaviest = max(self._by_client, key=lambda name: len(self._by_client[name]))
        others = self._by_client[heaviest]
        return len(others) > len(own) + 1 and self._evict(heaviest, others, Standing.SENDING_BODY)

    def add(self, client: str, connection: Connection) -> None:
        """Count a new connection."""
        self._by_client.setdefault(client, {})[connection] = None
        self._num_connections += 1

    def remove(self, client: str, connection: Connection) -> None:
        """Count a connection no longer. Another call has no effect."""
        own = self._by_client.get(client, {})
        if connection not in own:
            return
        del own[connection]
        self._num_connections -= 1
        if not own:
            del self._by_client[client]

    def _evict(self, client: str, connections: Iterable[Connection], most: Standing) -> bool:
        """Evict the oldest connection that has come no further than `most`, if there is one."""
        for connection in connections:
            if connection.standing <= most:
                self.remove(client, connection)
                connection.evict()
                return True
        return False


def num_connections_allowed(wanted: int = MAX_CONNECTIONS) -> int:
    """Return how many HTTP connections the process can have, at most `wanted`.

    They get half of the descriptors. The other half is for gRPC connections.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, (soft - OTHER_DESCRIPTORS) // 2))
