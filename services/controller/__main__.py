"""The controller is the control plane: membership, health, scaling and statistics.

Its state is soft: it may stop and come back, and members then join again.
"""

import asyncio
import os
import secrets
import socket
import threading

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import NotFound, shorten
from common.grpc_server import Context, Server, Services, bounded, next_message
from common.health import serve_health
from common.logs import get_logger
from common.membership import READY, new_member_id
from common.process import CannotStart, run
from common.progress import Progress
from common.settings import ControllerSettings
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services.controller.service import ControlServicer

STOP_SECONDS = 1.0
"""How long calls in flight may take to end when the controller stops."""
MAX_MESSAGE_BYTES = 64 * 1024
"""The largest message to the controller."""
TICK_SECONDS = 1.0
"""Interval at which the asyncio loop proves that it makes progress."""


def main(settings: ControllerSettings, stop: threading.Event) -> None:
    asyncio.run(serve(settings, stop))


async def serve(settings: ControllerSettings, stop: threading.Event) -> None:
    """Serve until `stop` is set.

    Raises
    ------
    CannotStart
        if the port cannot be opened.
    """
    member = describe_controller(settings.name)
    # Without a key, no launcher may join: something else starts the members.
    servicer = ControlServicer(member, settings.launcher_key or secrets.token_hex())
    server = await start_server(servicer, settings.control_listen)
    progress = Progress()
    health_port = serve_health(
        settings.health_port,
        member,
        lambda: (0, 0),
        progress.is_hung,
        servicer.metrics.registry,
        progress.watch,
    )
    get_logger().info("listening", grpc=settings.control_listen, id=member.id)
    tasks = [
        asyncio.create_task(servicer.expire_leases()),
        asyncio.create_task(keep_ticking(progress)),
    ]
    stopping = asyncio.create_task(asyncio.to_thread(stop.wait))
    try:
        done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # raises: a controller that expires no leases must not go on
    finally:
        stop.set()  # ends the thread that waits for it
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if health_port:
            health_port.close()
        await server.stop(STOP_SECONDS)


def describe_controller(name: str) -> control_pb2.Member:
    """Return the controller as a member. It lists itself, and does not join."""
    return control_pb2.Member(
        id=new_member_id(name or "controller"),
        role="controller",
        state=READY,
        pid=os.getpid(),
        host=socket.gethostname(),
    )


async def start_server(servicer: ControlServicer, address: str) -> grpc.aio.Server:
    server = Server()
    services = Services(server, receive)
    control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, services)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), services)
    try:
        server.add_insecure_port(address)
    except RuntimeError as e:
        await server.stop(None)
        raise CannotStart(
            f"cannot listen on {address}: the port may be taken; free it, or set another "
            "--control-listen"
        ) from e
    await server.start()
    return server


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Reports that the controller answers. Nobody watches that, so there is no Watch."""

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        if request.service:
            raise NotFound(f"no service {shorten(request.service)!r} here")
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


async def receive(context: Context) -> bytes | None:
    """Return the next message of a call, however long it takes: a watcher sends only one."""
    return bounded(await next_message(context), MAX_MESSAGE_BYTES)


async def keep_ticking(progress: Progress) -> None:
    """Report the loop's progress for ever. A loop that does not get here in time is hung."""
    progress.begin()
    while True:
        progress.tick()
        await asyncio.sleep(TICK_SECONDS)


if __name__ == "__main__":
    run("controller", __doc__ or "", main)
