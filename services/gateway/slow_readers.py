"""Cuts off HTTP clients that do not read their answers, so that what is kept for them is bounded.

uvicorn stops writing while bytes are unread. What is then kept for a client is one write and what
the kernel's socket buffer holds, because the transport asks for a pause as soon as a byte waits.
"""

import asyncio
import socket
import struct
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

READ_SECONDS = 30.0
"""How long a client may leave bytes unread before it is cut off."""
MIN_READ_BYTES = 16 * 1024
"""A client that reads this many bytes in READ_SECONDS, or all of them, is not cut off."""

LINGER_ZERO = struct.pack("ii", 1, 0)
"""Value of SO_LINGER with which closing a socket also drops what the kernel holds for it."""


class ReadDeadlineProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, with a deadline for clients that leave bytes unread."""

    read_seconds = READ_SECONDS
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_read_timer(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_read_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel_read_timer()

    def give_up(self, reason: str) -> None:
        """Note why the connection is closed."""

    def _start_read_timer(self, unread: int) -> None:
        self._read_timer = self.loop.call_later(self.read_seconds, self._check_progress, unread)

    def _check_progress(self, unread_before: int) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread_before - unread < MIN_READ_BYTES:
            self.give_up(f"the client left {unread} bytes of its answer unread")
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
            self.transport.abort()
        else:
            self._start_read_timer(unread)

    def _cancel_read_timer(self) -> None:
        if self._read_timer:
            self._read_timer.cancel()
            self._read_timer = None
