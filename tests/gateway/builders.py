"""A gateway core on fake links, and builders for the messages that it receives."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest

from common.errors import ServingError
from common.events import PeerDown, PeerUp, Received
from common.messages import Delta, Failed, Peer, Routed, Submit, Usage
from common.wire import Tensor
from services.gateway.core import GatewayCore
from services.gateway.generation import GenerationEvent, GenerationRequest
from services.gateway.peers import CONNECTED_STAGES
from tests.fakes import FakeLinks, aborts

USAGE = Usage(prompt_tokens=9, completion_tokens=3)


class Gateway:
    """A core with fake links, and replicas that are connected."""

    def __init__(
        self,
        replicas: int = 1,
        max_waiting: int = 10,
        request_timeout: float = 60,
        **options: Any,
    ) -> None:
        self.core = GatewayCore("tiny", max_waiting, request_timeout, **options)
        self.links = FakeLinks()
        self.core.links = self.links
        for role in CONNECTED_STAGES:
            for n in range(1, replicas + 1):
                self.regain(role, n)

    def submitted(self) -> list[tuple[str, Submit]]:
        return [
            (receiver, message)
            for receiver, message in self.links.sent
            if isinstance(message, Submit)
        ]

    def id_of(self, client_id: str) -> str:
        """Return the id of the client's latest request as the stages know it."""
        return [
            submit.request_id
            for _, submit in self.submitted()
            if submit.request_id.startswith(f"{client_id}~")
        ][-1]

    def on_event(self, *messages: Any, peer_id: str = "") -> None:
        """Pass messages of this peer, or of the members that hold the requests, to the core.

        They may name a request by its client's id.
        """
        for message in messages:
            if "~" not in message.request_id:
                message.request_id = self.id_of(message.request_id)
            role = "detokenizer" if isinstance(message, Delta) else "preprocess"
            sender = peer_id or self.holder_of(message.request_id, role)
            role = sender.partition("-")[0]
            self.core.on_event(Received(sender, role, message))

    def holder_of(self, id: str, role: str) -> str:
        """Return the member of this role that holds the request, or its first member."""
        record = self.core._records.get(id)
        return (record and getattr(record.attempt, role)) or f"{role}-1"

    def lose(self, role: str, number: int = 1, reason: str = "killed") -> None:
        self.core.on_event(PeerDown(f"{role}-{number}", role, reason))

    def regain(self, role: str, number: int = 1) -> None:
        self.core.on_event(PeerUp(f"{role}-{number}", role, f"ipc:///{role}-{number}"))

    def aborts(self) -> list[tuple[str, str]]:
        """Return (receiver, client's id) of each abort that was sent."""
        return [(receiver, id.partition("~")[0]) for receiver, id in aborts(self.links.sent)]

    @property
    def is_idle(self) -> bool:
        return self.core.load() == (0, 0)


def request(request_id: str = "r", **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id, **{"prompt_kind": "messages", "prompt": b"[]"} | fields
    )


def routed(
    request_id: str = "r", llm: str = "llm-1", ids: Sequence[int] | None = None, attempt: int = 0
) -> Routed:
    tensor = None if ids is None else Tensor.of(np.array(ids, np.int64))
    return Routed(
        request_id=request_id,
        attempt=attempt,
        llm=Peer(llm, f"ipc:///{llm}"),
        prompt_token_ids=tensor,
    )


def delta(
    offset: int,
    ids: Sequence[int],
    text: str,
    finish_reason: str = "",
    request_id: str = "r",
    attempt: int = 0,
) -> Delta:
    end = {
        "finish_reason": finish_reason,
        "usage": USAGE,
        "timings": Tensor.of_text(json.dumps({"decode_seconds": 0.5})),
    }
    return Delta(
        request_id=request_id,
        attempt=attempt,
        offset=offset,
        token_ids=Tensor.of(np.array(ids, np.int64)),
        text=Tensor.of_text(text),
        **end if finish_reason else {},
    )


def failed(
    code: str = "Internal", stage: str = "llm", image: int | None = None, attempt: int = 0
) -> Failed:
    return Failed(
        request_id="r", attempt=attempt, code=code, message="why", stage=stage, item=image
    )


async def rest(events: AsyncIterator[GenerationEvent]) -> list[GenerationEvent]:
    return [event async for event in events]


async def error_of(events: AsyncIterator[GenerationEvent]) -> ServingError:
    with pytest.raises(ServingError) as caught:
        await rest(events)
    return caught.value
