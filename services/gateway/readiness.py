"""Health checks of the gRPC API."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import Exhausted, NotFound, shorten
from common.grpc_server import Context
from services.gateway.fair_share import FairShare
from services.gateway.generation import Core
from services.gateway.grpc_reads import client_name

POLL_SECONDS = 0.5
"""How often readiness is checked for the clients that watch it."""
MAX_WATCHES = 1000
MAX_WATCHES_PER_CONNECTION = 50
"""Half of the streams of a connection, so that checks and requests always find one."""


class ReadinessServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Reports whether requests can be answered at present, which each call checks again.

    The service "liveness" is SERVING while the process answers. `names` are the services for which
    readiness is reported.
    """

    def __init__(self, core: Core, names: tuple[str, ...]) -> None:
        self.core = core
        self.names = names
        self.watches = Watches(core.unready_reason)

    def status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service == "liveness":
            return health_pb2.HealthCheckResponse.SERVING
        if service not in self.names:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if self.core.unready_reason():
            return health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse.SERVING

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        status = self.status(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            raise NotFound(f"no service {shorten(request.service)!r} here")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        reported = None
        with self.watches.opened(context.peer()):
            while True:
                changed = self.watches.changed
                status = self.status(request.service)
                if status != reported:
                    await context.write(health_pb2.HealthCheckResponse(status=status))
                reported = status
                await changed.wait()


class Watches:
    """The open watches. One timer checks for all of them whether readiness has changed."""

    def __init__(self, unready_reason: Callable[[], str]) -> None:
        self.changed = asyncio.Event()
        """Set once readiness has changed. Then another event takes its place."""
        self._is_ready = lambda: not unready_reason()
        self._was_ready = False
        self._share = FairShare(MAX_WATCHES, "too many health watches: end some, or use Check")
        self._per_connection = Counter[str]()
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def opened(self, peer: str) -> Iterator[None]:
        """Count a watch of this peer while the block runs.

        Raises
        ------
        Exhausted
            if there are too many.
        """
        if self._per_connection[peer] >= MAX_WATCHES_PER_CONNECTION:
            raise Exhausted("too many health watches on one connection: end some", "gateway")
        client = client_name(peer)
        self._share.take(client)
        self._per_connection[peer] += 1
        if self._timer is None:
            self._was_ready = self._is_ready()
            self._poll_later()
        try:
            yield
        finally:
            self._share.put_back(client)
            self._per_connection[peer] -= 1
            if not self._per_connection[peer]:
                del self._per_connection[peer]

    def _poll_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(POLL_SECONDS, self._poll)

    def _poll(self) -> None:
        self._timer = None
        if self._is_ready() != self._was_ready:
            self._was_ready = not self._was_ready
            self.changed.set()
            self.changed = asyncio.Event()
        if self._per_connection:
            self._poll_later()
