"""Addresses to listen on, and the address by which others reach this host."""

import ipaddress
import socket
import threading

from common.config import BadSetting
from common.logs import get_logger
from common.messages import Peer

RETRY_SECONDS = 1.0


def host_port(host: str, port: int) -> str:
    """Return HOST:PORT as URLs and gRPC write it, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to this address.

    Raises
    ------
    OSError
        if the address cannot be bound.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def objection_to_peer(peer: Peer) -> str:
    """Return why a peer that a message names cannot be connected to; empty if it may be tried."""
    scheme, _, rest = peer.address.partition("://")
    if not peer.id or scheme not in ("tcp", "ipc") or not rest or not peer.address.isprintable():
        return "a member that the message names is not at tcp://HOST:PORT or ipc://PATH"
    return ""


def is_wildcard(listen: str) -> bool:
    """Whether `listen` means every interface, so that others cannot use it as an address."""
    return listen.startswith(("tcp://0.0.0.0:", "tcp://*:", "tcp://[::]:"))


def is_local_only(address: str) -> bool:
    """Whether a ZeroMQ address is of no use on another host.

    Such are loopback, all interfaces, and Unix sockets.
    """
    if not address.startswith("tcp://"):
        return bool(address)
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host in ("localhost", "*")
    return ip.is_loopback or ip.is_unspecified


def check_advertised(listen: str, advertise: str) -> None:
    """Check that `advertise` can lead to where `listen` does.

    Raises
    ------
    BadSetting
        if the host listens on loopback only, but advertises another address.
    """
    loopback = listen.startswith("tcp://") and is_local_only(listen) and not is_wildcard(listen)
    if advertise and loopback and not is_local_only(f"tcp://{advertise}:1"):
        raise BadSetting(
            f"--advertise {advertise}: other hosts cannot reach {listen}; also give --listen "
            "tcp://0.0.0.0:PORT"
        )


def own_address(controller: str, stop: threading.Event) -> str:
    """Return the address of this host on the route to the controller.

    Wait while the controller's name cannot be resolved. Return an empty text after `stop`.
    """
    while not stop.is_set():
        try:
            return address_towards(controller)
        except OSError as e:
            get_logger().info(
                "waiting until the controller's name can be resolved",
                controller=controller,
                reason=str(e),
            )
            stop.wait(RETRY_SECONDS)
    return ""


def address_towards(target: str) -> str:
    """Return the address of this host on the route to `target` (HOST:PORT).

    Raises
    ------
    OSError
        if the name cannot be resolved, or there is no route.
    """
    if target.startswith("unix:"):
        return "127.0.0.1"
    host, _, port = target.rpartition(":")
    family, kind, _, _, address = socket.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing: the kernel only chooses the route
        own: str = probe.getsockname()[0]
    return f"[{own}]" if family == socket.AF_INET6 else own
