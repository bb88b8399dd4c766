"""One member, or one who claims to be one, does no harm to the others at the controller."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.membership import CHANNEL_OPTIONS, MAX_LIST_BYTES
from common.settings import ControllerSettings
from proto.twinlens.control.v1 import control_pb2
from services.controller import __main__ as controller_main
from services.controller import places, service
from services.controller.membership_table import MembershipTable
from services.controller.places import MAX_MEMBERS, Places, Refused
from services.controller.report_checks import MAX_DETAIL_CHARS, MAX_MEMBER_BYTES, objection_to
from tests.controller.test_service import (  # fixtures
    DEADLINE,
    READY,
    Joined,
    listed,
    member,
)
from tests.controller.test_service import address as address
from tests.controller.test_service import stub as stub
from tests.controller.test_service import watcher as watcher

Code = grpc.StatusCode


@pytest.mark.parametrize(
    "fields",
    [
        {"detail": "x" * (MAX_DETAIL_CHARS + 1)},
        {"detail": "\x1b[2J"},
        {"member_id": ""},
        {"member_id": "x" * 257},
        {"member_id": "a\nb"},
        {"address": "tcp://" + "x" * 257 + ":1"},
        {"host": "x" * 257},
        {"group": "\x00"},
        {"fingerprint": "x" * 257},
        {"role": "controller"},
        {"role": "nothing"},
        {"state": 99},
        {"rank": 2**31},
        {"expected_delay": float("nan")},
        {"expected_delay": float("inf")},
        {"expected_delay": -1.0},
        {"credits": 2**31},
        {"state": control_pb2.MEMBER_STATE_DEAD},
        {"pid": 2**31},
        {"max_model_len": 2**31},
        {"address": "inproc://x"},
        {"address": "tcp://host\n:1"},
    ],
    ids=str,
)
async def test_a_malformed_report_is_refused_and_reaches_nobody(
    stub: Any, watcher: Joined, fields: dict[str, Any]
) -> None:
    bad = Joined(stub)
    await bad.report(member(**fields))
    assert await bad.call.code() == Code.INVALID_ARGUMENT
    joined = Joined(stub)
    await joined.report(member("v-2"))
    assert await watcher.read_states() == {"v-2": READY}
    await joined.report(member(**{"member_id": "v-2"} | fields))
    assert await joined.ends()


@pytest.mark.parametrize(
    "managed",
    [
        control_pb2.Managed(replicas={"vision": 2**31}),
        control_pb2.Managed(replicas={"x" * 1000: 1}),
        control_pb2.Managed(autoscaled={"gateway": "1:2"}),
        control_pb2.Managed(autoscaled={"vision": "x" * 1000}),
    ],
    ids=str,
)
async def test_a_launcher_that_manages_nonsense_is_refused(
    stub: Any, managed: control_pb2.Managed
) -> None:
    call = stub.Join(timeout=DEADLINE)
    await call.write(control_pb2.JoinRequest(managed=managed))
    assert await call.code() == Code.INVALID_ARGUMENT


async def test_nobody_takes_the_place_of_a_living_member(stub: Any, watcher: Joined) -> None:
    victim = Joined(stub)
    await victim.report(member(address="tcp://victim:1"))
    await watcher.read_until({"v-1": READY})
    thief = Joined(stub)
    await thief.report(member(address="tcp://thief:1"))
    assert await thief.call.code() == Code.ALREADY_EXISTS
    listed = await stub.ListMembers(control_pb2.ListMembersRequest(), timeout=DEADLINE)
    assert [m.address for m in listed.members if m.id == "v-1"] == ["tcp://victim:1"]


async def test_a_stream_speaks_for_one_member_only(stub: Any, watcher: Joined) -> None:
    victim = Joined(stub)
    await victim.report(member())
    await watcher.read_until({"v-1": READY})
    other = Joined(stub)
    await other.report(member("v-2"))
    await watcher.read_until({"v-1": READY, "v-2": READY})
    await other.report(member("v-1", address="tcp://thief:1"))
    assert await other.ends()
    listed = await stub.ListMembers(control_pb2.ListMembersRequest(), timeout=DEADLINE)
    assert [m.address for m in listed.members if m.id == "v-1"] == [""]


async def test_nobody_takes_the_place_of_the_controller_or_the_launcher(stub: Any) -> None:
    controller = Joined(stub)
    await controller.report(member("controller-1"))
    assert await controller.call.code() == Code.ALREADY_EXISTS
    calls = [stub.Join(timeout=DEADLINE) for _ in range(2)]
    for call in calls:
        await call.write(
            control_pb2.JoinRequest(managed=control_pb2.Managed(replicas={"vision": 1}))
        )
        if call is calls[0]:
            await call.read()
    assert await calls[1].code() == Code.ALREADY_EXISTS
    assert not calls[0].done()


async def test_the_numbers_of_members_and_watchers_are_bounded(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "MAX_MEMBERS", 1)
    monkeypatch.setattr(places, "MAX_WATCHERS", 1)
    first = Joined(stub)
    await first.report(member(), watch=True)
    await first.read_until({"v-1": READY})
    for reported, watch in ((member("v-2"), False), (None, True)):
        further = Joined(stub)
        await further.report(reported, watch)
        assert await further.call.code() == Code.RESOURCE_EXHAUSTED


def room(*members: tuple[str, str]) -> tuple[MembershipTable, Places]:
    """Return a table in which these (id, location) have joined."""
    table = MembershipTable()
    found = Places(table, "controller-1", "")
    for member_id, location in members:
        found.check_member(member(member_id), "", location)
        table.report(member(member_id), 0.0)
    return table, found


def test_the_members_and_watchers_of_one_address_leave_room_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places, "MAX_MEMBERS", 4)
    monkeypatch.setattr(places, "MAX_WATCHERS", 4)
    _, found = room(("v-1", "10.0.0.1"), ("v-2", "10.0.0.1"))
    with pytest.raises(Refused, match="2 members from this address"):
        found.check_member(member("v-3"), "", "10.0.0.1")
    found.check_member(member("v-4"), "", "10.0.0.2")
    with pytest.raises(Refused, match="2 watchers"):
        found.check_watcher("10.0.0.1", ["10.0.0.1"] * 2)
    found.check_watcher("10.0.0.2", ["10.0.0.1"] * 2)


def test_members_that_died_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MAX_MEMBERS", 2)
    table, found = room(("v-1", ""), ("v-2", "10.0.0.1"))
    table.mark_dead("v-1", 1.0)
    found.check_member(member("v-3"), "", "")
    assert table.get("v-1") is None


async def test_the_list_of_as_many_members_as_may_join_reaches_a_watcher() -> None:
    """Two members with 3 MB of detail once made the list larger than watchers accept."""
    largest = MAX_MEMBERS * (MAX_MEMBER_BYTES + 16)
    assert largest < MAX_LIST_BYTES
    assert dict(CHANNEL_OPTIONS)["grpc.max_receive_message_length"] == MAX_LIST_BYTES
    wide = "\N{GRINNING FACE}"
    full = member(detail=wide * MAX_DETAIL_CHARS, host=wide * 200)
    assert "bytes" in objection_to(control_pb2.JoinRequest(member=full))


async def test_a_stream_that_says_nothing_is_ended(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "FIRST_REPORT_SECONDS", 0.01)
    assert await stub.Join(timeout=DEADLINE).code() == Code.DEADLINE_EXCEEDED


async def test_streams_that_say_nothing_keep_no_place_from_those_that_report(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "FIRST_REPORT_SECONDS", 10 * DEADLINE)
    monkeypatch.setattr(service, "MAX_SILENT_STREAMS", 2)
    silent = [stub.Join(timeout=DEADLINE) for _ in range(3)]
    ended = [asyncio.create_task(call.code()) for call in silent]
    done, _ = await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
    assert [task.result() for task in done] == [Code.DEADLINE_EXCEEDED]
    joined = Joined(stub)
    await joined.report(member())
    assert await joined.read_states() == {}
    assert sum(task.done() for task in ended) == 2
    for task in ended:
        task.cancel()


async def test_a_member_that_reports_all_the_time_is_read_slowly(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each change costs a list for each watcher."""
    monkeypatch.setattr(service, "REPORT_SECONDS", 10 * DEADLINE)
    busy = Joined(stub)
    await busy.report(member())
    for n in range(5):
        await busy.report(member(detail=f"change {n}"))
    for n in range(5):
        other = Joined(stub)
        await other.report(member(f"v-{n + 2}"))
        await other.read_states()
    assert next(m.detail for m in await listed(stub) if m.id == "v-1") == "change 0"


async def test_a_member_is_no_launcher(stub: Any) -> None:
    call = stub.Join(timeout=DEADLINE)
    managed = control_pb2.Managed(replicas={"vision": 1})
    await call.write(control_pb2.JoinRequest(member=member(), managed=managed))
    assert await call.code() == Code.INVALID_ARGUMENT


@pytest.mark.parametrize("key", ["", "wrong", "right"])
def test_only_who_knows_the_key_is_the_launcher(key: str) -> None:
    found = Places(MembershipTable(), "controller-1", "right")
    if key == "right":
        for has_launcher in (False, True):  # it may come back before its break is seen
            found.check_launcher(key, has_launcher)
    else:
        with pytest.raises(Refused, match="only the launcher that started"):
            found.check_launcher(key, has_launcher=False)


def test_nobody_takes_the_id_of_a_member_that_was_frozen() -> None:
    table = MembershipTable()
    found = Places(table, "controller-1", "")
    found.check_member(member(), "its own", "")
    table.report(member(), 0.0)
    table.mark_dead("v-1", 1.0)
    with pytest.raises(Refused, match="there is a member v-1"):
        found.check_member(member(), "a guess", "")
    found.check_member(member(), "its own", "")


async def test_a_watcher_that_does_not_read_costs_no_memory(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the latest list waits for it, however many changes there were."""
    monkeypatch.setattr(service, "REPORT_SECONDS", 0.0)
    made: list[int] = []
    original = service.ControlServicer._response

    def count(self: Any, stream: Any) -> Any:
        response = original(self, stream)
        made.append(response.ByteSize() if stream.is_watching else 0)
        return response

    monkeypatch.setattr(service.ControlServicer, "_response", count)
    others = [Joined(stub) for _ in range(40)]
    for n, other in enumerate(others):
        await other.report(member(f"v-{n}", detail="\N{GRINNING FACE}" * 450))
        await other.call.read()
    deaf = Joined(stub)
    await deaf.report(None, watch=True)  # and never reads
    for n in range(500):
        await others[0].report(member("v-0", detail=f"change {n}"))
    while "change 499" not in [m.detail for m in await listed(stub)]:
        pass
    assert sum(made) < 20 * 2**20  # all lists together have 37 MB
    deaf.call.cancel()


async def test_a_controller_that_cannot_expire_leases_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would otherwise answer, and no death would be noticed. The launcher starts another."""

    async def fail(_: Any) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(service.ControlServicer, "expire_leases", fail)
    settings = ControllerSettings(control_listen=f"unix:{tmp_path}/control")
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(LookupError):
            await controller_main.serve(settings, controller_main.threading.Event())


@pytest.mark.parametrize("method", ["Drain", "Scale"])
async def test_a_long_name_is_cut_in_the_answer(stub: Any, method: str) -> None:
    name = "x" * 5000
    requests = {
        "Drain": control_pb2.DrainRequest(member_id=name),
        "Scale": control_pb2.ScaleRequest(role=name, replicas=1),
    }
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(stub, method)(requests[method], timeout=DEADLINE)
    assert len(caught.value.details() or "") < 600
