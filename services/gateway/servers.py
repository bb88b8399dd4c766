"""The HTTP and gRPC servers of the gateway, which are started, drained and closed together."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import grpc
import uvicorn
from starlette.applications import Starlette

from common.address import bound_socket, host_port
from common.grpc_server import max_connections
from common.membership import CHANNEL_OPTIONS
from common.process import CannotStart
from common.settings import GatewaySettings
from services.gateway.acceptor import Acceptor
from services.gateway.body_budget import BodyBudget
from services.gateway.connection_limits import ConnectionLimits, num_connections_allowed
from services.gateway.cors import Cors
from services.gateway.grpc_api import create_server
from services.gateway.grpc_connections import ConnectionShares
from services.gateway.http_protocol import BoundedProtocol
from services.gateway.limits import MAX_ADMITTED_IMAGE_BYTES
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from services.gateway.schema import MAX_TIMEOUT
from services.gateway.slow_readers import READ_SECONDS
from services.gateway.ui.endpoints import Ui, create_ui
from services.gateway.ui.pipeline import WatchedCore

CLOSE_SECONDS = 1.0
"""How long the last bytes of answers may take to leave when the servers close."""

BACKLOG = 2048
"""Connections that the kernel keeps until they are accepted. Beyond it a client tries again only
after a second."""


class HttpServer(uvicorn.Server):
    """uvicorn inside the gateway's asyncio loop; it leaves signals to the process.

    When it ends, it closes idle connections and waits for the others. The caller cancels it if that
    takes too long.
    """

    def __init__(
        self,
        app: Starlette,
        limits: ConnectionLimits | None = None,
        cors: Cors | None = None,
    ) -> None:
        # X-Forwarded-For is not believed, because a client could choose its address by it.
        config = uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
        )
        super().__init__(config)
        self._limits = limits or ConnectionLimits(num_connections_allowed())
        self._cors = cors or Cors()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, which uvicorn leaves to asyncio otherwise."""
        assert sockets
        await self.lifespan.startup()
        acceptors = [Acceptor(listener, self._limits, self._protocol) for listener in sockets]
        self.servers = acceptors  # type: ignore[assignment]  # uvicorn only closes them
        self.started = True

    def _protocol(self, client: str) -> BoundedProtocol:
        loop = asyncio.get_running_loop()
        return BoundedProtocol(
            self.config, self.server_state, loop, self._limits, self._cors, client
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ApiServers:
    """The running servers. `http_task` ends when the HTTP server has ended."""

    def __init__(
        self,
        http: HttpServer,
        http_task: asyncio.Task[None],
        grpc_server: grpc.aio.Server,
        ui: Ui | None = None,
    ) -> None:
        self._http = http
        self._http_task = http_task
        self._grpc_server = grpc_server
        self._ui = ui

    async def drain(self, idle: asyncio.Event) -> None:
        """Accept no more requests, and return once every request has been answered.

        Clients that do not read their answers are not waited for. `idle` is set while no request is
        in flight.
        """
        self._end_http()
        ending = {self._http_task, asyncio.create_task(self._grpc_server.stop(MAX_TIMEOUT))}
        while ending:
            await idle.wait()
            _, ending = await asyncio.wait(ending, timeout=READ_SECONDS)
            if idle.is_set():
                return

    async def close(self) -> None:
        """End both servers and the calls in flight."""
        self._end_http()
        stopping = asyncio.create_task(self._grpc_server.stop(CLOSE_SECONDS))
        await asyncio.wait({self._http_task, stopping}, timeout=CLOSE_SECONDS)
        self._http_task.cancel()
        await self._grpc_server.stop(None)

    def _end_http(self) -> None:
        """Accept no more connections, and end those that would stay open for ever."""
        self._http.should_exit = True
        if self._ui:
            self._ui.close()


@contextlib.asynccontextmanager
async def start_api_servers(
    settings: GatewaySettings, core: MeasuredCore, watched: WatchedCore | None = None
) -> AsyncIterator[ApiServers]:
    """Serve HTTP and gRPC on their ports until the block is left.

    `watched` is the core that the page shows. If it is None, the page is not served.

    Raises
    ------
    CannotStart
        if one of the ports cannot be opened.
    """
    async with grpc.aio.insecure_channel(settings.controller, CHANNEL_OPTIONS) as channel:
        max_body_bytes = settings.max_body_mib << 20
        budget = BodyBudget(max(settings.max_held_body_mib << 20, 2 * max_body_bytes))
        admitted_images = BodyBudget(MAX_ADMITTED_IMAGE_BYTES)
        grpc_server = create_server(core, channel, max_body_bytes, budget, admitted_images)
        grpc_port = add_port(grpc_server, host_port(settings.host, settings.grpc_port))
        listener = listen(settings.host, settings.http_port)
        await grpc_server.start()
        limits = ConnectionLimits(
            num_connections_allowed(settings.max_connections), settings.max_connections_per_client
        )
        ui = create_ui(watched, channel) if watched and settings.ui else None
        cors = Cors(settings.cors_origins)
        app = create_app(core, max_body_bytes, budget, admitted_images, ui, cors)
        http = HttpServer(app, limits, cors)
        servers = ApiServers(http, asyncio.create_task(http.serve([listener])), grpc_server, ui)
        shares = ConnectionShares(grpc_port, max_connections())
        keeping_shares = asyncio.create_task(shares.keep())
        try:
            yield servers
        finally:
            keeping_shares.cancel()
            await servers.close()


def add_port(grpc_server: grpc.aio.Server, address: str) -> int:
    """Open the port and return it, or raise CannotStart."""
    try:
        return grpc_server.add_insecure_port(address)
    except RuntimeError as e:
        raise CannotStart(
            f"cannot listen on {address}: free the port, or set another --grpc-port"
        ) from e


def listen(host: str, port: int) -> socket.socket:
    try:
        listener = bound_socket(host, port)
        # Listening before serving means that no client is refused once the port is known.
        listener.listen(BACKLOG)
        return listener
    except OSError as e:
        raise CannotStart(
            f"cannot listen on {host_port(host, port)} ({e.strerror}): free the port, or set "
            "another --http-port"
        ) from e
