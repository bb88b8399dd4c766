"""Where members are as the network shows it, and whether they can reach each other's inboxes
there."""

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import unquote

from common.address import is_local_only
from common.messages import HOPS
from proto.twinlens.control.v1 import control_pb2

HERE = ""
"""The controller's own host, or rather its network namespace: two containers of one machine are two
places."""


def place_of(peer: str) -> str:
    """The peer of a gRPC call as its place: HERE, or the IP address that it comes from."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return HERE
    address = ipaddress.ip_address(rest.rpartition(":")[0].strip("[]").partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return HERE if is_ours(address) else str(address)


def is_ours(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Only an address of this network namespace can be bound to."""
    if address.is_loopback:
        return True
    with socket.socket(
        socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_DGRAM
    ) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True


def objection_to(
    member: control_pb2.Member, place: str, others: Iterable[tuple[control_pb2.Member, str]]
) -> str:
    """Why a member must not join from this place; empty where nothing is wrong. `others` are the
    members that live, with theirs."""
    if place != HERE and is_local_only(member.address):
        return unreachable(member, f"from the controller's host ({place} asks to join)")
    for other, other_place in others:
        if place != other_place and (other.role, member.role) in HOPS:
            if is_local_only(member.address):
                return unreachable(
                    member, f"from {other_place or 'its controller'}, where {other.id} is"
                )
            if is_local_only(other.address):
                return unreachable(other, f"from {place or 'its controller'}, where {member.id} is")
    return ""


def unreachable(member: control_pb2.Member, whence: str) -> str:
    return (
        f"{member.id} advertises {member.address}, which cannot be reached {whence}: start the "
        f"{member.role} with an address that all "
        "hosts reach, as by --listen tcp://0.0.0.0:5555 --advertise HOSTNAME (TWINLENS_LISTEN, "
        "TWINLENS_ADVERTISE)"
    )
