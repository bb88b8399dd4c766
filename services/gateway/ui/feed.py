"""Snapshots for all who watch, made once a second while anybody does."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager

from common.errors import Exhausted, Unavailable

INTERVAL_SECONDS = 1.0
MIN_INTERVAL_SECONDS = 0.1
"""The time between two snapshots, however many changes there are."""
MAX_WATCHERS = 64
MAX_WATCHERS_OF_A_CLIENT = 16


class Feed:
    """Lets many watch what one function returns.

    The watchers make the snapshots themselves. The first one that has seen the latest snapshot
    makes the next one, and the others wait for it. So nothing is computed while nobody watches, and
    a watcher that reads slowly misses snapshots in place of piling them up.
    """

    def __init__(
        self,
        describe: Callable[[], Awaitable[bytes]],
        changed: asyncio.Event,
        interval: float = INTERVAL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`describe` returns a snapshot. It is called every `interval` seconds, and soon after
        `changed` is set."""
        self._describe = describe
        self._changed = changed
        self._interval = interval
        self._clock = clock
        self._turn = asyncio.Lock()
        self._latest = b""
        self._number = 0
        """How many snapshots were made."""
        self._made_at = -interval
        self._watchers = Counter[str]()
        self._is_closed = False

    @property
    def num_watchers(self) -> int:
        return self._watchers.total()

    def close(self) -> None:
        """End all watching, and refuse more of it."""
        self._is_closed = True
        self._changed.set()

    @contextmanager
    def place_for(self, client: str) -> Iterator[None]:
        """Count a watcher inside the block.

        Raises
        ------
        Exhausted
            if too many watch already, in all or of this client.
        Unavailable
            if the feed is closed.
        """
        if self._is_closed:
            raise Unavailable("the gateway is stopping: try again", "gateway", retry_after=1.0)
        is_full = self.num_watchers >= MAX_WATCHERS
        if is_full or self._watchers[client] >= MAX_WATCHERS_OF_A_CLIENT:
            reason = "too many pages watch the pipeline: close some, or try again later"
            raise Exhausted(reason, "gateway", retry_after=10.0)
        self._watchers[client] += 1
        try:
            yield
        finally:
            self._watchers[client] -= 1
            if not self._watchers[client]:
                del self._watchers[client]

    async def snapshots(self) -> AsyncIterator[bytes]:
        """Yield the latest snapshot at once, and later ones as they are made, until the end."""
        seen = 0
        while snapshot := await self._later_than(seen):
            seen = self._number
            yield snapshot

    async def _later_than(self, seen: int) -> bytes:
        """Return a snapshot later than number `seen`; empty once the feed is closed."""
        if not self._has_later_than(seen):
            async with self._turn:
                if not self._has_later_than(seen):
                    await self._make_next()
        return b"" if self._is_closed else self._latest

    def _has_later_than(self, seen: int) -> bool:
        is_current = self._clock() - self._made_at < 2 * self._interval
        return self._is_closed or (self._number > seen and is_current)

    async def _make_next(self) -> None:
        """Make a snapshot when it is due, or soon after a change."""
        elapsed = self._clock() - self._made_at
        await asyncio.sleep(MIN_INTERVAL_SECONDS - elapsed)
        try:
            async with asyncio.timeout(self._interval - elapsed):
                await self._changed.wait()
        except TimeoutError:
            pass
        if self._is_closed:
            return
        self._changed.clear()
        self._latest = await self._describe()
        self._number += 1
        self._made_at = self._clock()
