"""Work off the event loop, one piece at a time, for which clients take turns."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Turns:
    """A thread that runs one function at a time.

    A client that waits for many functions delays another client by one of them at most.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._is_busy = False
        self._waiting = dict[str, deque[asyncio.Future[None]]]()
        """The callers that wait, by client, in the order of the clients' turns."""

    async def run(self, client: str, function: Callable[[], T]) -> T:
        """Return what the function returns, which runs on the thread when it is the client's turn.

        It still runs to its end if the caller is cancelled meanwhile.
        """
        await self._wait_for_turn(client)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, function)
        finally:
            self._pass_turn()

    async def _wait_for_turn(self, client: str) -> None:
        if not self._is_busy:
            self._is_busy = True
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._pass_turn()
            raise

    def _pass_turn(self) -> None:
        while self._waiting:
            client = next(iter(self._waiting))
            turns = self._waiting.pop(client)
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns
            if not turn.done():
                turn.set_result(None)
                return
        self._is_busy = False
