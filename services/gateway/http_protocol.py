"""uvicorn's HTTP protocol, with bounds on all that a client sends besides bodies.

httptools bounds neither the size of a head, of trailers or of chunk extensions, nor the time that
they take.
"""

import asyncio
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from common.logs import get_logger
from services.gateway.connection_limits import ConnectionLimits, Standing
from services.gateway.limits import (
    HEAD_SECONDS,
    MAX_CHUNK_EXTENSION_BYTES,
    MAX_CHUNKS,
    MAX_HEAD_BYTES,
    MAX_PIPELINED,
)
from services.gateway.refusal import Refusal
from services.gateway.slow_readers import ReadDeadlineProtocol

READ_BUFFER = memoryview(bytearray(64 * 1024))
"""What is read from a connection at a time. All connections of a process share it, because each
read is handled before the next one."""
SLICE_BYTES = 4 * 1024
"""How much of a head or of a chunked body is parsed before its bounds are checked."""
CHUNK_LINE_BYTES = 16
"""What a chunk may take besides its data and extensions: its length and the ends of its lines."""
GOODBYE_SECONDS = 2.0
"""How long a refused client may go on sending before the connection is closed, so that it sees the
answer."""


MALFORMED = Refusal(HTTPStatus.BAD_REQUEST, "this is not a valid HTTP request")
LONG_HEAD = Refusal(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    f"the request line and headers, or the trailers, have more than {MAX_HEAD_BYTES} bytes",
)
LONG_EXTENSIONS = Refusal(
    HTTPStatus.BAD_REQUEST,
    f"the chunk extensions have more than {MAX_CHUNK_EXTENSION_BYTES} bytes",
)
MANY_CHUNKS = Refusal(
    HTTPStatus.BAD_REQUEST, f"the body has more than {MAX_CHUNKS} chunks; send larger ones"
)
MANY_PIPELINED = Refusal(
    HTTPStatus.BAD_REQUEST, f"more than {MAX_PIPELINED} requests wait on this connection"
)
SLOW_HEAD = Refusal(
    HTTPStatus.REQUEST_TIMEOUT, f"the headers were not complete after {HEAD_SECONDS:g} seconds"
)


class BoundedProtocol(ReadDeadlineProtocol, asyncio.BufferedProtocol):
    """One HTTP connection."""

    head_seconds = HEAD_SECONDS

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        loop: asyncio.AbstractEventLoop,
        limits: ConnectionLimits,
        client: str,
    ) -> None:
        super().__init__(config, server_state, {}, loop)
        self._limits = limits
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
        if self._answered is None or self._answered.response_complete:
            return Standing.SENDING_HEAD
        return Standing.SENDING_BODY if self._answered.more_body else Standing.WAITING

    def evict(self) -> None:
        self.transport.abort()

    # Called by uvicorn

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    # Called by the parser

    def on_headers_complete(self) -> None:
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
        self._num_chunks = 0
        self._is_new_part = True
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_body:  # Trailers are dropped.
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
        self._is_in_body = False
        self._is_new_part = True
        super().on_message_complete()

    # Bounds

    def _parse(self, piece: bytes) -> None:
        if not self._is_in_body and not self._head_timer:
            self._start_head_timer()
        self._explained = 0
        self._is_new_part = False
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            pass  # The request is answered without an upgrade.
        except httptools.HttpParserError:
            return self._refuse(self._refusal or MALFORMED)
        overhead = self._overhead + len(piece) - self._explained
        self._overhead = 0 if self._is_new_part else max(0, overhead)
        if refusal := self._exceeded():
            self._refuse(refusal)

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
        get_logger().warning("refused an HTTP request", client=self._client, reason=refusal.message)
        answered = self._answered
        if self.pipeline or (
            answered and answered.response_started and not answered.response_complete
        ):
            self.transport.close()
            return
        self._disconnect()
        self.flow.resume_reading()
        self.transport.write(refusal.response())
        self.transport.write_eof()
        self.loop.call_later(GOODBYE_SECONDS, self.transport.abort)

    def _disconnect(self) -> None:
        """Report to the application, if it is answering a request, that the client is gone."""
        if self._answered and not self._answered.response_complete:
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
