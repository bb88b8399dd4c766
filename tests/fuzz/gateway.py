"""The gateway's core as a target."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from common.errors import ServingError
from common.events import Event
from common.messages import (
    Alone,
    Delta,
    Failed,
    HandedOver,
    ItemsLeft,
    Message,
    Peer,
    RequestMessage,
    Routed,
    Usage,
)
from common.wire import Tensor
from services.gateway.core import GatewayCore
from services.gateway.generation import Began, GenerationRequest
from services.gateway.peers import MAX_PEERS_WITH_UNSENT_ABORTS
from tests.fuzz.actions import HOLDER, Action, Call, Member, Say, Work
from tests.fuzz.clock import CLOCK
from tests.fuzz.making import Maker
from tests.fuzz.targets import ADDRESS, REQUEST_IDS, Target

ROLES = ("preprocess", "llm", "detokenizer")
TEXT = "It is read."
FAILED = Failed(request_id="none", attempt=0, code="Internal", message="", stage="")


class GatewayTarget(Target):
    role = "gateway"
    peers = tuple(Member(f"{role}-{n}", role) for role in ROLES for n in (1, 2))

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()
        self._core = GatewayCore("tiny", 20, 60.0)
        self._core.links = self.door
        self._clients: dict[str, asyncio.Task[Any]] = {}
        self._ids: dict[str, str] = {}
        """The latest id in the stages by the client's id."""

    def play(self, events: list[Event[Any]]) -> None:
        self._run(events)

    def _run(self, events: Sequence[Event[Any]] = ()) -> None:
        self._loop.run_until_complete(self._handle(events))

    async def _handle(self, events: Sequence[Event[Any]]) -> None:
        """Handle the events, and let everything happen that is due."""
        for event in events:
            self._core.on_event(event)
        for _ in range(6):
            await asyncio.sleep(0)

    def close(self) -> None:
        super().close()
        for task in self._clients.values():
            task.cancel()
        self._run()
        self._loop.close()

    def finish(self) -> None:
        """Let the patience with lost members end."""
        CLOCK.ahead += 1000.0
        self._run()
        self._run()

    # What clients do

    def begin(self, request_id: str, has_image: bool) -> None:
        """Let a client send a request. One of the same name hangs up."""
        self.hang_up(request_id)
        self._run()
        request = GenerationRequest(
            request_id=request_id,
            prompt_kind="messages",
            prompt=b"[]",
            images=(b"image",) if has_image else (),
        )
        self._clients[request_id] = self._loop.create_task(self._read(request))
        before = set(self._core._records)
        self._run()
        for record_id in set(self._core._records) - before:
            self._ids[request_id] = record_id

    async def _read(self, request: GenerationRequest) -> Any:
        try:
            async with self._core.generate(request) as events:
                return [event async for event in events]
        except ServingError as e:
            return [e]

    def hang_up(self, request_id: str) -> None:
        if task := self._clients.pop(request_id, None):
            task.cancel()

    def address(self, say: Say) -> Say:
        """Return what is said about the request that has the client's id now, as its holder."""
        message = say.message
        if not isinstance(message, RequestMessage):
            return say
        record = self._core._records.get(self._ids.get(message.request_id, ""))
        if record is None:
            return Say(actual(say.peer, ""), message)
        attempt = record.attempt
        number = message.attempt or attempt.number
        told = msgspec.structs.replace(message, request_id=record.id, attempt=number)
        return Say(actual(say.peer, getattr(attempt, say.peer.role)), told)

    # The target

    def pools(self, number: int) -> dict[str, Sequence[Any]]:
        ids = (*REQUEST_IDS, name_of(2 * number))
        return super().pools(number) | {"request_id": ids}

    def converse(self, maker: Maker) -> list[Action]:
        draw = maker.draw
        request_id = draw.choice(REQUEST_IDS)
        found: list[Action] = [Call("begin", (request_id, draw.random() < 0.5))]
        found += answering(request_id, draw.choice(["llm-1", "llm-2"]))
        ends: list[Action | None] = [
            None,
            Call("hang_up", (request_id,)),
            Say(Member(HOLDER, draw.choice(ROLES)), maker.make(Failed)),
            Say(Member(HOLDER, "llm"), Alone(request_id=request_id, attempt=0)),
        ]
        if end := draw.choice(ends):
            found.insert(draw.randrange(1, len(found)), end)
        return found

    def question(self, number: int) -> list[Action]:
        joins: list[Action] = [
            Say(Member(f"{role}-i", role), Alone(request_id="none", attempt=0))
            for role in ("preprocess", "llm")
        ]
        joins.append(Say(Member("detokenizer-i", "detokenizer"), FAILED))
        name = name_of(number)
        return [*joins, Work(), Call("begin", (name, True)), *answering(name, "llm-i")]

    def answer(self, number: int, sent: list[tuple[str, Any]]) -> Any:
        task = self._clients.pop(name_of(number))
        assert task.done(), "the innocent request has no end"
        return [without_times(event) for event in task.result()]

    def held(self) -> dict[str, float]:
        core = self._core
        unsent = len(core.peers._unsent_aborts)
        return {
            "requests": len(core._records) + sum(core.load()),
            "waiting": len(core._failover._waiting),
            "clients": sum(not task.done() for task in self._clients.values()),
            "tasks": len(asyncio.all_tasks(self._loop)),
            "peers": len(core.peers._connected) + len(core.peers._draining),
            "too many unsent aborts": float(unsent > MAX_PEERS_WITH_UNSENT_ABORTS),
        }


class GroupsTarget(GatewayTarget):
    """The core whose language groups send anything, while its other members can be trusted."""

    name = "gateway from groups"
    peers = (Member("llm-1", "llm"), Member("llm-2", "llm"))
    innocents = (
        Member("preprocess-i", "preprocess"),
        Member("detokenizer-i", "detokenizer"),
        Member("llm-i", "llm"),
    )

    def __init__(self) -> None:
        super().__init__()
        for peer in self.innocents:
            self.door.join(peer.id, peer.role)
        self.play(self.door.take_events())

    def converse(self, maker: Maker) -> list[Action]:
        peer = maker.draw.choice(self.peers)
        kind = maker.draw.choice([Failed, Alone])
        return [Say(peer, maker.make(kind))]

    def held(self) -> dict[str, float]:
        return super().held() | {"peers": 0}


def name_of(number: int) -> str:
    """Return what its client calls an innocent request."""
    return f"innocent-{number}"


def actual(peer: Member, holder: str) -> Member:
    if peer.id != HOLDER:
        return peer
    return Member(holder or f"{peer.role}-1", peer.role)


def answering(request_id: str, llm: str) -> list[Action]:
    """Return what the members say until a request is answered."""
    ids = {"request_id": request_id, "attempt": 0}
    routed = Routed(**ids, llm=Peer(llm, ADDRESS))
    found: list[tuple[str, Message]] = [
        ("preprocess", routed),
        ("preprocess", ItemsLeft(**ids)),
        ("preprocess", HandedOver(**ids)),
    ]
    for offset, word in enumerate(words := TEXT.split()):
        end = {
            "finish_reason": "stop",
            "usage": Usage(prompt_tokens=9, completion_tokens=3),
            "timings": Tensor.of_text(json.dumps({"decode_seconds": 0.5, "images": [{}]})),
        }
        delta = Delta(
            **ids,
            offset=offset,
            token_ids=Tensor.of(np.array([offset + 5], np.int64)),
            text=Tensor.of_text(word),
            **end if offset == len(words) - 1 else {},
        )
        found.append(("detokenizer", delta))
    return [Say(Member(HOLDER, role), message) for role, message in found]


def without_times(event: Any) -> str:
    if isinstance(event, Began):
        return repr(event.prompt_token_ids)
    timings = getattr(event, "timings", None)
    return repr(event if timings is None else (event.finish_reason, event.usage))
