"""The loopback addresses of this machine, which may have no IPv6."""

from common.address import bound_socket


def is_there(host: str) -> bool:
    try:
        bound_socket(host, 0).close()
    except OSError:
        return False
    return True


def free_port(host: str = "127.0.0.1") -> int:
    with bound_socket(host, 0) as probe:
        return probe.getsockname()[1]


LOOPBACKS = [host for host in ("127.0.0.1", "::1") if is_there(host)]
