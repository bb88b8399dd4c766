"""Sends the requests of a recording to a server, each over the API that it needs."""

import argparse
import math
from contextlib import AsyncExitStack

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common.recording import Exchange, Recording
from services.commands.chat_client import choose_model
from services.commands.client import ClientError
from services.commands.replay.bodies import needs_grpc
from services.commands.replay.grpc_sender import GrpcSender
from services.commands.replay.http_sender import HttpSender
from services.commands.replay.outcome import Outcome, Replayed
from services.commands.replay.pace import send_at_once, send_at_pace


async def send_all(
    recording: Recording, arguments: argparse.Namespace, replayed: list[Replayed]
) -> None:
    """Send the requests as the flags say, and add what became of each to `replayed`.

    Raises
    ------
    ClientError
        if the server does not answer, or if no request can be sent.
    """
    exchanges = recording.exchanges
    over_grpc = [exchange for exchange in exchanges if needs_grpc(exchange.asked)]
    if len(over_grpc) == len(exchanges) and not arguments.grpc:
        raise ClientError("every request needs gRPC: name its address with --grpc HOST:PORT")
    async with AsyncExitStack() as stack:
        http = grpc = None
        if len(over_grpc) < len(exchanges):
            http = HttpSender(arguments.url)
            await stack.enter_async_context(http)
            http.use(await choose_model(http, arguments.model), recording.read_file)
        if arguments.grpc:
            grpc = await stack.enter_async_context(GrpcSender(arguments.grpc, recording.read_file))

        async def send(exchange: Exchange) -> Outcome | None:
            sender = grpc if needs_grpc(exchange.asked) else http
            return await sender.send(exchange) if sender else None

        with make_progress() as progress:
            task = progress.add_task("replaying", total=len(exchanges))

            def on_done(one: Replayed) -> None:
                replayed.append(one)
                progress.advance(task)

            if math.isinf(arguments.speed):
                await send_at_once(exchanges, send, arguments.concurrency, on_done)
            else:
                await send_at_pace(exchanges, send, arguments.speed, on_done)


def make_progress() -> Progress:
    """Return the display of progress, on stderr and on a terminal only."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
