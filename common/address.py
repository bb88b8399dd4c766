"""Where a door listens: host and port as one text, the socket that is bound there, and what others
call this host."""

import ipaddress
import socket
import threading

from common.config import BadSetting
from common.logs import get_logger

RETRY_SECONDS = 1.0


def host_port(host: str, port: int) -> str:
    """As URLs and gRPC write it: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bound_socket(host: str, port: int) -> socket.socket:
    """Raises OSError where the address cannot be had."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def is_wildcard(listen: str) -> bool:
    """Whether it is every interface of this host, which is no address for others."""
    return listen.startswith(("tcp://0.0.0.0:", "tcp://*:", "tcp://[::]:"))


def is_local_only(address: str) -> bool:
    """Whether a ZeroMQ address leads elsewhere, or nowhere, from another host: loopback, all
    interfaces, a Unix socket."""
    if not address.startswith("tcp://"):
        return bool(address)
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host in ("localhost", "*")
    return ip.is_loopback or ip.is_unspecified


def check_advertised(listen: str, advertise: str) -> None:
    """Raises BadSetting for a name of this host that does not lead to where it listens."""
    loopback = listen.startswith("tcp://") and is_local_only(listen) and not is_wildcard(listen)
    if advertise and loopback and not is_local_only(f"tcp://{advertise}:1"):
        raise BadSetting(
            f"--advertise {advertise}: nobody reaches {listen} by it; give --listen "
            "tcp://0.0.0.0:PORT, too"
        )


def own_address(controller: str, stop: threading.Event) -> str:
    """The address by which this host reaches the controller, waited for while the controller's name
    is not known; empty after `stop`."""
    while not stop.is_set():
        try:
            return address_towards(controller)
        except OSError as e:
            get_logger().info(
                "waits for the controller's name", controller=controller, reason=str(e)
            )
            stop.wait(RETRY_SECONDS)
    return ""


def address_towards(target: str) -> str:
    """Raises OSError where the name in HOST:PORT is not known, or no route goes there."""
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
