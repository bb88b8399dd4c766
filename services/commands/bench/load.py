"""Sends requests to a server, at a fixed concurrency or at a rate."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.commands.bench.targets import Target
from services.commands.chat_client import Answer

REJECTED = 429
REJECTED_PAUSE_SECONDS = 1.0
"""A client that is refused waits this long if the server does not say how long."""


@dataclass
class Level:
    """One measurement: what was sent under the same conditions, and what came back.

    Exactly one of `concurrency` and `rate` is set.
    """

    concurrency: int
    rate: float
    """Requests a second."""
    seed: int = 0
    """Decides the times of sending; only at a rate."""
    answers: list[Answer] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    """By how many seconds each request was sent too late; only at a rate."""
    began: float = 0.0
    client_cpu_seconds: float = 0.0
    """The CPU time of this process while requests were in flight."""

    @property
    def name(self) -> str:
        return f"concurrency {self.concurrency}" if self.concurrency else f"{self.rate:g} req/s"

    @property
    def seconds(self) -> float:
        """The time from the first request until the last answer."""
        return max((a.began + a.seconds for a in self.answers), default=self.began) - self.began


Report = Callable[[Answer], None]


async def run_level(target: Target, prepared: Sequence[Any], level: Level, report: Report) -> None:
    """Send the prepared requests, and add their answers to the level as they come.

    `report` is called with each answer.
    """
    level.began = time.monotonic()
    cpu = time.process_time()
    try:
        if level.rate:
            await send_at_rate(target, prepared, level, report)
        else:
            await send_at_concurrency(target, prepared, level, report)
    finally:
        level.client_cpu_seconds = time.process_time() - cpu


async def send_at_concurrency(
    target: Target, prepared: Sequence[Any], level: Level, report: Report
) -> None:
    """Keep a fixed number of requests in flight: a closed loop."""
    waiting = deque(prepared)

    async def client() -> None:
        while waiting:
            answer = await target.send(waiting.popleft())
            level.answers.append(answer)
            report(answer)
            if answer.status == REJECTED and waiting:
                wait = answer.retry_after
                await asyncio.sleep(REJECTED_PAUSE_SECONDS if wait is None else wait)

    async with asyncio.TaskGroup() as clients:
        for _ in range(level.concurrency):
            clients.create_task(client())


async def send_at_rate(
    target: Target, prepared: Sequence[Any], level: Level, report: Report
) -> None:
    """Send at random times that do not depend on the answers: an open loop."""

    async def send(request: Any, planned: float) -> None:
        level.lags.append(time.monotonic() - planned)
        answer = await target.send(request)
        level.answers.append(answer)
        report(answer)

    planned = level.began
    gaps = poisson_gaps(level.rate, level.seed)
    async with asyncio.TaskGroup() as sending:
        for request in prepared:
            planned += next(gaps)
            await asyncio.sleep(max(0.0, planned - time.monotonic()))
            sending.create_task(send(request, planned))


def poisson_gaps(rate: float, seed: int) -> Iterator[float]:
    """Yield the seconds between arrivals that are independent and have this mean rate."""
    draw = random.Random(seed)
    while True:
        yield draw.expovariate(rate)
