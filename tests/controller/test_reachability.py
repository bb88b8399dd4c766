"""Where a member is by its connection, and which addresses the others could not reach it by."""

from typing import Any

import pytest

from proto.twinlens.control.v1 import control_pb2
from services.controller.reachability import LOCAL, location_of, unreachable_reason
from tests.loopback import LOOPBACKS

THERE = "10.0.0.7"
ELSEWHERE = "10.0.0.8"


def member(role: str = "vision", address: str = "tcp://10.0.0.7:5555") -> control_pb2.Member:
    return control_pb2.Member(id=f"{role}-1", role=role, address=address)


@pytest.mark.parametrize(
    "peer",
    ["unix:", "unix:/run/control.sock", "ipv4:127.0.0.1:5", "ipv4:127.1.2.3:5", "ipv6:%5B::1%5D:5"],
)
def test_loopback_and_unix_sockets_are_here(peer: str) -> None:
    assert location_of(peer) == LOCAL


@pytest.mark.parametrize(
    ("peer", "place"),
    [
        ("ipv4:203.0.113.9:41234", "203.0.113.9"),
        ("ipv6:%5B2001:db8::9%5D:41234", "2001:db8::9"),
        ("ipv6:[::ffff:203.0.113.9]:41234", "203.0.113.9"),
    ],
)
def test_an_address_that_is_not_ours_is_another_place(peer: str, place: str) -> None:
    assert location_of(peer) == place


@pytest.mark.parametrize("host", LOOPBACKS)
def test_our_own_addresses_are_here_however_they_are_written(host: str) -> None:
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
def test_from_another_host_no_address_of_its_own_only_will_do(address: str) -> None:
    told = unreachable_reason(member(address=address), THERE, [])
    assert address in told and "--listen tcp://0.0.0.0:5555 --advertise HOSTNAME" in told
    assert unreachable_reason(member(address=address), LOCAL, []) == ""


def test_a_real_address_or_none_is_welcome_from_anywhere() -> None:
    assert unreachable_reason(member(), THERE, [(member("preprocess"), LOCAL)]) == ""
    assert (
        unreachable_reason(
            member(address="tcp://vision-host:5555"), THERE, [(member("llm"), ELSEWHERE)]
        )
        == ""
    )
    assert (
        unreachable_reason(member("gateway", ""), THERE, [(member("preprocess"), ELSEWHERE)]) == ""
    )


@pytest.mark.parametrize(
    ("joining", "place", "other", "other_place", "culprit"),
    [
        (member("vision", "ipc:///v"), LOCAL, member("preprocess"), THERE, "vision-1"),
        (member("preprocess"), THERE, member("vision", "tcp://127.0.0.1:5"), LOCAL, "vision-1"),
        (member("gateway", ""), THERE, member("llm", "tcp://127.0.0.1:5"), LOCAL, "llm-1"),
    ],
)
def test_whoever_comes_second_is_told_which_of_the_two_must_be_set(
    joining: Any, place: str, other: Any, other_place: str, culprit: str
) -> None:
    told = unreachable_reason(joining, place, [(other, other_place)])
    assert told.startswith(f"{culprit} advertises") and f"start the {culprit[:-2]}" in told


def test_those_of_one_host_or_that_never_talk_may_have_any_address() -> None:
    assert (
        unreachable_reason(
            member("vision", "ipc:///v"), LOCAL, [(member("preprocess", "ipc:///p"), LOCAL)]
        )
        == ""
    )
    assert (
        unreachable_reason(member("vision", "ipc:///v"), LOCAL, [(member("detokenizer"), THERE)])
        == ""
    )
