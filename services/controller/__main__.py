"""The control plane: membership, health, stats. Soft state: it may go and come back, and members
join again."""

import asyncio
import contextlib
import os
import socket
import threading

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from common.health import serve_health
from common.logs import get_logger
from common.membership import READY, new_member_id
from common.process import CannotStart, run
from common.progress import Progress
from common.settings import ControllerSettings
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services.controller.service import ControlServicer

STOP_SECONDS = 1.0
PULSE_SECONDS = 1.0


def main(settings: ControllerSettings, stop: threading.Event) -> None:
    asyncio.run(serve(settings, stop))


async def serve(settings: ControllerSettings, stop: threading.Event) -> None:
    member = control_pb2.Member(
        id=new_member_id(settings.name or "controller"), role="controller", state=READY
    )
    member.pid = os.getpid()
    member.host = socket.gethostname()
    servicer = ControlServicer(member)
    # Else a second controller would share the port, and the members, with the first.
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    try:
        server.add_insecure_port(settings.control_listen)
    except RuntimeError as e:
        raise CannotStart(f"cannot listen on {settings.control_listen}: is the port taken?") from e
    await server.start()
    await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    progress = Progress()
    health_port = serve_health(
        settings.health_port, member, lambda: (0, 0), progress.is_hung, watch=progress.watch
    )
    get_logger().info("listening", grpc=settings.control_listen, id=member.id)
    tasks = [asyncio.create_task(servicer.expire_leases()), asyncio.create_task(pulse(progress))]
    await asyncio.to_thread(stop.wait)
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    if health_port:
        health_port.close()
    await server.stop(STOP_SECONDS)


async def pulse(progress: Progress) -> None:
    """This loop's signs of life."""
    progress.begin()
    while True:
        progress.tick()
        await asyncio.sleep(PULSE_SECONDS)


if __name__ == "__main__":
    run("controller", __doc__ or "", main)
