"""Sends requests at their recorded pace, or as fast as they are answered.

What became of each request is reported when it is known, so that an interrupt loses nothing.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from common.recording import BadRecording, Exchange
from services.commands.replay.outcome import Outcome, Replayed

Send = Callable[[Exchange], Awaitable[Outcome | None]]
"""Sends a request and returns what became of it; None if it cannot be sent."""
OnDone = Callable[[Replayed], None]


async def send_at_pace(
    exchanges: Sequence[Exchange], send: Send, speed: float, on_done: OnDone
) -> None:
    """Send each request when it is due, however many are in flight.

    A recorded second takes 1/`speed` seconds.
    """
    began = time.monotonic()

    async def send_when_due(exchange: Exchange) -> None:
        due = began + exchange.arrival / speed
        await asyncio.sleep(due - time.monotonic())
        lag = max(0.0, time.monotonic() - due)
        replayed = await replay(exchange, send)
        if replayed.outcome:
            replayed.outcome.lag = lag
        on_done(replayed)

    await asyncio.gather(*map(send_when_due, exchanges))


async def send_at_once(
    exchanges: Sequence[Exchange], send: Send, concurrency: int, on_done: OnDone
) -> None:
    """Send the requests in their order, this number at a time."""
    waiting = iter(exchanges)

    async def work() -> None:
        for exchange in waiting:
            on_done(await replay(exchange, send))

    await asyncio.gather(*(work() for _ in range(concurrency)))


async def replay(exchange: Exchange, send: Send) -> Replayed:
    try:
        return Replayed(exchange, await send(exchange))
    except BadRecording as error:
        return Replayed(exchange, Outcome(error=str(error)))
