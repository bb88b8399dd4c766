"""Accepts HTTP connections within their limits."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from http import HTTPStatus

from common.logs import get_logger
from services.gateway.body_budget import client_of
from services.gateway.connection_limits import ConnectionLimits
from services.gateway.refusal import Refusal

ACCEPTED_AT_ONCE = 32
"""Connections that are accepted before the event loop turns to other things."""
REST_SECONDS = 0.5
"""How long no connection is accepted after one could not be."""

TOO_MANY = Refusal(
    HTTPStatus.TOO_MANY_REQUESTS, "too many connections: close some, or try again later"
)


class Acceptor:
    """A listening socket whose connections are served on the event loop.

    asyncio's own server logs a line for each connection that it cannot accept while descriptors
    are used up, and tries again without a pause.
    """

    def __init__(
        self,
        listener: socket.socket,
        limits: ConnectionLimits,
        make_protocol: Callable[[str], asyncio.BaseProtocol],
    ) -> None:
        """Begin to accept. `make_protocol` is called with the client of a connection."""
        self._listener = listener
        self._limits = limits
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._connecting = set[asyncio.Task[object]]()
        self._rest: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._start()

    def close(self) -> None:
        """Accept no more. The listening socket stays open."""
        if self._rest:
            self._rest.cancel()
        self._loop.remove_reader(self._listener)

    async def wait_closed(self) -> None:
        """Wait until the connections that were accepted last are served."""
        if self._connecting:
            await asyncio.wait(self._connecting)

    def _start(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                connection, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                get_logger().warning("cannot accept connections", reason=error.strerror)
                self._loop.remove_reader(self._listener)
                self._rest = self._loop.call_later(REST_SECONDS, self._start)
                return
            client = client_of(address[0]) if isinstance(address, tuple) else ""
            if self._limits.make_room(client):
                self._serve(connection, client)
            else:
                get_logger().warning(
                    "refused a connection",
                    client=client,
                    status=TOO_MANY.status.value,
                    reason=TOO_MANY.message,
                )
                refuse(connection)

    def _serve(self, connection: socket.socket, client: str) -> None:
        connection.setblocking(False)
        # Otherwise the body of an answer waits until the client acknowledges the head.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        protocol = self._make_protocol(client)
        task: asyncio.Task[object] = self._loop.create_task(
            self._loop.connect_accepted_socket(lambda: protocol, connection)
        )
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)


def refuse(connection: socket.socket) -> None:
    """Close a connection, and say why as far as the client still reads."""
    with connection, contextlib.suppress(OSError):
        connection.setblocking(False)
        connection.send(TOO_MANY.response())
        connection.shutdown(socket.SHUT_WR)
