"""The location of a member, and whether its peers can reach its address from theirs."""

from typing import Any

import pytest

from proto.twinlens.control.v1 import control_pb2
from services.controller.reachability import LOCAL, location_of, unreachable_reason
from tests.loopback import LOOPBACKS

HOST_A = "10.0.0.7"
HOST_B = "10.0.0.8"


def member(role: str = "vision", address: str = "tcp://10.0.0.7:5555") -> control_pb2.Member:
    return control_pb2.Member(id=f"{role}-1", role=role, address=address)


@pytest.mark.parametrize(
    "peer",
    ["unix:", "unix:/run/control.sock", "ipv4:127.0.0.1:5", "ipv4:127.1.2.3:5", "ipv6:%5B::1%5D:5"],
)
def test_loopback_and_unix_sockets_are_local(peer: str) -> None:
    assert location_of(peer) == LOCAL


@pytest.mark.parametrize(
    ("peer", "location"),
    [
        ("ipv4:203.0.113.9:41234", "203.0.113.9"),
        ("ipv6:%5B2001:db8::9%5D:41234", "2001:db8::9"),
        ("ipv6:[::ffff:203.0.113.9]:41234", "203.0.113.9"),
    ],
)
def test_an_address_of_another_host_is_the_location(peer: str, location: str) -> None:
    assert location_of(peer) == location


@pytest.mark.parametrize("host", LOOPBACKS)
def test_an_own_address_is_local_in_either_notation(host: str) -> None:
    assert location_of(f"ipv6:[{host}]:1" if ":" in host else f"ipv6:[::ffff:{host}]:1") == LOCAL


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:5555",
        "tcp://0.0.0.0:5555",
        "tcp://localhost:5555",
        "tcp://[::1]:5555",
        "tcp://[::]:5555",
        "ipc:///run/v.sock",
    ],
)
def test_a_member_on_another_host_must_not_advertise_a_local_address(address: str) -> None:
    reason = unreachable_reason(member(address=address), HOST_A, [])
    assert address in reason and "--listen tcp://0.0.0.0:5555 --advertise HOSTNAME" in reason
    assert unreachable_reason(member(address=address), LOCAL, []) == ""


def test_a_member_with_a_reachable_address_or_none_may_join_from_anywhere() -> None:
    assert unreachable_reason(member(), HOST_A, [(member("preprocess"), LOCAL)]) == ""
    assert (
        unreachable_reason(
            member(address="tcp://vision-host:5555"), HOST_A, [(member("llm"), HOST_B)]
        )
        == ""
    )
    assert unreachable_reason(member("gateway", ""), HOST_A, [(member("preprocess"), HOST_B)]) == ""


@pytest.mark.parametrize(
    ("joining", "location", "other", "other_location", "culprit"),
    [
        (member("vision", "ipc:///v"), LOCAL, member("preprocess"), HOST_A, "vision-1"),
        (member("preprocess"), HOST_A, member("vision", "tcp://127.0.0.1:5"), LOCAL, "vision-1"),
        (member("gateway", ""), HOST_A, member("llm", "tcp://127.0.0.1:5"), LOCAL, "llm-1"),
    ],
)
def test_the_second_of_two_unreachable_members_learns_which_address_is_wrong(
    joining: Any, location: str, other: Any, other_location: str, culprit: str
) -> None:
    reason = unreachable_reason(joining, location, [(other, other_location)])
    assert reason.startswith(f"{culprit} advertises") and f"start the {culprit[:-2]}" in reason


def test_members_that_share_a_host_or_never_talk_may_have_any_address() -> None:
    assert (
        unreachable_reason(
            member("vision", "ipc:///v"), LOCAL, [(member("preprocess", "ipc:///p"), LOCAL)]
        )
        == ""
    )
    assert (
        unreachable_reason(member("vision", "ipc:///v"), LOCAL, [(member("detokenizer"), HOST_A)])
        == ""
    )
