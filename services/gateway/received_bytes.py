"""How many bytes the clients of a port have sent, as the kernel counts them.

grpcio does not say how much of a message has arrived. The kernel counts for each connection.
"""

import os
import socket
import struct
from urllib.parse import unquote

BYTES_RECEIVED_OFFSET = 128
"""Where the kernel's struct tcp_info has the 64-bit count tcpi_bytes_received."""

Address = tuple[str, int]


def address_of(peer: str) -> Address | None:
    """Return host and port of a peer as gRPC names it, or None if it is not an IP address."""
    kind, _, rest = peer.partition(":")
    host, _, port = unquote(rest).rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdigit():
        return None
    return host.strip("[]"), int(port)


class ReceivedBytes:
    """Counts for the connections of this process, found by the address of the client."""

    def __init__(self) -> None:
        self._descriptors: dict[Address, int] = {}

    def known(self, peer: str) -> int | None:
        """Return the bytes received from the peer, or None if its connection is not found yet."""
        address = address_of(peer)
        descriptor = self._descriptors.get(address) if address else None
        return None if descriptor is None else received(descriptor, address)

    def find(self, peers: set[str]) -> None:
        """Look for the connections of these peers, so that they are known."""
        addresses = {address for peer in peers if (address := address_of(peer))}
        if not addresses:
            return
        self._descriptors = {}
        for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
            if address := remote_address(int(name)):
                self._descriptors[address] = int(name)


def remote_address(descriptor: int) -> Address | None:
    """Return the remote address of a TCP connection, or None if the descriptor is not one."""
    try:
        connection = socket.socket(fileno=descriptor)
    except OSError:
        return None
    try:
        host, port, *_ = connection.getpeername()
        return host.partition("%")[0].removeprefix("::ffff:"), port
    except (OSError, ValueError):
        return None
    finally:
        connection.detach()


def received(descriptor: int, address: Address | None) -> int | None:
    """Return the bytes received on a connection, or None if it is not the one to this address."""
    if remote_address(descriptor) != address:
        return None
    try:
        connection = socket.socket(fileno=descriptor)
    except OSError:
        return None
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        return int(struct.unpack_from("Q", info, BYTES_RECEIVED_OFFSET)[0])
    except (OSError, struct.error):
        return None
    finally:
        connection.detach()
