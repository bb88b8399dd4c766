"""The control plane over real gRPC: members join with a stream, and are dead when it breaks or is
silent."""

import asyncio
import contextlib
import threading
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.process import CannotStart
from common.settings import ControllerSettings
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services.controller import membership_table, service
from services.controller.__main__ import serve
from services.controller.service import ControlServicer
from tests.loopback import free_port
from tests.system.running import fetch

READY = control_pb2.MEMBER_STATE_READY
STARTING = control_pb2.MEMBER_STATE_STARTING
DEAD = control_pb2.MEMBER_STATE_DEAD
DEADLINE = 20.0

CONTROLLER = control_pb2.Member(id="controller-1", role="controller", state=READY)


def member(member_id: str = "v-1", **fields: Any) -> control_pb2.Member:
    return control_pb2.Member(**{"id": member_id, "role": "vision", "state": READY} | fields)


class Joined:
    """A Join stream that the test uses as a member or a watcher."""

    def __init__(self, stub: Any, key: str = "") -> None:
        self.call = stub.Join(timeout=DEADLINE)
        self._key = key

    async def report(self, reported: control_pb2.Member | None, watch: bool = False) -> None:
        request = control_pb2.JoinRequest(member=reported, watch=watch, key=self._key)
        await self.call.write(request)

    async def read_states(self) -> dict[str, int]:
        """Return the states of all members but the controller in the next response."""
        answer = await self.call.read()
        assert answer is not grpc.aio.EOF, "the stream ended"
        return {m.id: m.state for m in answer.members if m.role != "controller"}

    async def read_until(self, wanted: dict[str, int]) -> None:
        while await self.read_states() != wanted:
            pass

    async def ends(self) -> bool:
        while (answer := await self.call.read()) is not grpc.aio.EOF:
            assert answer.lease_seconds
        return (await self.call.code()) == grpc.StatusCode.OK


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    servicer = ControlServicer(CONTROLLER)
    server = grpc.aio.server()
    control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, server)
    address = f"unix:{tmp_path}/control"
    server.add_insecure_port(address)
    await server.start()
    expiry = asyncio.create_task(servicer.expire_leases())
    yield address
    expiry.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await expiry
    await server.stop(None)


@pytest.fixture
async def stub(address: str) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield control_pb2_grpc.ControlServiceStub(channel)


@pytest.fixture
async def watcher(stub: Any) -> Joined:
    watching = Joined(stub)
    await watching.report(None, watch=True)
    assert await watching.read_states() == {}
    return watching


async def listed(stub: Any) -> list[control_pb2.Member]:
    return list(
        (await stub.ListMembers(control_pb2.ListMembersRequest(), timeout=DEADLINE)).members
    )


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (membership_table, service):
        monkeypatch.setattr(module, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(service, "TICK_SECONDS", 0.05)


async def test_the_controller_lists_itself(stub: Any) -> None:
    assert await listed(stub) == [CONTROLLER]


async def test_a_member_that_joins_is_listed_with_all_its_fields(stub: Any) -> None:
    reported_member = member(
        pid=7,
        address="ipc:///run/v",
        fingerprint="ff",
        in_flight=1,
        queued=2,
        group="g",
        rank=3,
        host="h",
    )
    joined = Joined(stub)
    await joined.report(reported_member)
    assert await joined.read_states() == {}  # it does not watch
    assert await listed(stub) == [CONTROLLER, reported_member]


async def test_a_member_that_joins_learns_the_lease(stub: Any) -> None:
    joined = Joined(stub)
    await joined.report(member())
    assert (await joined.call.read()).lease_seconds == membership_table.LEASE_SECONDS == 3


async def test_changes_that_come_together_make_one_list_which_delays_no_end(
    stub: Any, watcher: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LIST_SECONDS_PER_MEMBER", 10 * DEADLINE)
    members = [Joined(stub) for _ in range(5)]
    for number, joined in enumerate(members):
        await joined.report(member(f"v-{number}"))
        await joined.read_states()
    await watcher.call.done_writing()
    assert await watcher.call.read() is grpc.aio.EOF


def test_a_change_after_a_quiet_time_makes_a_list_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "LIST_SECONDS_PER_MEMBER", 1000.0)
    request = control_pb2.JoinRequest(member=member(), watch=True)
    servicer = ControlServicer(CONTROLLER)
    stream = service.JoinStream(request)
    servicer._handle_report(request)
    servicer._response(stream)
    assert servicer._list_pause(stream) > 0
    stream.listed_at -= 1000.0
    assert servicer._list_pause(stream) == 0


async def test_a_watcher_gets_the_members_at_once_and_after_every_change(
    stub: Any, watcher: Joined
) -> None:
    joined = Joined(stub)
    await joined.report(member(state=STARTING), watch=True)
    assert await joined.read_states() == {"v-1": STARTING}
    assert await watcher.read_states() == {"v-1": STARTING}
    await joined.report(member())
    assert await watcher.read_states() == {"v-1": READY}


async def test_a_watcher_is_not_a_member(stub: Any, watcher: Joined) -> None:
    assert await listed(stub) == [CONTROLLER]
    watcher.call.cancel()
    joined = Joined(stub)
    await joined.report(member())
    await joined.read_states()
    assert [m.id for m in await listed(stub)] == ["controller-1", "v-1"]


async def test_a_change_of_load_is_listed_but_does_not_notify_watchers(
    stub: Any, watcher: Joined
) -> None:
    joined = Joined(stub)
    await joined.report(member())
    assert await watcher.read_states() == {"v-1": READY}
    for in_flight in range(1, 6):
        await joined.report(member(in_flight=in_flight))
    await joined.report(member(in_flight=9, address="tcp://moved:1"))
    # The watcher is notified of the move next: the five reports before it did not notify it.
    answer = await watcher.call.read()
    (moved,) = (m for m in answer.members if m.id == "v-1")
    assert (moved.address, moved.in_flight) == ("tcp://moved:1", 9)


@pytest.mark.parametrize("how", ["cancel", "done_writing"])
async def test_a_member_is_dead_as_soon_as_its_stream_ends(
    stub: Any, watcher: Joined, how: str
) -> None:
    joined = Joined(stub)
    await joined.report(member(in_flight=4))
    await watcher.read_until({"v-1": READY})
    ended = getattr(joined.call, how)()
    if asyncio.iscoroutine(ended):
        await ended
    # This is shorter than the lease.
    async with asyncio.timeout(2.5):
        assert await watcher.read_states() == {"v-1": DEAD}
    (_, dead) = await listed(stub)
    assert (dead.state, dead.in_flight) == (DEAD, 0)


async def test_a_member_is_dead_as_soon_as_its_connection_breaks(
    address: str, watcher: Joined
) -> None:
    channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
    joined = Joined(control_pb2_grpc.ControlServiceStub(channel))
    await joined.report(member())
    await watcher.read_until({"v-1": READY})
    await channel.close()
    async with asyncio.timeout(2.5):
        assert await watcher.read_states() == {"v-1": DEAD}


@pytest.mark.usefixtures("short_lease")
async def test_a_silent_member_is_dead_after_its_lease(stub: Any, watcher: Joined) -> None:
    joined = Joined(stub)
    await joined.report(member())
    await watcher.read_until({"v-1": READY})
    assert await watcher.read_states() == {"v-1": DEAD}


@pytest.mark.usefixtures("short_lease")
@pytest.mark.parametrize("watch", [True, False], ids=["watching", "not watching"])
async def test_a_member_that_reports_after_its_lease_must_join_again(
    stub: Any, watcher: Joined, watch: bool
) -> None:
    joined = Joined(stub)
    await joined.report(member(), watch)
    await watcher.read_until({"v-1": DEAD})
    if not watch:  # a watcher's stream ends by itself
        await joined.report(member())
    assert await joined.ends()
    assert [m.state for m in await listed(stub)] == [READY, DEAD]

    again = Joined(stub)
    await again.report(member())
    assert await watcher.read_states() == {"v-1": READY}


async def test_a_member_whose_stream_broke_unnoticed_joins_again_after_its_lease(
    stub: Any, watcher: Joined
) -> None:
    """The old stream ends after that, which does not end the member."""
    old = Joined(stub)
    await old.report(member(address="tcp://old:1"))
    await watcher.read_until({"v-1": READY})
    await watcher.read_until({"v-1": DEAD})
    new = Joined(stub)
    await new.report(member(address="tcp://new:1"))
    await watcher.read_until({"v-1": READY})
    await old.call.done_writing()
    assert await old.ends()
    await new.report(member(address="tcp://newer:1"))
    answer = await watcher.call.read()
    (found,) = (m for m in answer.members if m.id == "v-1")
    assert (found.address, found.state) == ("tcp://newer:1", READY)


async def test_a_member_that_knows_its_key_joins_again_at_once(stub: Any, watcher: Joined) -> None:
    """A connection breaks, the member joins again, and the controller sees the break only then."""
    old = Joined(stub, key="mine")
    new = Joined(stub, key="mine")
    await old.report(member(address="tcp://old:1"))
    await watcher.read_until({"v-1": READY})
    await new.report(member(address="tcp://new:1"))
    assert await watcher.read_states() == {"v-1": READY}
    assert await old.ends()
    await new.report(member(address="tcp://newer:1"))
    answer = await watcher.call.read()
    (found,) = (m for m in answer.members if m.id == "v-1")
    assert (found.address, found.state) == ("tcp://newer:1", READY)
    await new.call.done_writing()
    await watcher.read_until({"v-1": DEAD})


async def test_an_invalid_report_ends_only_its_own_stream(stub: Any, watcher: Joined) -> None:
    joined = Joined(stub)
    await joined.report(member())
    await watcher.read_until({"v-1": READY})
    await joined.report(member(state=99))
    assert await joined.ends()
    await Joined(stub).report(member("v-2"))
    await watcher.read_until({"v-1": DEAD, "v-2": READY})


async def test_a_stream_without_a_message_leaves_no_trace(stub: Any) -> None:
    joined = Joined(stub)
    await joined.call.done_writing()
    assert await joined.ends()
    assert await listed(stub) == [CONTROLLER]


async def test_a_taken_port_is_an_error_that_names_the_port() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with pytest.raises(CannotStart, match=f"127.0.0.1:{port}.*taken"):
        await serve(ControllerSettings(control_listen=f"127.0.0.1:{port}"), threading.Event())
    await server.stop(None)


async def test_the_controller_process_is_healthy_and_stops_when_asked(tmp_path: Path) -> None:
    stop = threading.Event()
    address = f"unix:{tmp_path}/control"
    port = free_port()
    running = asyncio.create_task(
        serve(ControllerSettings(control_listen=address, health_port=port), stop)
    )
    async with grpc.aio.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = await check(health_pb2.HealthCheckRequest(), timeout=DEADLINE, wait_for_ready=True)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        (myself,) = await listed(control_pb2_grpc.ControlServiceStub(channel))
        assert (myself.role, myself.state) == ("controller", READY) and myself.pid
        for path in ("healthz", "readyz"):
            request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}")
            assert await asyncio.to_thread(fetch, request) == (200, "ok\n")
    stop.set()
    await asyncio.wait_for(running, DEADLINE)
