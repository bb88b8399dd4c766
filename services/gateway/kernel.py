"""What the kernel knows about the connections of the gRPC server, which grpcio does not say.

The kernel counts the bytes that each connection has received. So it is known how much of a message
has arrived, and how many connections a client has. The sockets belong to grpcio. They are looked
at, and never kept.
"""

import os
import resource
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import unquote

BYTES_RECEIVED_OFFSET = 128
"""Where the kernel's struct tcp_info has the 64-bit count tcpi_bytes_received."""

MAX_DESCRIPTORS = 2**16
"""The most numbers that are tried as descriptors."""

Address = tuple[str, int]


def address_of(peer: str) -> Address | None:
    """Return host and port of a peer as gRPC names it, or None if it is not an IP address."""
    kind, _, rest = peer.partition(":")
    host, _, port = unquote(rest).rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdigit():
        return None
    return host.strip("[]").partition("%")[0], int(port)


@contextmanager
def looked_at(descriptor: int) -> Iterator[socket.socket]:
    """Return the socket of a descriptor for the time of the block.

    Raises
    ------
    OSError
        if it is not a socket, or no more.
    """
    connection = socket.socket(fileno=descriptor)
    try:
        yield connection
    finally:
        connection.detach()


def remote_address(connection: socket.socket) -> Address | None:
    """Return the remote address of a TCP connection; None for other sockets."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    return plain_address(connection.getpeername())


def plain_address(address: tuple[str, int]) -> Address:
    """Return host and port of a socket's address, as IPv4 if it is IPv4 written as IPv6."""
    return address[0].partition("%")[0].removeprefix("::ffff:"), address[1]


def descriptors() -> Sequence[int]:
    """Return the descriptors of this process, in their order.

    Listing them takes one. If none is left, all numbers that there may be are returned.
    """
    try:
        return sorted(map(int, os.listdir("/proc/self/fd")))
    except OSError:
        return range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], MAX_DESCRIPTORS))


def connections() -> Iterator[tuple[int, Address, int]]:
    """Yield descriptor, remote address and local port of each TCP connection of this process."""
    for descriptor in descriptors():
        try:
            with looked_at(descriptor) as connection:
                if address := remote_address(connection):
                    yield descriptor, address, connection.getsockname()[1]
        except OSError:
            continue


class ReceivedBytes:
    """The number of bytes that the connections of this process have received."""

    def __init__(self) -> None:
        self._descriptors: dict[Address, int] = {}

    def known(self, peer: str) -> int | None:
        """Return the bytes received from the peer, or None if its connection is not found yet."""
        address = address_of(peer)
        descriptor = self._descriptors.get(address) if address else None
        if descriptor is None:
            return None
        try:
            with looked_at(descriptor) as connection:
                if remote_address(connection) != address:
                    return None
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                return int(struct.unpack_from("Q", info, BYTES_RECEIVED_OFFSET)[0])
        except (OSError, struct.error):
            return None

    def find(self, peers: set[str]) -> None:
        """Look for the connections of these peers, so that they are known."""
        if any(map(address_of, peers)):
            self._descriptors = {address: descriptor for descriptor, address, _ in connections()}
