"""The two ports: opened together, drained together, closed together."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import grpc
import uvicorn
from starlette.applications import Starlette

from common.address import bound_socket, host_port
from common.process import CannotStart
from common.settings import GatewaySettings
from services.gateway.grpc_api import create_server
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from services.gateway.schema import MAX_TIMEOUT
from services.gateway.slow_readers import READ_SECONDS, ReadersWatched

CLOSE_SECONDS = 1.0
"""For the last bytes of answers to leave."""


class Http(uvicorn.Server):
    """uvicorn inside our loop: the process's signals are not its business. It closes idle
    connections at its end, waits for the others, and is cancelled where that takes too long."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(
            uvicorn.Config(
                app, http=ReadersWatched, lifespan="off", log_config=None, access_log=False
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ApiServers:
    def __init__(self, http: Http, serving: asyncio.Task[None], server: grpc.aio.Server) -> None:
        self._http = http
        self._serving = serving
        self._server = server

    async def drain(self, idle: asyncio.Event) -> None:
        """Nobody new comes in; returns when everybody has been answered, but for who does not read
        his answer. `idle` is set while no request is under way."""
        self._http.should_exit = True
        leaving = {self._serving, asyncio.create_task(self._server.stop(MAX_TIMEOUT))}
        while leaving:
            await idle.wait()
            _, leaving = await asyncio.wait(leaving, timeout=READ_SECONDS)
            if idle.is_set():
                return

    async def close(self) -> None:
        self._http.should_exit = True
        await asyncio.wait(
            {self._serving, asyncio.create_task(self._server.stop(CLOSE_SECONDS))},
            timeout=CLOSE_SECONDS,
        )
        self._serving.cancel()
        await self._server.stop(None)


@contextlib.asynccontextmanager
async def start_api_servers(
    settings: GatewaySettings, core: MeasuredCore
) -> AsyncIterator[ApiServers]:
    """Listens on both ports until the block is left.

    Raises
    ------
    CannotStart
        where a port cannot be had.
    """
    async with grpc.aio.insecure_channel(settings.controller) as channel:
        max_body_bytes = settings.max_body_mib << 20
        server = create_server(core, channel, max_body_bytes)
        address = host_port(settings.host, settings.grpc_port)
        try:
            assert server.add_insecure_port(address)
        except RuntimeError as e:
            raise CannotStart(
                f"cannot listen on {address}: free it, or give another --grpc-port"
            ) from e
        listener = listen(settings.host, settings.http_port)
        await server.start()
        http = Http(create_app(core, max_body_bytes))
        doors = ApiServers(http, asyncio.create_task(http.serve([listener])), server)
        try:
            yield doors
        finally:
            await doors.close()


def listen(host: str, port: int) -> socket.socket:
    try:
        listener = bound_socket(host, port)
        listener.listen()  # before it is served, so that nobody who knows of the door is refused
        return listener
    except OSError as e:
        raise CannotStart(
            f"cannot listen on {host_port(host, port)} ({e.strerror}): free it, or give another "
            "--http-port"
        ) from e
