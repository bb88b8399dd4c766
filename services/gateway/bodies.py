"""The bodies of HTTP requests: received in bounded time and memory, parsed off the event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from common.errors import TooLarge, TooSlow
from services.gateway.body_budget import BodyBudget, Reservation, client_of
from services.gateway.encodings import (
    check_content_type,
    decoded,
    encoding_of,
    remove_mark,
)
from services.gateway.limits import (
    BODY_PATIENCE_SECONDS,
    DROP_PATIENCE_SECONDS,
    DROP_SECONDS,
    MIN_BODY_BYTES_PER_SECOND,
    SMALL_BODY_BYTES,
)
from services.gateway.turns import Turns

MAX_CHEAP_VALUES = 1000
"""A small body that has no more JSON values is parsed at once. That takes less than a millisecond,
and the way to a thread takes half of one."""

T = TypeVar("T")


class Bodies:
    """Receives the bodies of requests, and runs what is done with a body before admission."""

    def __init__(self, max_bytes: int, budget: BodyBudget) -> None:
        self._max_bytes = max_bytes
        self._budget = budget
        self._small = Turns("small-bodies")
        self._large = Turns("large-bodies")

    def reserve(self, scope: Scope) -> Reservation:
        """Return room for the body of a request, as far as its length is announced.

        Raises
        ------
        TooLarge
            if it is larger than any body may be.
        Exhausted
            if there is no room at present.
        """
        length = Headers(scope=scope).get("content-length", "0")
        num_bytes = int(length) if length.isdecimal() else 0
        if num_bytes > self._max_bytes:
            raise too_large(self._max_bytes)
        return self._budget.reserve(address_of(scope), num_bytes)

    async def receive(self, scope: Scope, receive: Receive, reservation: Reservation) -> bytearray:
        """Return the JSON text of a request; `reservation` grows with it.

        Raises
        ------
        UnsupportedType
            if its headers say that it is something else, or encoded in a way that is not read.
        InvalidRequest, TooLarge, TooSlow, Exhausted
            if it cannot be decoded, is larger than any body may be, comes too slowly, or if there
            is no room for it.
        """
        headers = Headers(scope=scope)
        check_content_type(headers)
        encoding = encoding_of(headers)
        body = await self._read(receive, reservation)
        if encoding:
            body = await self._decode(scope, body, encoding, reservation)
        remove_mark(body)
        return body

    async def _read(self, receive: Receive, reservation: Reservation) -> bytearray:
        """Return the body of the request; `reservation` grows if it is longer than announced.

        Raises
        ------
        TooLarge
            if it is larger than any body may be.
        TooSlow
            if it comes too slowly.
        Exhausted
            if there is no room for it.
        """
        body = bytearray()
        try:
            async for piece in pieces_in_time(receive, BODY_PATIENCE_SECONDS):
                if len(body) + len(piece) > self._max_bytes:
                    raise too_large(self._max_bytes)
                if len(body) + len(piece) > reservation.num_bytes:
                    reservation.grow(len(body) + len(piece) - reservation.num_bytes)
                body += piece
        except TimeoutError:
            raise TooSlow(
                "the body comes too slowly: send at least "
                f"{MIN_BODY_BYTES_PER_SECOND // 1024} KiB per second",
                stage="gateway",
            ) from None
        return body

    async def _decode(
        self, scope: Scope, body: bytearray, encoding: str, reservation: Reservation
    ) -> bytearray:
        """Return a body that is encoded as `encoding_of` says; `reservation` grows with it.

        Clients take turns with each piece of it, so a large one delays another client little.

        Raises
        ------
        InvalidRequest
            if it cannot be decoded.
        TooLarge
            if it is larger than any body may be, once it is decoded.
        Exhausted
            if there is no room for it.
        """
        turns = self._large if len(body) > SMALL_BODY_BYTES else self._small
        client = client_of(address_of(scope))
        pieces = decoded(body, encoding)
        whole = bytearray()
        while (piece := await turns.run(client, partial(next, pieces, None))) is not None:
            if len(whole) + len(piece) > self._max_bytes:
                raise too_large(self._max_bytes)
            reservation.grow(len(piece))
            whole += piece
        return whole

    async def work(self, scope: Scope, body: bytearray, function: Callable[[], T]) -> T:
        """Return what the function returns, which does something with the body.

        It runs off the event loop unless it is quick. Clients take turns, and small bodies do not
        wait for large ones.
        """
        if len(body) > SMALL_BODY_BYTES:
            turns = self._large
        elif body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_CHEAP_VALUES:
            turns = self._small
        else:
            return function()
        return await turns.run(client_of(address_of(scope)), function)


def too_large(limit: int) -> TooLarge:
    return TooLarge(
        f"the body is larger than {limit} bytes; send fewer or smaller images", stage="gateway"
    )


def address_of(scope: Scope) -> str:
    client = scope.get("client")
    return client[0] if client else ""


async def pieces_in_time(receive: Receive, patience: float) -> AsyncIterator[bytes]:
    """Yield the pieces of a body.

    Raises
    ------
    TimeoutError
        if the body lags behind MIN_BODY_BYTES_PER_SECOND by more than `patience` seconds.
    ClientDisconnect
        if the client disconnects before the end.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + patience
    more = True
    while more:
        async with asyncio.timeout_at(deadline):
            message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        more = message.get("more_body", False)
        deadline = next_deadline(deadline, len(piece), clock(), patience)
        yield piece


def next_deadline(deadline: float, num_bytes: int, now: float, patience: float) -> float:
    """Return until when more of a body must come, after this many bytes came.

    Bytes postpone the deadline by the time that they may take, but never beyond `patience` seconds
    from now.
    """
    return min(deadline + num_bytes / MIN_BODY_BYTES_PER_SECOND, now + patience)


class BodyDrop:
    """Holds the end of an answer back until the rest of the request's body was read and dropped.

    A client that still sends would not see the answer if the connection were closed at once. The
    answer itself is not held back. After a time the connection is closed nevertheless.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_bytes: int) -> None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        self.is_unread = "transfer-encoding" in headers or length != "0"
        """Whether the body, or its rest, was not received yet."""
        self._receive = receive
        self._send = send
        self._max_bytes = max_bytes

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self.is_unread = False
        return message

    async def send(self, message: Message) -> None:
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if not (is_last and self.is_unread):
            return await self._send(message)
        await self._send({**message, "more_body": True})
        await self._drop()
        await self._send({"type": "http.response.body", "body": b""})

    async def _drop(self) -> None:
        left = self._max_bytes
        try:
            async with asyncio.timeout(DROP_SECONDS):
                async for piece in pieces_in_time(self.receive, DROP_PATIENCE_SECONDS):
                    left -= len(piece)
                    if left < 0:
                        return
        except (TimeoutError, ClientDisconnect):
            pass
