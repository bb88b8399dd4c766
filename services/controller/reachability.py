"""Where members run, as the network shows it, and whether they can reach each other's inboxes."""

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import unquote

from common.address import is_local_only
from common.messages import HOPS
from proto.twinlens.control.v1 import control_pb2

LOCAL = ""
"""The location of the controller: its network namespace. Each container has a namespace of its own,
so two containers on one machine have different locations."""


def location_of(peer: str) -> str:
    """Return where a gRPC peer runs: LOCAL, or the IP address that it calls from.

    `peer` has the form of `ServicerContext.peer()`, such as `ipv4:10.0.0.7:41234`.
    """
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return LOCAL
    address = ipaddress.ip_address(rest.rpartition(":")[0].strip("[]").partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return LOCAL if is_own_address(address) else str(address)


def is_own_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether the address belongs to this network namespace: only then it can be bound."""
    if address.is_loopback:
        return True
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True


def unreachable_reason(
    member: control_pb2.Member, location: str, others: Iterable[tuple[control_pb2.Member, str]]
) -> str:
    """Return why a member must not join: it and a peer could not reach each other.

    The result is empty if nothing is wrong. `others` are the live members with their locations.
    """
    if location != LOCAL and is_local_only(member.address):
        return describe_unreachable(
            member, f"from the controller's host (the member joins from {location})"
        )
    for other, other_location in others:
        if location == other_location or (other.role, member.role) not in HOPS:
            continue
        if is_local_only(member.address):
            host = other_location or "the controller's host"
            return describe_unreachable(member, f"from {host}, where {other.id} runs")
        if is_local_only(other.address):
            host = location or "the controller's host"
            return describe_unreachable(other, f"from {host}, where {member.id} runs")
    return ""


def describe_unreachable(member: control_pb2.Member, from_where: str) -> str:
    return (
        f"{member.id} advertises {member.address}, which cannot be reached {from_where}: start the "
        f"{member.role} with an address that all hosts can reach, for example --listen "
        "tcp://0.0.0.0:5555 --advertise HOSTNAME (TWINLENS_LISTEN, TWINLENS_ADVERTISE)"
    )
