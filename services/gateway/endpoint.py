"""What the HTTP endpoints that ask the core have in common."""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from common.errors import InvalidRequest
from common.tracing import read_traceparent
from services.gateway.bodies import Bodies, address_of
from services.gateway.body_budget import BodyBudget, Reservation
from services.gateway.generation import Core, GenerationRequest
from services.gateway.schema import MAX_TIMEOUT


@dataclass(frozen=True, slots=True)
class Asked:
    """What a body asks for: one request, or several that are answered together."""

    requests: list[GenerationRequest]
    is_streamed: bool = field(default=False, kw_only=True)


A = TypeVar("A", bound=Asked)


class Endpoint(ABC, Generic[A]):
    """An endpoint as an ASGI application: it reads a body, asks the core and sends the answer.

    One task enters the core's context, sends the response and leaves the context. The task is
    cancelled when the client disconnects, whatever it waits for.
    """

    def __init__(self, core: Core, bodies: Bodies, admitted_images: BodyBudget) -> None:
        self.core = core
        self.bodies = bodies
        self.admitted_images = admitted_images

    @abstractmethod
    def parse(self, body: bytearray, request_id: str, timeout: float | None) -> A:
        """Return what a body asks for. This may run on another thread.

        Raises
        ------
        ServingError
            if the body is wrong.
        """

    @abstractmethod
    async def answer(self, asked: A, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask the core, and send the answer.

        Raises
        ------
        ServingError
            if the request fails before anything is sent.
        """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        timeout = read_timeout(Headers(scope=scope).get("x-request-timeout"))
        with self.bodies.reserve(scope) as reservation:
            body = await self.bodies.receive(scope, receive, reservation)
            work = self._answer(body, timeout, reservation, scope, receive, send)
            del body
            await cancel_on_disconnect(work, receive)

    async def _answer(
        self,
        body: bytearray,
        timeout: float | None,
        reservation: Reservation,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Send the answer. The body is not kept, because it may have tens of megabytes."""
        parse = partial(self.parse, body, scope["request_id"], timeout)
        asked = await self.bodies.work(scope, body, parse)
        del body, parse
        if asked.is_streamed:
            begin_stream(scope)
        if traceparent := read_traceparent(Headers(scope=scope).get("traceparent")):
            asked.requests[:] = [replace(r, traceparent=traceparent) for r in asked.requests]
        reservation.release()
        num_image_bytes = sum(len(image) for request in asked.requests for image in request.images)
        with self.admitted_images.reserve(address_of(scope), num_image_bytes):
            await self.answer(asked, scope, receive, send)


def read_timeout(header: str | None) -> float | None:
    """Return the seconds in the X-Request-Timeout header, or None if it is absent."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT:
        raise InvalidRequest(
            f"X-Request-Timeout: must be a number of seconds above 0, up to {MAX_TIMEOUT:.0f}",
            stage="gateway",
        )
    return seconds


def begin_stream(scope: Scope) -> None:
    """Note that the answer is a stream, so that its client has gone once it sends no more.

    Raises
    ------
    ClientDisconnect
        if it sends no more already.
    """
    scope["is_streamed"] = True
    if scope.get("has_ended"):
        raise ClientDisconnect


async def cancel_on_disconnect(work: Awaitable[None], receive: Receive) -> None:
    """Wait for the work, and cancel it if the client disconnects first.

    The body of the request must have been read before.
    """
    working = asyncio.ensure_future(work)
    disconnecting = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({working, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, disconnecting):
            task.cancel()
        await asyncio.gather(working, disconnecting, return_exceptions=True)


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
