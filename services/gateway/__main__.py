"""The gateway serves the OpenAI HTTP API and the gRPC API.

It admits requests, enforces their deadlines, and owns every request until its end.
"""

import asyncio
from collections import deque

from common.address import host_port
from common.events import Event
from common.health import serve_health
from common.hello import hello
from common.links import Links
from common.logs import get_logger
from common.member import CONNECTABLE
from common.membership import DRAINING, READY, STARTING, Membership, new_member_id
from common.messages import GatewayInbound, Peer
from common.metric_aliases import serve_aliases
from common.process import Stop, run
from common.progress import Progress
from common.settings import GatewaySettings
from common.tracing import open_tracing
from proto.twinlens.control.v1 import control_pb2
from services.gateway.core import GatewayCore
from services.gateway.metrics import MeasuredCore
from services.gateway.peers import CONNECTED_STAGES
from services.gateway.recorder import start_recorder
from services.gateway.servers import ApiServers, start_api_servers

GRACE_SECONDS = 2.0
"""How long requests in flight may take to end when the gateway must stop now."""
TICK_SECONDS = 0.5
"""Interval at which the asyncio loop proves that it makes progress."""


def main(settings: GatewaySettings, stop: Stop) -> None:
    asyncio.run(serve(settings, stop))


async def serve(settings: GatewaySettings, stop: Stop) -> None:
    await Gateway(settings).serve(stop)


class Gateway:
    """The gateway process: the core, its connections, its API servers and its membership."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.member = control_pb2.Member(
            id=new_member_id(settings.name or "gateway"), role="gateway", state=STARTING
        )
        self.tracing = open_tracing(settings.otlp_traces_endpoint, "gateway", self.member.id)
        self.core = GatewayCore(
            settings.served_model_name,
            settings.max_waiting,
            settings.request_timeout,
            tracing=self.tracing,
        )
        serve_aliases(self.core.metrics, settings)
        self.recorder = start_recorder(settings)
        observers = [self.recorder] if self.recorder else []
        self.measured_core = MeasuredCore(
            self.core, self.core.metrics, observers, tracing=self.tracing
        )
        self.progress = Progress()
        self.drain_requested = asyncio.Event()
        self.events: deque[Event[GatewayInbound]] = deque()
        """Events of the connections that the core has not seen yet."""
        self.links = Links(
            hello(self.member.id, "gateway"), "", "", self.events.append, self.progress
        )
        self.core.links = self.links
        self.loop.add_reader(self.links.fileno(), self.receive)

    async def serve(self, stop: Stop) -> None:
        """Serve until `stop` is set or the gateway has drained."""
        self.serve_health()
        ticking = asyncio.create_task(self.keep_ticking())
        async with start_api_servers(self.settings, self.measured_core, self.core) as servers:
            self.membership = self.join(stop)
            self.log_addresses()
            stop.on_drain(self.request_drain)
            stopping = asyncio.create_task(asyncio.to_thread(stop.wait))
            draining = asyncio.create_task(self.drain_when_requested(servers))
            await asyncio.wait({stopping, draining}, return_when=asyncio.FIRST_COMPLETED)
            if not draining.done():
                draining.cancel()
                await self.core.stop(GRACE_SECONDS)
        stop.set()  # ends the thread that waits for it
        ticking.cancel()
        self.membership.leave()
        self.loop.remove_reader(self.links.fileno())
        self.links.close()
        if self.recorder:
            self.recorder.close()
        self.tracing.close()

    def serve_health(self) -> None:
        serve_health(
            self.settings.health_port,
            self.member,
            self.core.load,
            self.progress.is_hung,
            self.core.metrics.registry,
        )

    def join(self, stop: Stop) -> Membership:
        return Membership(
            self.settings.controller,
            self.member,
            self.core.load,
            on_members=self.on_members,
            on_drain=stop.drain,
            is_hung=self.progress.is_hung,
            expected_delay=self.core.expected_delay,
        )

    def log_addresses(self) -> None:
        http_address = host_port(self.settings.host, self.settings.http_port)
        grpc_address = host_port(self.settings.host, self.settings.grpc_port)
        get_logger().info(
            "listening", http=f"http://{http_address}", grpc=grpc_address, id=self.member.id
        )

    async def drain_when_requested(self, servers: ApiServers) -> None:
        """Drain the gateway once that is requested.

        The gateway reports at once that it is not ready. It keeps accepting requests for the drain
        delay, until load balancers have noticed. Then it finishes the requests in flight.
        """
        await self.drain_requested.wait()
        self.core.drain()
        self.membership.set_state(DRAINING)
        await asyncio.sleep(self.settings.drain_delay)
        await servers.drain(self.core.idle)

    async def keep_ticking(self) -> None:
        """Report the loop's progress for ever. A loop that does not get here in time is hung."""
        self.progress.begin()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.progress.tick()
            self.receive()  # keeps the I/O thread from receiving in place of this loop

    def receive(self) -> None:
        """Take the new events from the connections and pass them to the core."""
        self.links.wait(0.0)
        while self.events:
            self.loop.call_soon(self.handle_event, self.events.popleft())

    def handle_event(self, event: Event[GatewayInbound]) -> None:
        self.core.on_event(event)
        self.report_state()
        self.progress.tick()

    def handle_members(self, members: list[control_pb2.Member]) -> None:
        self.core.on_members(members)
        self.report_state()

    def report_state(self) -> None:
        """Report a change of readiness to the controller.

        The gateway is ready while it can answer requests, so its state depends on its peers.
        """
        missing = self.core.unready_reason()
        state = DRAINING if self.core.is_draining else STARTING if missing else READY
        if (state, missing) != (self.member.state, self.member.detail):
            self.membership.set_state(state, missing)

    # Called by other threads

    def request_drain(self) -> None:
        self.loop.call_soon_threadsafe(self.drain_requested.set)

    def on_members(self, members: list[control_pb2.Member]) -> None:
        peers = [
            (Peer(m.id, m.address), m.role)
            for m in members
            if m.role in CONNECTED_STAGES and m.rank == 0 and m.state in CONNECTABLE
        ]
        self.links.keep_connected(peers)
        self.loop.call_soon_threadsafe(self.handle_members, members)


if __name__ == "__main__":
    run("gateway", __doc__ or "", main)
