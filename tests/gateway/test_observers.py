"""Observers see every request that reaches the core: its arrival, its events and its one end."""

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from common.errors import Exhausted, Internal, InvalidRequest, ServingError
from services.gateway.generation import Began, GenerationEvent, GenerationRequest
from services.gateway.metrics import MeasuredCore
from tests.gateway.fake_core import FOREVER, HELLO, FakeCore, Step

REQUEST = GenerationRequest(request_id="r", prompt_kind="messages", prompt=b"[]")


class Seen:
    """An observer that writes down what it is notified of."""

    def __init__(self) -> None:
        self.notes: list[Any] = []
        self.arrivals: list[float] = []

    def begin(self, request: GenerationRequest, arrival: float) -> "Seen":
        self.notes.append(("began", request))
        self.arrivals.append(arrival)
        return self

    def on_refused(self, request: GenerationRequest, arrival: float, error: ServingError) -> None:
        self.notes.append(("refused", request, error))
        self.arrivals.append(arrival)

    def on_event(self, event: GenerationEvent) -> None:
        self.notes.append(event)

    def on_end(self, outcome: str, error: ServingError | None) -> None:
        self.notes.append((outcome, error))


async def seen_of(core: FakeCore, num_read: int = 100) -> Seen:
    """Return what is seen of a request whose client leaves after this number of events."""
    seen = Seen()
    async with MeasuredCore(core, observers=[seen]).generate(REQUEST) as events:
        async for _ in limited(events, num_read):
            pass
    return seen


async def limited(
    events: AsyncIterator[GenerationEvent], count: int
) -> AsyncIterator[GenerationEvent]:
    for _ in range(count):
        try:
            yield await anext(events)
        except StopAsyncIteration:
            return


async def test_an_answer_is_seen_whole() -> None:
    before = time.monotonic()
    seen = await seen_of(FakeCore())
    assert seen.notes == [("began", REQUEST), *HELLO, ("stop", None)]
    [arrival] = seen.arrivals
    assert before <= arrival <= time.monotonic()


async def test_a_client_that_leaves_is_seen_as_aborted() -> None:
    seen = await seen_of(FakeCore(Began(None), FOREVER), num_read=1)
    assert seen.notes[-1] == ("aborted", None)


async def test_a_failure_is_seen_with_its_error() -> None:
    error = Exhausted("too much", stage="llm")
    script: list[Step] = [Began(None), error]
    seen = Seen()
    with pytest.raises(Exhausted):
        async with MeasuredCore(FakeCore(*script), observers=[seen]).generate(REQUEST) as events:
            async for _ in events:
                pass
    assert seen.notes[-1] == (error.code, error)


async def test_an_error_of_the_reader_is_the_outcome() -> None:
    seen = Seen()
    with pytest.raises(Internal):
        async with MeasuredCore(FakeCore(), observers=[seen]).generate(REQUEST):
            raise KeyError("a bug in an API server")
    outcome, error = seen.notes[-1]
    assert outcome == "Internal" and isinstance(error, Internal)


async def test_a_refused_request_is_seen_but_never_begins() -> None:
    refusal = InvalidRequest("no", stage="gateway")
    seen = Seen()
    with pytest.raises(InvalidRequest):
        async with MeasuredCore(FakeCore(refusal=refusal), observers=[seen]).generate(REQUEST):
            pass
    assert seen.notes == [("refused", REQUEST, refusal)]
