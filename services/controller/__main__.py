"""The controller is the control plane: membership, health, scaling and statistics.

Its state is soft: it may stop and come back, and members then join again.
"""

import asyncio
import contextlib
import os
import socket
import threading

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

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
    servicer = ControlServicer(member)
    server = await start_server(servicer, settings.control_listen)
    progress = Progress()
    health_port = serve_health(
        settings.health_port, member, lambda: (0, 0), progress.is_hung, watch=progress.watch
    )
    get_logger().info("listening", grpc=settings.control_listen, id=member.id)
    tasks = [
        asyncio.create_task(servicer.expire_leases()),
        asyncio.create_task(keep_ticking(progress)),
    ]
    await asyncio.to_thread(stop.wait)
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
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
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, services)
    try:
        server.add_insecure_port(address)
    except RuntimeError as e:
        raise CannotStart(
            f"cannot listen on {address}: the port may be taken; free it, or set another "
            "--control-listen"
        ) from e
    await server.start()
    await health_servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    return server


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
