"""uvicorn's HTTP protocol, with bounds on all that a client sends besides bodies.

httptools bounds neither the size of a head, of trailers or of chunk extensions, nor the time that
they take. It also drops the body of a request that offers an upgrade, which no offer means here.
"""

import asyncio
from functools import partial
from typing import Any, cast

import httptools
from starlette.datastructures import Headers
from uvicorn._types import (
    ASGI3Application,
    ASGIReceiveCallable,
    ASGISendCallable,
    ASGISendEvent,
    Scope,
)
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from services.gateway.connection_limits import ConnectionLimits, Standing
from services.gateway.cors import Cors
from services.gateway.limits import (
    HEAD_SECONDS,
    MAX_CHUNK_EXTENSION_BYTES,
    MAX_CHUNKS,
    MAX_HEAD_BYTES,
    MAX_PIPELINED,
)
from services.gateway.refusal import (
    HTTP2,
    LONG_EXTENSIONS,
    LONG_HEAD,
    MALFORMED,
    MANY_CHUNKS,
    MANY_PIPELINED,
    SLOW_HEAD,
    Refusal,
)
from services.gateway.request_log import log_abort
from services.gateway.schema import new_request_id
from services.gateway.slow_readers import ReadDeadlineProtocol

READ_BUFFER = memoryview(bytearray(64 * 1024))
"""What is read from a connection at a time. All connections of a process share it, because each
read is handled before the next one."""
SLICE_BYTES = 4 * 1024
"""How much of a head or of a chunked body is parsed before its bounds are checked."""
CHUNK_LINE_BYTES = 16
"""What a chunk may take besides its data and extensions: its length and the ends of its lines."""
HALF_CLOSE_SECONDS = 1.0
"""How long after its request a client may end its side and still wait for the answer."""
GOODBYE_SECONDS = 2.0
"""How long a refused client may go on sending before the connection is closed, so that it sees the
answer."""


HTTP2_BEGIN = b"PRI * HTTP/2"
FRAMING = (b"content-length", b"transfer-encoding")
"""The headers that say where a body ends."""


class BoundedProtocol(ReadDeadlineProtocol, asyncio.BufferedProtocol):
    """One HTTP connection."""

    head_seconds = HEAD_SECONDS
    half_close_seconds = HALF_CLOSE_SECONDS

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        loop: asyncio.AbstractEventLoop,
        limits: ConnectionLimits,
        cors: Cors,
        client: str,
    ) -> None:
        super().__init__(config, server_state, {}, loop)
        self._limits = limits
        self._cors = cors
        self._client = client
        self._head_timer: asyncio.TimerHandle | None = None
        self._answered: RequestResponseCycle | None = None
        """The request that is being answered, or was last. `cycle` may be a later one."""
        self._is_in_body = False
        """Whether a head is complete, and its body and trailers are not."""
        self._is_chunked = False
        self._is_trailing = False
        """Whether what comes next are trailers, if it is not the data of a chunk."""
        self._num_chunks = 0
        self._overhead = 0
        """Bytes so far of an incomplete head, or bytes in a body besides its data and the lengths
        of its chunks: extensions and trailers."""
        self._explained = 0
        """Bytes of the current slice that are not overhead."""
        self._is_new_part = False
        """Whether a head or a body has ended in the current slice."""
        self._is_upgrade = False
        """Whether the current request offers an upgrade, so that its parser ends with its head."""
        self._is_reading_again = False
        """Whether a new parser reads a head that was read before."""
        self._complete_at = 0.0
        """When the last request was complete, on the loop's clock."""
        self._has_ended = False
        """Whether the client sends no more, and waits for what it asked for."""
        self._refusal: Refusal | None = None
        limits.add(client, self)

    # Called by the event loop

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.pipeline.clear()
        self._disconnect()
        self._stop_head_timer()
        self._limits.remove(self._client, self)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open although the client sends no more.

        A client that ends its side with its request waits for a whole answer. One that does so
        later, or that asked for a stream, has hung up. TCP shows no difference.
        """
        answered = self._answered
        if self._is_in_body or not answered or self._is_answered or self._refusal:
            return False
        if self.loop.time() - self._complete_at > self.half_close_seconds:
            return False
        self._stop_head_timer()
        self._has_ended = True
        notes_of(answered)["has_ended"] = True
        return not notes_of(answered).get("is_streamed")

    def get_buffer(self, sizehint: int) -> memoryview:
        return READ_BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(READ_BUFFER[:nbytes]))

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        while data and not self._refusal and not self.transport.is_closing():
            is_plain = self._is_in_body and not self._is_chunked
            size = len(data) if is_plain else SLICE_BYTES
            self._parse(data[:size])
            data = data[size:]

    # Called by ConnectionLimits

    @property
    def standing(self) -> Standing:
        if self._answered is None or self._is_answered:
            return Standing.SENDING_HEAD
        return Standing.SENDING_BODY if self._answered.more_body else Standing.WAITING

    def evict(self) -> None:
        if not self._is_answered:
            self.give_up("its connection gave way to another one")
        self.transport.abort()

    # Called by ReadDeadlineProtocol

    def give_up(self, reason: str) -> None:
        """Note why the connection is closed before the application has answered."""
        if not self._answered:
            return
        notes = notes_of(self._answered)
        notes["gave_up"] = reason
        if self._is_answered:  # and so the application has no part in it any more
            log_abort(notes.get("request_id", ""), reason)

    # Called by uvicorn

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        notes_of(cycle)["has_ended"] = self._has_ended
        super()._start_asgi_task(cycle, partial(self._run, cycle, app))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._has_ended and self._is_answered:
            self.transport.close()

    async def _run(
        self,
        cycle: RequestResponseCycle,
        app: ASGI3Application,
        scope: Scope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
    ) -> None:
        """Answer a request."""
        is_old = cycle.scope["http_version"] < "1.1"
        await app(scope, receive, without_chunks(cycle, send) if is_old else send)
        if self._has_ended and not cycle.response_complete:
            self._disconnect()
            self.transport.close()

    # Called by the parser

    def on_message_begin(self) -> None:
        if not self._is_reading_again:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._is_reading_again:
            super().on_url(url)

    def on_headers_complete(self) -> None:
        if self._is_reading_again:
            return
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._refusal = LONG_HEAD
        elif len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = MANY_PIPELINED
        if self._refusal:
            raise ValueError(self._refusal.message)
        self._stop_head_timer()
        self._is_in_body = True
        self._is_chunked = any(name == b"transfer-encoding" for name, _ in self.headers)
        self._is_upgrade = self.parser.should_upgrade()
        self._num_chunks = 0
        self._is_new_part = True
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not (self._is_in_body or self._is_reading_again):  # Trailers are dropped.
            super().on_header(name, value)

    def on_chunk_header(self) -> None:
        self._explained += CHUNK_LINE_BYTES
        self._num_chunks += 1
        self._is_trailing = True

    def on_body(self, body: bytes) -> None:
        self._explained += len(body)
        self._is_trailing = False
        super().on_body(body)

    def on_chunk_complete(self) -> None:
        self._is_trailing = False

    def on_message_complete(self) -> None:
        if self._is_upgrade:
            return  # The body comes, and another parser reads it.
        self._is_in_body = False
        self._is_new_part = True
        self._complete_at = self.loop.time()
        super().on_message_complete()
        self.headers = []

    # Bounds

    def _parse(self, piece: bytes) -> None:
        if not self._is_in_body and not self._head_timer:
            self._start_head_timer()
        self._explained = 0
        self._is_new_part = False
        try:
            self._feed(piece)
        except httptools.HttpParserError:
            is_http2 = piece.startswith(HTTP2_BEGIN)
            return self._refuse(self._refusal or (HTTP2 if is_http2 else MALFORMED))
        overhead = self._overhead + len(piece) - self._explained
        self._overhead = 0 if self._is_new_part else max(0, overhead)
        if refusal := self._exceeded():
            self._refuse(refusal)

    def _feed(self, piece: bytes) -> None:
        """Parse a piece. What follows a head that offers an upgrade is its body all the same."""
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._read_again()
            self._feed(piece[upgrade.args[0] :])

    def _read_again(self) -> None:
        """Begin a parser that has read the head of the current request without its offer."""
        fields = b"".join(
            name + b": " + value + b"\r\n" for name, value in self.headers if name in FRAMING
        )
        method = self.scope["method"].encode()
        version = self.scope["http_version"].encode()
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._is_upgrade = False
        self._is_reading_again = True
        self.parser.feed_data(method + b" / HTTP/" + version + b"\r\n" + fields + b"\r\n")
        self._is_reading_again = False

    def _exceeded(self) -> Refusal | None:
        """Return which bound is exceeded, if one is."""
        if self._is_in_body and self._num_chunks > MAX_CHUNKS:
            return MANY_CHUNKS
        if self._is_in_body and not self._is_trailing:
            return LONG_EXTENSIONS if self._overhead > MAX_CHUNK_EXTENSION_BYTES else None
        return LONG_HEAD if self._overhead > MAX_HEAD_BYTES else None

    def _refuse(self, refusal: Refusal) -> None:
        """Answer that the request is refused, if nothing was answered yet, and hang up."""
        self._refusal = refusal
        self._stop_head_timer()
        answered = self._answered if self._answered and not self._is_answered else None
        is_own_body = self._is_in_body and self.cycle is answered
        is_answered_already = bool(answered and answered.response_started)
        headers = Headers(raw=self.headers)
        request_id = new_request_id(headers.get("x-request-id"))
        if answered and is_own_body:
            request_id = notes_of(answered).get("request_id", request_id)
            notes_of(answered)["is_refused"] = True
        if not (is_own_body and is_answered_already):
            refusal.log(request_id, self._client)
        if self.pipeline or is_answered_already:
            self.transport.close()
            return
        self._disconnect()
        self.flow.resume_reading()
        added = [("x-request-id", request_id), *self._cors.headers(headers.get("origin"))]
        self.transport.write(refusal.response(added))
        self.transport.write_eof()
        self.loop.call_later(GOODBYE_SECONDS, self.transport.abort)

    @property
    def _is_answered(self) -> bool:
        """Whether no request is being answered."""
        return self._answered is None or self._answered.response_complete

    def _disconnect(self) -> None:
        """Report to the application, if it is answering a request, that the client is gone."""
        if self._answered and not self._is_answered:
            self._answered.disconnected = True
            self._answered.waiting_for_100_continue = False
            self._answered.message_event.set()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._on_head_deadline)

    def _stop_head_timer(self) -> None:
        if self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_head_deadline(self) -> None:
        self._head_timer = None
        if self.standing > Standing.SENDING_HEAD:
            return  # The head of a later request can wait until this one is answered.
        if self._overhead:
            self._refuse(SLOW_HEAD)
        else:
            self.transport.close()


def notes_of(cycle: RequestResponseCycle) -> dict[str, Any]:
    """Return the scope of a request, in which connection and application leave notes.

    `request_id` and `is_streamed` are the application's. The connection notes whether the client
    `has_ended` its side, why it `gave_up`, and whether the request `is_refused` and logged.
    """
    return cast(dict[str, Any], cycle.scope)


def without_chunks(cycle: RequestResponseCycle, send: ASGISendCallable) -> ASGISendCallable:
    """Return what sends a response to a client of HTTP/1.0, which does not know chunks.

    A body of unknown length ends with the connection, which is never kept for such a client.
    """
    has_length = False

    async def send_plainly(message: ASGISendEvent) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name == b"content-length" for name, _ in message["headers"])
            cycle.chunked_encoding = None if has_length else False
        elif message["type"] == "http.response.body" and not has_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_plainly
