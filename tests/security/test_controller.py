"""One member, or one who claims to be one, does no harm to the others at the controller."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.settings import ControllerSettings
from proto.twinlens.control.v1 import control_pb2
from services.controller import __main__ as controller_main
from services.controller import service
from services.controller.report_checks import MAX_DETAIL_CHARS
from tests.controller.test_service import (  # fixtures
    DEADLINE,
    READY,
    Joined,
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
        {"member_id": "x" * 201},
        {"member_id": "a\nb"},
        {"address": "tcp://" + "x" * 201},
        {"host": "x" * 201},
        {"group": "\x00"},
        {"fingerprint": "x" * 201},
        {"role": "controller"},
        {"role": "nothing"},
        {"state": 99},
        {"rank": 2**31},
        {"expected_delay": float("nan")},
        {"expected_delay": float("inf")},
        {"expected_delay": -1.0},
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
    monkeypatch.setattr(service, "MAX_MEMBERS", 1)
    monkeypatch.setattr(service, "MAX_WATCHERS", 1)
    first = Joined(stub)
    await first.report(member(), watch=True)
    await first.read_until({"v-1": READY})
    for reported, watch in ((member("v-2"), False), (None, True)):
        further = Joined(stub)
        await further.report(reported, watch)
        assert await further.call.code() == Code.RESOURCE_EXHAUSTED


async def test_a_stream_that_says_nothing_is_ended(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "FIRST_REPORT_SECONDS", 0.01)
    assert await stub.Join(timeout=DEADLINE).code() == Code.DEADLINE_EXCEEDED


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
