"""The front door: OpenAI HTTP and gRPC Generate; admission, deadlines; owns every request until its end."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import uvicorn
from starlette.applications import Starlette

from common.address import bound_socket, host_port
from common.links import Event, Links, hello
from common.logs import get_logger
from common.member import CONNECTABLE
from common.membership import READY, STARTING, Membership, new_member_id
from common.messages import Peer
from common.process import CannotStart, run
from common.settings import GatewaySettings
from proto.twinlens.control.v1 import control_pb2
from services.gateway.core import CONNECTED_STAGES, GatewayCore
from services.gateway.grpc_api import create_server
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app

# After SIGTERM: for what is in flight to end by itself, and for its last bytes to leave.
GRACE_SECONDS, CLOSE_SECONDS = 2.0, 1


def main(settings: GatewaySettings, stop: threading.Event) -> None:
    asyncio.run(serve(settings, stop))


async def serve(settings: GatewaySettings, stop: threading.Event) -> None:
    loop = asyncio.get_running_loop()
    core = GatewayCore(settings.served_model_name, settings.max_waiting, settings.request_timeout)
    member = control_pb2.Member(id=new_member_id(settings.name or "gateway"), role="gateway", state=STARTING)

    def hear(event: Event) -> None:
        loop.call_soon_threadsafe(take, core.hear, event)

    def take(hearer: Callable[[Any], None], news: Any) -> None:
        """What changes who is there may change whether an answer can be given, which is what ready means here."""
        hearer(news)
        missing = core.not_ready()
        state = STARTING if missing else READY
        if (state, missing) != (member.state, member.detail):
            membership.set_state(state, missing)

    def hear_members(members: list[control_pb2.Member]) -> None:
        offered = [
            (Peer(m.id, m.address), m.role) for m in members if m.role in CONNECTED_STAGES and m.rank == 0 and m.state in CONNECTABLE
        ]
        core.links.keep_connected(offered)
        loop.call_soon_threadsafe(take, core.hear_members, members)

    core.links = Links(hello(member.id, "gateway"), "", "", hear)
    doors = await open_doors(settings, MeasuredCore(core))
    membership = Membership(settings.controller, member, core.load, hear_members)
    http, grpc_address = (host_port(settings.host, port) for port in (settings.http_port, settings.grpc_port))
    get_logger().info("listening", http=f"http://{http}", grpc=grpc_address, id=member.id)
    await asyncio.to_thread(stop.wait)
    await core.stop(GRACE_SECONDS)
    await doors.aclose()
    membership.leave()
    core.links.close()


async def open_doors(settings: GatewaySettings, core: MeasuredCore) -> contextlib.AsyncExitStack:
    """Listens on both ports until the stack is closed."""
    doors = contextlib.AsyncExitStack()
    channel = await doors.enter_async_context(grpc.aio.insecure_channel(settings.controller))
    max_body_bytes = settings.max_body_mib << 20
    server = create_server(core, channel, max_body_bytes)
    address = host_port(settings.host, settings.grpc_port)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as e:
        raise CannotStart(f"cannot listen on {address}: free it, or give another --grpc-port") from e
    assert port
    await server.start()
    doors.push_async_callback(server.stop, CLOSE_SECONDS)
    http = Http(create_app(core, max_body_bytes))
    serving = asyncio.create_task(http.serve([listen(settings.host, settings.http_port)]))
    doors.push_async_callback(http.stop, serving)
    return doors


class Http(uvicorn.Server):
    """uvicorn inside our loop: the process's signals are not its business."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=CLOSE_SECONDS))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def stop(self, serving: asyncio.Task[None]) -> None:
        self.should_exit = True
        await serving


def listen(host: str, port: int) -> socket.socket:
    try:
        listener = bound_socket(host, port)
        listener.listen()  # before it is served, so that nobody who knows of the door is refused
        return listener
    except OSError as e:
        raise CannotStart(f"cannot listen on {host_port(host, port)} ({e.strerror}): free it, or give another --http-port") from e


if __name__ == "__main__":
    run("gateway", __doc__ or "", main)
