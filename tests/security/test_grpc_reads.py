"""Attacks with large, slow or unfinished gRPC messages, on the part that receives them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from common.errors import Exhausted, InvalidRequest, TooSlow
from services.gateway import grpc_reads
from services.gateway.body_budget import BodyBudget
from services.gateway.grpc_reads import (
    MAX_IN_LINE,
    MAX_TURNS,
    SMALL_MESSAGE_BYTES,
    Body,
    Reads,
    ReadTurns,
)

MIB = 2**20
LARGEST = 64 * MIB


class Call:
    """A call whose message comes when the test says so."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self.asked = asyncio.Event()
        self.message: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def peer(self) -> str:
        return self._peer

    async def read(self) -> bytes:
        self.asked.set()
        return await self.message


class Kernel:
    """Counts of received bytes by peer, which the test sets. None is a connection not found."""

    def __init__(self) -> None:
        self.counts: dict[str, int | None] = {}

    def known(self, peer: str) -> int | None:
        return self.counts.get(peer, 0)

    def find(self, peers: set[str]) -> None:
        pass


class Attack:
    """A receiver of messages, and calls that it receives from."""

    def __init__(self) -> None:
        self.budget = BodyBudget()
        self.kernel = Kernel()
        received: Any = self.kernel
        self.reads = Reads(self.budget, LARGEST, received)
        self.calls: list[Call] = []
        self.bodies: list[asyncio.Task[Body]] = []

    def open(self, port: int, host: str = "127.0.0.1") -> tuple[Call, asyncio.Task[Body]]:
        call = Call(f"ipv4:{host}:{port}")
        context: Any = call
        body = asyncio.create_task(self.reads.receive(context))
        self.calls.append(call)
        self.bodies.append(body)
        return call, body

    async def settle(self) -> None:
        """Let every task run until it waits."""
        for _ in range(20):
            await asyncio.sleep(0)

    def count(self, seconds: float) -> None:
        """Count bytes as if this much time had passed since each message was asked for."""
        for connection in self.reads._connections.values():
            for arrival in connection.arrivals:
                arrival.began -= seconds
        self.reads._count()


@pytest.fixture
async def attack(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Attack]:
    monkeypatch.setattr(grpc_reads, "TURN_SECONDS", 3600.0)  # the test counts, not the clock
    attack = Attack()
    yield attack
    for task in attack.bodies:
        task.cancel()
    await asyncio.gather(*attack.bodies, return_exceptions=True)
    assert attack.budget.num_held == 0 and not attack.reads._connections


async def test_few_messages_are_asked_for_at_a_time(attack: Attack) -> None:
    for port in range(100):
        attack.open(port)
    await attack.settle()
    assert sum(call.asked.is_set() for call in attack.calls) == MAX_TURNS // 4


async def test_another_client_does_not_wait_for_large_messages(attack: Attack) -> None:
    for port in range(100):
        attack.open(port)
    call, body = attack.open(1, "127.0.0.2")
    call.message.set_result(b"small")
    await attack.settle()
    with await body as data:
        assert data == b"small"


async def test_messages_that_do_not_come_give_way_to_the_next(attack: Attack) -> None:
    """Opened calls that send nothing cost a moment each, and no room."""
    for port in range(40):
        attack.open(port)
    call, body = attack.open(1000)
    call.message.set_result(b"small")
    for _ in range(40):
        await attack.settle()
        attack.count(3601)
        for connection in attack.reads._connections.values():
            for arrival in connection.arrivals:
                arrival.began += 3601
    assert attack.budget.num_held == 0
    with await body as data:
        assert data == b"small"


async def test_unfinished_messages_are_counted_and_refused_beyond_the_budget(
    attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_reads, "SLOW_SECONDS", 1e9)
    for port in range(20):
        attack.open(port)
        attack.kernel.counts[f"ipv4:127.0.0.1:{port}"] = 0
    for _ in range(20):
        await attack.settle()
        for port, call in enumerate(attack.calls):
            if call.asked.is_set():
                attack.kernel.counts[f"ipv4:127.0.0.1:{port}"] = 60 * MIB
        attack.count(3601)
        assert attack.budget.num_held <= 128 * MIB
    await attack.settle()
    ended = [body for body in attack.bodies if body.done()]
    assert len(ended) == 18
    assert all(isinstance(body.exception(), Exhausted) for body in ended)


async def test_a_connection_that_cannot_be_found_is_counted_as_if_all_had_come(
    attack: Attack,
) -> None:
    _, body = attack.open(1)
    attack.kernel.counts["ipv4:127.0.0.1:1"] = None
    await attack.settle()
    attack.count(1)
    assert attack.budget.num_held == 0
    attack.count(3600)
    assert attack.budget.num_held == LARGEST
    await attack.settle()
    assert isinstance(body.exception(), TooSlow)


async def test_messages_wait_for_their_request_within_the_budget(attack: Attack) -> None:
    held = []
    for port in range(3):
        call, body = attack.open(port)
        call.message.set_result(bytes(60 * MIB))
        if port < 2:
            held.append(await body)
    with pytest.raises(Exhausted):
        await body
    for body_held in held:
        with body_held as data:
            assert data is not None
    call, body = attack.open(9)
    call.message.set_result(bytes(60 * MIB))
    with await body:
        assert attack.budget.num_held == 60 * MIB


async def test_a_slow_sender_is_given_up_and_a_slow_link_is_not(attack: Attack) -> None:
    _, slow = attack.open(1)
    _, steady = attack.open(2)
    await attack.settle()
    attack.kernel.counts["ipv4:127.0.0.1:1"] = 1000
    attack.kernel.counts["ipv4:127.0.0.1:2"] = 3700 * 16 * 1024
    attack.count(3601)
    await attack.settle()
    assert isinstance(slow.exception(), TooSlow)
    assert not steady.done()


async def test_a_message_for_a_small_method_is_bounded(attack: Attack) -> None:
    call = Call("ipv4:127.0.0.1:1")
    context: Any = call
    call.message.set_result(bytes(SMALL_MESSAGE_BYTES + 1))
    with pytest.raises(InvalidRequest):
        await attack.reads.receive_small(context)


async def test_checks_do_not_wait_for_requests_of_the_same_client(attack: Attack) -> None:
    for port in range(100):
        attack.open(port)
    await attack.settle()
    call = Call("ipv4:127.0.0.1:1")
    context: Any = call
    call.message.set_result(b"")
    assert await attack.reads.receive_small(context) == b""


async def test_the_line_of_a_client_is_bounded(attack: Attack) -> None:
    for port in range(MAX_TURNS // 4 + MAX_IN_LINE):
        attack.open(port)
    await attack.settle()
    _, body = attack.open(99_999)
    with pytest.raises(Exhausted):
        await body


async def test_turns_are_returned_whenever_a_call_ends() -> None:
    turns = ReadTurns(4)
    await turns.take("a")
    waiting = [asyncio.create_task(turns.take("a")) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[1].cancel()  # while it waits
    await asyncio.sleep(0)
    turns.put_back("a")
    waiting[0].cancel()  # at the moment of its turn
    await asyncio.gather(*waiting[:2], return_exceptions=True)
    await waiting[2]
    turns.put_back("a")
    assert not turns._taken and not turns._lines
