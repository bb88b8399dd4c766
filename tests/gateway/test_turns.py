"""Clients take turns on the thread that does work off the event loop."""

import asyncio
import threading

import pytest

from services.gateway.turns import Turns


async def test_a_client_with_much_to_do_delays_another_by_one_piece_of_work() -> None:
    turns = Turns("test")
    begin = threading.Event()
    done = list[str]()

    def work(name: str) -> None:
        assert begin.wait(10)
        done.append(name)

    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        for n in range(5):
            tasks.create_task(turns.run("greedy", lambda n=n: work(f"greedy {n}")))
        await asyncio.sleep(0)
        tasks.create_task(turns.run("modest", lambda: work("modest")))
        await asyncio.sleep(0)
        begin.set()
    assert done.index("modest") <= 2 and len(done) == 6


async def test_who_leaves_passes_the_turn_on() -> None:
    turns = Turns("test")
    begin = threading.Event()
    first = asyncio.create_task(turns.run("a", lambda: begin.wait(10)))
    await asyncio.sleep(0)
    others = [asyncio.create_task(turns.run("b", threading.get_ident)) for _ in range(3)]
    await asyncio.sleep(0)
    for left in others[:2]:
        left.cancel()
    begin.set()
    async with asyncio.timeout(10):
        assert await first and await others[2] != threading.get_ident()
        for left in others[:2]:
            with pytest.raises(asyncio.CancelledError):
                await left
        assert await turns.run("c", lambda: 3) == 3
