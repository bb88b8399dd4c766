"""The controller's service as a target. Its streams and calls have no sockets."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from common.events import Event
from common.membership import DEAD, READY
from common.settings import SERVICES
from proto.twinlens.control.v1 import control_pb2
from services.controller.__main__ import MAX_MESSAGE_BYTES
from services.controller.membership_table import REMEMBER_DEAD_SECONDS
from services.controller.places import MAX_MEMBERS
from services.controller.service import REPORT_SECONDS, ControlServicer
from tests.fuzz.actions import Action, Call, Wait, Work
from tests.fuzz.clock import CLOCK
from tests.fuzz.making import FLOATS, INTS, STRINGS, Maker
from tests.fuzz.targets import Target

CONTROLLER = control_pb2.Member(id="controller-1", role="controller", state=READY)
SLOTS = tuple(f"stream {n}" for n in range(8))
IDS = ("m-1", "m-2", "m-3", "m-4", "controller-1", "")
INNOCENT = "innocent"


class Refused(Exception):
    """What a call ends with if the controller refuses it."""


class Context:
    """The server's side of one call."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5"

    async def abort(self, code: grpc.StatusCode, reason: str) -> None:
        assert len(reason) < 1000, f"a reason of {len(reason)} characters"
        raise Refused(f"{code.name}: {reason}")


class ControllerTarget(Target):
    role = "controller"
    peers = ()

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()
        self._servicer = ControlServicer(CONTROLLER)
        self._expiry = self._loop.create_task(self._servicer.expire_leases())
        self._reports: dict[str, asyncio.Queue[bytes]] = {}
        """What each open stream sends; an empty report ends it."""
        self._calls: set[asyncio.Task[None]] = set()
        self._answers: list[str] = []

    def play(self, events: list[Event[Any]]) -> None:
        self._loop.run_until_complete(turns())
        for call in [call for call in self._calls if call.done()]:
            self._calls.remove(call)
            call.result()  # raises whatever ended the call, except a refusal
        assert not self._expiry.done(), "leases expire no more"

    def close(self) -> None:
        for task in (self._expiry, *self._calls):
            task.cancel()
        self._loop.run_until_complete(turns())
        self._loop.close()

    def settle(self, leaves: bool) -> None:
        """End every stream, or let every lease end; then let the dead be forgotten."""
        for slot in list(self._reports) if leaves else []:
            self.report(slot, b"")
        self.play([])
        for _ in range(3):
            CLOCK.ahead += REMEMBER_DEAD_SECONDS + 1
            self.play([])

    # What members and operators do

    def join(self, slot: str, first: bytes) -> None:
        self.report(slot, b"")
        self._reports[slot] = asyncio.Queue()
        self.report(slot, first)
        self._begin(self._join(self._reports[slot]))

    def report(self, slot: str, report: bytes) -> None:
        if reports := self._reports.get(slot):
            reports.put_nowait(report)
        if not report:
            self._reports.pop(slot, None)

    def call(self, name: str, request: Any) -> None:
        self._begin(self._call(name, request))

    def _begin(self, call: Any) -> None:
        self._calls.add(self._loop.create_task(call))

    async def _join(self, reports: asyncio.Queue[bytes]) -> None:
        requests = decoded(reports)
        context: Any = Context()
        try:
            async for response in self._servicer.Join(requests, context):
                response.SerializeToString()
                assert response.ByteSize() < MAX_MEMBERS * MAX_MESSAGE_BYTES // 16
        except Refused as e:
            self._answers.append(str(e))

    async def _call(self, name: str, request: Any) -> None:
        try:
            response = await getattr(self._servicer, name)(request, Context())
        except Refused as e:
            self._answers.append(str(e))
        else:
            members = [(m.id, m.state) for m in getattr(response, "members", ())]
            self._answers += [f"{name} {id} {state}" for id, state in members if INNOCENT in id]

    # The target

    def compose(self, maker: Maker, size: int) -> list[Action]:
        draw = maker.draw
        found: list[Action] = []
        for _ in range(size):
            slot = draw.choice(SLOTS)
            match draw.randrange(20):
                case 0 | 1 | 2:
                    found.append(Call("join", (slot, report_of(maker)), "JoinRequest"))
                case 3:
                    found.append(Call("report", (slot, b"")))
                case 4:
                    found.append(Wait(draw.choice([0.1, 1.1, 2.5, 100.0])))
                case 5:
                    request = control_pb2.DrainRequest(member_id=draw.choice(IDS))
                    found.append(Call("call", ("Drain", request), "DrainRequest"))
                case 6:
                    role = draw.choice([*SERVICES, "", "x" * 5000])
                    request = control_pb2.ScaleRequest(role=role, replicas=draw.choice([0, 1, 70]))
                    found.append(Call("call", ("Scale", request), "ScaleRequest"))
                case 7:
                    request = control_pb2.ListMembersRequest()
                    found.append(Call("call", ("ListMembers", request), "ListMembersRequest"))
                case 8 | 9 | 10:
                    found.append(Work())
                case _:
                    found.append(Call("report", (slot, report_of(maker)), "JoinRequest"))
        return found

    def question(self, number: int) -> Sequence[Action]:
        member = control_pb2.Member(id=f"{INNOCENT}-{number}", role="vision", state=READY)
        report = control_pb2.JoinRequest(member=member).SerializeToString()
        return [
            Call("join", (INNOCENT, report)),
            Work(),
            Call("call", ("ListMembers", control_pb2.ListMembersRequest())),
            Work(),
            Call("report", (INNOCENT, b"")),
            Work(),
            Call("call", ("ListMembers", control_pb2.ListMembersRequest())),
        ]

    def ask(self, number: int) -> Any:
        self._answers.clear()
        self.perform(self.question(number))
        return [answer.replace(f"-{number}", "") for answer in self._answers]

    def answer(self, number: int, sent: list[tuple[str, Any]]) -> Any:
        raise NotImplementedError("the answers are kept by this class")

    def converse(self, maker: Maker) -> Sequence[Action]:
        raise NotImplementedError("`compose` makes all actions")

    def held(self) -> dict[str, float]:
        servicer = self._servicer
        return {
            "members": len(servicer._table.members()),
            "watchers": len(servicer._watchers),
            "streams": len(servicer._streams),
            "silent streams": len(servicer._silent),
            "locations": len(servicer._places._locations) + len(servicer._places._keys),
            "drains": len(servicer._drains.drained) + len(servicer._drains._requests),
            "launcher": float(servicer._launcher is not None),
            "calls": len(self._calls),
            "tasks": len(asyncio.all_tasks(self._loop)) - 1,
        }


async def turns() -> None:
    """Let everything happen that is due, and one more report of each stream."""
    for _ in range(8):
        await asyncio.sleep(0)
        CLOCK.ahead += REPORT_SECONDS / 4


async def decoded(reports: asyncio.Queue[bytes]) -> AsyncIterator[control_pb2.JoinRequest]:
    while report := await reports.get():
        yield control_pb2.JoinRequest.FromString(report)


def report_of(maker: Maker) -> bytes:
    """Return a report of a member, a watcher or a launcher; many say something impossible."""
    draw = maker.draw
    request = control_pb2.JoinRequest(watch=draw.random() < 0.3, key=draw.choice(["", "a", "b"]))
    if draw.random() < 0.9:
        request.member.CopyFrom(valid_member(maker))
    for _ in range(draw.choice([0, 0, 0, 1, 3])):
        set_somehow(maker, request.member)
    if draw.random() < 0.1:
        request.managed.replicas[draw.choice(["vision", "llm", "x", ""])] = draw.choice([1, 2**31])
        if draw.random() < 0.3:
            request.managed.autoscaled["vision"] = draw.choice(["1:2", "x" * 500])
    return request.SerializeToString() or b"\x10\x00"


def valid_member(maker: Maker) -> control_pb2.Member:
    draw = maker.draw
    member_id = draw.choice(IDS[:4])
    return control_pb2.Member(
        id=member_id,
        role=draw.choice(["vision", "llm", "preprocess"]),
        state=draw.choice([v for v in control_pb2.MemberState.values() if v != DEAD]),
        address=f"ipc:///{member_id}",
        in_flight=draw.randrange(3),
        rank=draw.choice([0, 0, 1]),
        group=draw.choice(["", "g"]),
        tasks=draw.choice([[], ["generate"], ["embed", "classify"]]),
        stages=draw.choice([[], ["llm"]]),
    )


def set_somehow(maker: Maker, member: control_pb2.Member) -> None:
    """Set a field to a value that its type allows."""
    field = maker.draw.choice(member.DESCRIPTOR.fields)
    values: tuple[Any, ...] = {
        field.TYPE_STRING: (*STRINGS, *IDS),
        field.TYPE_DOUBLE: (*FLOATS, -1.0, float("nan"), float("inf")),
        field.TYPE_BOOL: (True, False),
        field.TYPE_ENUM: tuple(range(8)),
    }.get(field.type, tuple(n for n in INTS if n < 2**32))
    value = maker.draw.choice(values)
    if field.is_repeated:
        getattr(member, field.name).append(value)
    else:
        setattr(member, field.name, value)
