"""The membership table and its leases, with a clock that the test sets."""

from typing import Any

import pytest

from proto.twinlens.control.v1 import control_pb2
from services.controller.membership_table import (
    DEAD,
    LEASE_SECONDS,
    REMEMBER_DEAD_SECONDS,
    MembershipTable,
)

STARTING = control_pb2.MEMBER_STATE_STARTING
READY = control_pb2.MEMBER_STATE_READY


def member(member_id: str = "v-1", role: str = "vision", **fields: Any) -> control_pb2.Member:
    return control_pb2.Member(**{"id": member_id, "role": role, "state": READY} | fields)


def states(table: MembershipTable) -> dict[str, int]:
    return {m.id: m.state for m in table.members()}


def test_a_new_member_notifies_watchers_and_a_change_of_its_load_does_not() -> None:
    table = MembershipTable()
    assert table.report(member(), 0)
    assert not table.report(member(in_flight=3, queued=7, expected_delay=0.5, credits=2), 1)
    (found,) = table.members()
    assert (found.in_flight, found.queued, found.expected_delay) == (3, 7, 0.5)
    assert found.credits == 2


@pytest.mark.parametrize(
    "change",
    [
        {"state": control_pb2.MEMBER_STATE_DRAINING},
        {"address": "tcp://127.0.0.1:1"},
        {"fingerprint": "ff"},
        {"detail": "loading weights, 40%"},
        {"max_model_len": 8},
        {"rank": 1},
        {"group": "llm-1"},
        {"hung": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_other_change_notifies_watchers_once(change: dict[str, Any]) -> None:
    table = MembershipTable()
    table.report(member(), 0)
    assert table.report(member(**change), 1)
    assert not table.report(member(**change), 2)


def test_a_report_renews_the_lease() -> None:
    table = MembershipTable()
    for now in range(10):
        table.report(member(), now)
        assert table.expire(now + LEASE_SECONDS) == []
    assert table.is_alive("v-1")


def test_a_silent_member_is_dead_after_the_lease_and_has_no_load() -> None:
    table = MembershipTable()
    table.report(member(in_flight=2, queued=3), 10)
    assert table.expire(10 + LEASE_SECONDS) == []
    assert table.expire(10 + LEASE_SECONDS + 0.01) == ["v-1"]
    assert not table.is_alive("v-1")
    (found,) = table.members()
    assert (found.state, found.in_flight, found.queued) == (DEAD, 0, 0)


def test_only_the_silent_member_dies() -> None:
    table = MembershipTable()
    table.report(member("v-1"), 0)
    table.report(member("v-2"), LEASE_SECONDS)
    assert table.expire(LEASE_SECONDS + 1) == ["v-1"]
    assert states(table) == {"v-1": DEAD, "v-2": READY}


def test_an_expired_lease_is_reported_once() -> None:
    table = MembershipTable()
    table.report(member(), 0)
    assert table.expire(LEASE_SECONDS + 1) == ["v-1"]
    assert table.expire(LEASE_SECONDS + 2) == []
    assert not table.mark_dead("v-1", LEASE_SECONDS + 2)


def test_marking_a_member_as_dead_is_reported_once() -> None:
    table = MembershipTable()
    table.report(member(), 0)
    assert table.mark_dead("v-1", 1)
    assert not table.mark_dead("v-1", 1)
    assert not table.mark_dead("nobody", 1)
    assert states(table) == {"v-1": DEAD}


@pytest.mark.parametrize("by_lease", [True, False], ids=["lease", "stream"])
def test_a_dead_member_stays_in_the_table_for_a_minute(by_lease: bool) -> None:
    table = MembershipTable()
    table.report(member(), 0)
    died = LEASE_SECONDS + 1
    assert table.expire(died) == ["v-1"] if by_lease else table.mark_dead("v-1", died)
    table.expire(died + REMEMBER_DEAD_SECONDS)
    assert states(table) == {"v-1": DEAD}
    table.expire(died + REMEMBER_DEAD_SECONDS + 0.01)
    assert states(table) == {}
    assert REMEMBER_DEAD_SECONDS == 60


def test_a_member_that_joins_again_is_alive_and_notifies_watchers() -> None:
    table = MembershipTable()
    table.report(member(), 0)
    table.mark_dead("v-1", 1)
    assert table.report(member(state=STARTING), 2)
    assert states(table) == {"v-1": STARTING}
    table.expire(2 + LEASE_SECONDS)
    assert table.is_alive("v-1")


def test_members_are_sorted_by_role_and_id() -> None:
    table = MembershipTable()
    for name, role in (("b", "vision"), ("a", "vision"), ("c", "llm")):
        table.report(member(name, role), 0)
    assert [m.id for m in table.members()] == ["c", "a", "b"]
