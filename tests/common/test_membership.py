"""A member stays registered whatever its controller sends, and nobody else can be it."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from common.membership import (
    DRAINING,
    MAX_DELAY_SECONDS,
    MAX_DETAIL_CHARS,
    READY,
    STARTING,
    Membership,
    reportable_delay,
)
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services.controller.__main__ import describe_controller, start_server
from services.controller.places import Places
from services.controller.report_checks import objection_to
from services.controller.service import ControlServicer

DEADLINE = 20.0


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    address = f"unix:{tmp_path}/control"
    server = await start_server(ControlServicer(describe_controller("")), address)
    yield address
    await server.stop(None)


def vision(member_id: str = "vision-1") -> control_pb2.Member:
    return control_pb2.Member(id=member_id, role="vision", state=STARTING)


async def test_an_error_while_members_are_handled_does_not_end_the_reports(address: str) -> None:
    """A member that reports no more is dead for all others, though it works."""
    lists: list[int] = []
    handled = threading.Event()

    def fail_once(members: list[control_pb2.Member]) -> None:
        lists.append(len(members))
        if len(lists) == 1:
            raise LookupError("a bug")
        handled.set()

    membership = Membership(address, vision(), lambda: (0, 0), on_members=fail_once)
    assert await asyncio.to_thread(handled.wait, DEADLINE)
    membership.leave()


async def test_nobody_else_joins_under_the_id_of_a_member(address: str) -> None:
    joined = threading.Event()
    membership = Membership(
        address, vision(), lambda: (0, 0), on_members=lambda members: joined.set()
    )
    assert await asyncio.to_thread(joined.wait, DEADLINE)
    async with grpc.aio.insecure_channel(address) as channel:
        for key in ("", "guessed"):
            call = control_pb2_grpc.ControlServiceStub(channel).Join(timeout=DEADLINE)
            await call.write(control_pb2.JoinRequest(member=vision(), key=key))
            assert await call.code() == grpc.StatusCode.ALREADY_EXISTS
    membership.leave()


async def test_a_member_has_a_key_of_its_own_and_keeps_it(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it, a member whose connection broke takes its place again at once."""
    keys: list[tuple[str, str]] = []
    check = Places.check_member

    def note(self: Places, member: control_pb2.Member, key: str, location: str) -> None:
        keys.append((member.id, key))
        check(self, member, key, location)

    monkeypatch.setattr(Places, "check_member", note)
    rejoined = threading.Event()

    def fail_once(members: list[control_pb2.Member]) -> None:
        if len([id for id, _ in keys if id == "vision-1"]) == 1:
            raise LookupError("the stream breaks")
        rejoined.set()

    first = Membership(address, vision(), lambda: (0, 0), on_members=fail_once)
    assert await asyncio.to_thread(rejoined.wait, DEADLINE)
    joined = threading.Event()
    second = Membership(
        address, vision("vision-2"), lambda: (0, 0), on_members=lambda members: joined.set()
    )
    assert await asyncio.to_thread(joined.wait, DEADLINE)
    first.leave()
    second.leave()
    own = {id: {key for other, key in keys if other == id} for id in ("vision-1", "vision-2")}
    assert [len(found) for found in own.values()] == [1, 1]
    assert own["vision-1"] != own["vision-2"] and "" not in own["vision-1"]


def test_whatever_a_member_says_of_itself_is_acceptable() -> None:
    """The controller refuses a malformed report for good, which ends the member."""
    membership = Membership("unix:/nowhere", member := vision(), lambda: (0, 0))
    membership.set_state(READY, "a\nb\x1b[2J\N{GRINNING FACE}" * 1000)
    membership.leave()
    assert objection_to(control_pb2.JoinRequest(member=member)) == ""
    assert len(member.detail) < MAX_DETAIL_CHARS + 50


@pytest.mark.parametrize(
    ("computed", "reported"),
    [
        (1.5, 1.5),
        (-1.0, 0.0),
        (float("nan"), 0.0),
        (float("inf"), MAX_DELAY_SECONDS),
        (float("-inf"), 0.0),
    ],
)
def test_any_computed_delay_can_be_reported(computed: float, reported: float) -> None:
    assert reportable_delay(computed) == reported


def test_only_a_ready_member_reports_credits() -> None:
    membership = Membership("unix:/nowhere", member := vision(), lambda: (0, 0), credits=lambda: 3)
    member.state = READY
    assert next(membership._reports()).member.credits == 3
    membership.set_state(DRAINING)
    assert next(membership._reports()).member.credits == 0
    membership.leave()
