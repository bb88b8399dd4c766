"""Snapshots of the pipeline: made for all watchers together, and only if there are any."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack

import pytest

from common.errors import Exhausted, Unavailable
from services.gateway.ui import feed as feeds
from services.gateway.ui.feed import MAX_WATCHERS, MAX_WATCHERS_OF_A_CLIENT, Feed

FOREVER = 10_000.0


class Source:
    """What a feed describes: the number of its descriptions."""

    def __init__(self) -> None:
        self.count = 0
        self.changed = asyncio.Event()

    async def describe(self) -> bytes:
        self.count += 1
        return b"%d" % self.count


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def feed(source: Source, monkeypatch: pytest.MonkeyPatch) -> Feed:
    """A feed that makes a snapshot after changes alone."""
    monkeypatch.setattr(feeds, "MIN_INTERVAL_SECONDS", 0.0)
    return Feed(source.describe, source.changed, FOREVER)


async def test_all_watchers_get_the_same_snapshots(feed: Feed, source: Source) -> None:
    watchers = [feed.snapshots() for _ in range(3)]
    assert [await anext(watcher) for watcher in watchers] == [b"1"] * 3
    waiting = [asyncio.ensure_future(step(watcher)) for watcher in watchers]
    source.changed.set()
    assert await asyncio.gather(*waiting) == [b"2"] * 3
    assert source.count == 2


async def step(snapshots: AsyncIterator[bytes]) -> bytes:
    return await anext(snapshots)


async def test_a_slow_watcher_misses_snapshots(feed: Feed, source: Source) -> None:
    quick, slow = feed.snapshots(), feed.snapshots()
    assert await anext(slow) == b"1"
    for expected in (b"1", b"2", b"3"):
        assert await anext(quick) == expected
        source.changed.set()
    assert await anext(slow) == b"3"


async def test_a_snapshot_is_due_after_an_interval_without_a_change(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "MIN_INTERVAL_SECONDS", 0.0)
    feed = Feed(source.describe, source.changed, 0.001)
    snapshots = feed.snapshots()
    assert await anext(snapshots) != await anext(snapshots)


async def test_a_new_watcher_gets_no_old_snapshot(source: Source) -> None:
    now = 100.0
    feed = Feed(source.describe, source.changed, 1.0, lambda: now)
    assert await anext(feed.snapshots()) == b"1"
    assert await anext(feed.snapshots()) == b"1"
    now += 2.0
    assert await anext(feed.snapshots()) == b"2"


async def test_nothing_is_computed_while_nobody_watches(feed: Feed, source: Source) -> None:
    assert await anext(feed.snapshots()) == b"1"
    source.changed.set()
    await asyncio.sleep(0)
    assert source.count == 1


async def test_a_watcher_that_leaves_while_it_makes_a_snapshot_disturbs_nobody(
    feed: Feed, source: Source
) -> None:
    first, second = feed.snapshots(), feed.snapshots()
    await anext(first)
    await anext(second)
    making = asyncio.ensure_future(step(first))
    waiting = asyncio.ensure_future(step(second))
    await asyncio.sleep(0)
    making.cancel()
    source.changed.set()
    assert await waiting == b"2"


async def test_the_watchers_are_bounded(feed: Feed) -> None:
    num_clients = MAX_WATCHERS // MAX_WATCHERS_OF_A_CLIENT
    with ExitStack() as places:
        for _ in range(MAX_WATCHERS_OF_A_CLIENT):
            places.enter_context(feed.place_for("client 0"))
        with pytest.raises(Exhausted), feed.place_for("client 0"):
            pass
        for number in range(1, num_clients):
            for _ in range(MAX_WATCHERS_OF_A_CLIENT):
                places.enter_context(feed.place_for(f"client {number}"))
        with pytest.raises(Exhausted), feed.place_for("another client"):
            pass
    with feed.place_for("another client"):
        pass


async def test_a_closed_feed_ends_and_refuses(feed: Feed) -> None:
    snapshots = feed.snapshots()
    await anext(snapshots)
    waiting = asyncio.ensure_future(step(snapshots))
    await asyncio.sleep(0)
    feed.close()
    with pytest.raises(StopAsyncIteration):
        await waiting
    with pytest.raises(Unavailable), feed.place_for("late"):
        pass
