"""The sockets under the connections between processes, and the addresses that lead to them.

    tcp://HOST:PORT    HOST may be a name, an address, an IPv6 address in brackets, or * to listen
    ipc://PATH         a Unix socket

No other address is accepted, because addresses also come from peers.
"""

import os
import socket
import stat
from contextlib import suppress

CONNECT_SECONDS = 3.0
LISTEN_BACKLOG = 512


def tcp_target(address: str) -> tuple[str, int]:
    """Return the host and the port of a tcp address; port * is 0.

    Raises
    ------
    ValueError
        if it has no such form.
    """
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    number = 0 if port == "*" else int(port) if port.isascii() and port.isdecimal() else -1
    if not host or not 0 <= number < 2**16:
        raise ValueError(f"{address!r} is not tcp://HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), number


def connected_socket(address: str) -> socket.socket:
    """Connect to an address, and return a socket that blocks.

    Raises
    ------
    OSError
        if it cannot connect within CONNECT_SECONDS, or has no free descriptor.
    ValueError
        if the address is not acceptable.
    """
    if address.startswith("tcp://"):
        connected = socket.create_connection(tcp_target(address), CONNECT_SECONDS)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    elif address.startswith("ipc:///"):
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.settimeout(CONNECT_SECONDS)
            connected.connect(address.removeprefix("ipc://"))
        except BaseException:
            connected.close()
            raise
    else:
        raise ValueError(f"{address!r} is neither tcp://HOST:PORT nor ipc:///PATH")
    connected.settimeout(None)
    return connected


def listening_socket(listen: str) -> socket.socket:
    """Return a socket that listens on an address, and does not block.

    Raises
    ------
    OSError
        if it cannot be bound.
    ValueError
        if the address is not acceptable.
    """
    if listen.startswith("tcp://"):
        host, port = tcp_target(listen)
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        target: tuple[str, int] | str = ("" if host == "*" else host, port)
    elif listen.startswith("ipc://"):
        listener = socket.socket(socket.AF_UNIX)
        target = listen.removeprefix("ipc://")
        remove_unix_socket(target)
    else:
        raise ValueError(f"{listen!r} is neither tcp://HOST:PORT nor ipc://PATH")
    try:
        listener.bind(target)
        listener.listen(LISTEN_BACKLOG)
    except BaseException:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def remove_unix_socket(path: str) -> None:
    """Remove a Unix socket that a process which is gone has left behind."""
    with suppress(OSError, ValueError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)


def address_of(listener: socket.socket, advertise: str) -> str:
    """Return the address that others connect to: with the host `advertise`, unless it is empty."""
    bound = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"ipc://{os.path.abspath(bound)}"
    host, port = bound[:2]
    return f"tcp://{advertise or (f'[{host}]' if ':' in host else host)}:{port}"
