"""The front door: OpenAI HTTP and gRPC Generate; admission, deadlines; owns every request until its
end."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from common.address import host_port
from common.events import Event
from common.health import serve_health
from common.hello import hello
from common.links import Links
from common.logs import get_logger
from common.member import CONNECTABLE
from common.membership import DRAINING, READY, STARTING, Membership, new_member_id
from common.messages import GatewayInbound, Peer
from common.process import Stop, run
from common.progress import Progress
from common.settings import GatewaySettings
from proto.twinlens.control.v1 import control_pb2
from services.gateway.core import GatewayCore
from services.gateway.metrics import MeasuredCore
from services.gateway.peers import CONNECTED_STAGES
from services.gateway.servers import ApiServers, start_api_servers

GRACE_SECONDS = 2.0
"""For what is under way to end by itself when the gateway is to stop now."""
STAMP_SECONDS = 0.5


def main(settings: GatewaySettings, stop: Stop) -> None:
    asyncio.run(serve(settings, stop))


async def serve(settings: GatewaySettings, stop: Stop) -> None:
    await Gateway(settings).serve(settings, stop)


class Gateway:
    """The core with its connections and its place in the control plane."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.loop = asyncio.get_running_loop()
        self.core = GatewayCore(
            settings.served_model_name, settings.max_waiting, settings.request_timeout
        )
        self.member = control_pb2.Member(
            id=new_member_id(settings.name or "gateway"), role="gateway", state=STARTING
        )
        self.progress = Progress()
        self.draining = asyncio.Event()
        self.news: deque[Event[GatewayInbound]] = deque()
        self.core.links = self.links = Links(
            hello(self.member.id, "gateway"), "", "", self.news.append, self.progress
        )
        self.loop.add_reader(self.links.fileno(), self.receive)

    async def serve(self, settings: GatewaySettings, stop: Stop) -> None:
        core = self.core
        measured = MeasuredCore(self.core, self.core.metrics)
        serve_health(
            settings.health_port,
            self.member,
            core.load,
            self.progress.is_hung,
            measured.metrics.registry,
        )
        stamping = asyncio.create_task(self.stamp())
        async with start_api_servers(settings, measured) as doors:
            self.membership = Membership(
                settings.controller,
                self.member,
                core.load,
                on_members=self.on_members,
                on_drain=stop.drain,
                is_hung=self.progress.is_hung,
            )
            http, grpc_address = (
                host_port(settings.host, port) for port in (settings.http_port, settings.grpc_port)
            )
            get_logger().info(
                "listening", http=f"http://{http}", grpc=grpc_address, id=self.member.id
            )
            stop.on_drain(self.begin_drain)
            stopping = asyncio.create_task(asyncio.to_thread(stop.wait))
            drained = asyncio.create_task(self.drain(doors, settings))
            await asyncio.wait({stopping, drained}, return_when=asyncio.FIRST_COMPLETED)
            if not drained.done():
                drained.cancel()
                await core.stop(GRACE_SECONDS)
        stop.set()  # which its thread waits for
        stamping.cancel()
        self.membership.leave()
        self.loop.remove_reader(self.links.fileno())
        self.links.close()

    async def drain(self, doors: ApiServers, settings: GatewaySettings) -> None:
        """Once asked to: unready at once, but open until everyone who looks has seen it; then what
        is under way is finished."""
        await self.draining.wait()
        self.core.drain()
        self.membership.set_state(DRAINING)
        await asyncio.sleep(settings.drain_delay)
        await doors.drain(self.core.idle)

    async def stamp(self) -> None:
        """The loop is never idle for long, so it is hung when it does not come here."""
        self.progress.begin()
        while True:
            await asyncio.sleep(STAMP_SECONDS)
            self.progress.tick()
            self.receive()  # so that the I/O thread leaves it to us

    def receive(self) -> None:
        self.links.wait(0.0)
        while self.news:
            self.loop.call_soon(self.take, self.core.on_event, self.news.popleft())

    # Called by other threads

    def begin_drain(self) -> None:
        self.loop.call_soon_threadsafe(self.draining.set)

    def on_members(self, members: list[control_pb2.Member]) -> None:
        offered = [
            (Peer(m.id, m.address), m.role)
            for m in members
            if m.role in CONNECTED_STAGES and m.rank == 0 and m.state in CONNECTABLE
        ]
        self.links.keep_connected(offered)
        self.loop.call_soon_threadsafe(self.take, self.core.on_members, members)

    def take(self, hearer: Callable[[Any], None], news: Any) -> None:
        """What changes who is there may change whether an answer can be given, which is what ready
        means here."""
        hearer(news)
        missing = self.core.unready_reason()
        state = DRAINING if self.core.is_draining else STARTING if missing else READY
        if (state, missing) != (self.member.state, self.member.detail):
            self.membership.set_state(state, missing)


if __name__ == "__main__":
    run("gateway", __doc__ or "", main)
