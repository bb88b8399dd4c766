"""Keeps the gRPC connections of one client from refusing those of another.

grpcio limits the number of connections, but not for each client. So clients that have more than
their share lose what is too much, within a second.
"""

import asyncio
import socket
from contextlib import suppress

from common.logs import get_logger
from services.gateway.body_budget import client_of
from services.gateway.kernel import connections, descriptors, looked_at, remote_address

CHECK_SECONDS = 1.0


class ConnectionShares:
    """The connections of a port, of which a client gets at most half of what the others leave."""

    def __init__(self, port: int, most: int) -> None:
        self._port = port
        self._most = most

    async def keep(self) -> None:
        """Close what is too much, for ever."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            # Looking at each descriptor takes a thousand times longer than counting them.
            if len(descriptors()) > self._most // 4:
                self.check()

    def check(self) -> None:
        """Close the newest connections of each client that has too many."""
        by_client: dict[str, list[tuple[int, tuple[str, int]]]] = {}
        for descriptor, address, port in connections():
            if port == self._port:
                by_client.setdefault(client_of(address[0]), []).append((descriptor, address))
        total = sum(map(len, by_client.values()))
        # The client with the most comes first. What it loses is then left to the others.
        for client, own in sorted(by_client.items(), key=lambda item: -len(item[1])):
            share = max(1, (self._most - (total - len(own))) // 2)
            surplus = own[share:]
            total -= len(surplus)
            for descriptor, address in surplus:
                close(descriptor, address)
            if surplus:
                reason = "closed connections of a client that has too many"
                get_logger().warning(reason, client=client, closed=len(surplus))


def close(descriptor: int, address: tuple[str, int]) -> None:
    """Shut the connection down, if the descriptor still is the connection to this address."""
    with suppress(OSError), looked_at(descriptor) as connection:
        if remote_address(connection) == address:
            connection.shutdown(socket.SHUT_RDWR)
