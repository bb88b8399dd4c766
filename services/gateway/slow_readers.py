"""Clients that do not read what they asked for are cut off, so that nothing is kept for them for
ever."""

import asyncio
import socket
import struct
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common.logs import get_logger

READ_SECONDS = 30.0
READ_BYTES = 16 * 1024
"""A client that leaves bytes waiting must take so many in READ_SECONDS, or all of them."""


RESET = struct.pack("ii", 1, 0)
"""Closing the socket drops what the kernel holds for it, too."""


class ReadersWatched(HttpToolsProtocol):
    """uvicorn's HTTP, which writes no more while bytes lie unread, and here ends a connection on
    which they lie too long.

    What is kept for a client is what the kernel takes and one write: the transport calls for a
    pause as soon as anything waits.
    """

    read_seconds = READ_SECONDS
    _watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_again(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel_watch()

    def _look_again(self, unread: int) -> None:
        self._watch = self.loop.call_later(self.read_seconds, self._look, unread)

    def _look(self, unread_before: int) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread_before - unread < READ_BYTES:
            get_logger().warning("cut off a client that does not read", unread=unread)
            self.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, RESET
            )
            self.transport.abort()
        else:
            self._look_again(unread)

    def _cancel_watch(self) -> None:
        if self._watch:
            self._watch.cancel()
            self._watch = None
