"""Chooses the vision replica of each item, and when the item is offered to it. Uses no socket.

An item waits here, not at a replica, until a replica grants it. So the replica that is free first
gets the oldest item that fits, whether the replica was there before, came back, or is new.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from common.buckets import bucket_of
from common.messages import ItemKey, VisionLoad
from services.preprocess.in_flight import MISSING_SECONDS, PendingItem
from services.preprocess.priority import enqueue
from services.preprocess.vision_replicas import (
    MAX_UNANSWERED,
    NUM_EARLIEST,
    VisionReplica,
    VisionReplicas,
    rank,
)

MAX_LOOKED_AT = 32
"""How many waiting items get a replica chosen at once."""
NEAR_FACTOR = 1.25
NEAR_SECONDS = 0.005
"""Replicas that are expected to finish within this factor and time of the first are equally good.
The item's content decides between them."""
FULL_FACTOR = 1.5
"""An item waits for a full replica if the replica is expected to finish sooner by this factor than
one with room."""
UNKNOWN_WAIT = 0.5
"""How long an item is expected to wait at a replica that others may have given work, in items."""
UNMEASURED_SECONDS_PER_PATCH = 1e-4
FAILED_SECONDS = 1.0
"""The time that each failure in a row adds to a replica's expected times. Otherwise a replica that
fails quickly would draw all items."""
MAX_FAILED = 10
REMEMBERED_ITEMS = 20_000


@dataclass(frozen=True, slots=True)
class Shortlist:
    """Replicas that may be good for items of one size, and the seconds until each would finish."""

    open: dict[VisionReplica, float]
    full: dict[VisionReplica, float]

    def without(self, vision_ids: set[str]) -> "Shortlist":
        """Return the replicas that are not among these, or all of them if none is left."""
        others = Shortlist(
            *(
                {r: cost for r, cost in costs.items() if r.id not in vision_ids}
                for costs in (self.open, self.full)
            )
        )
        return others if others.open or others.full else self


class VisionPool:
    """The vision replicas, and the items that wait for one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._replicas = VisionReplicas()
        self._waiting: OrderedDict[ItemKey, PendingItem] = OrderedDict()
        self._waiting_seconds = 0.0
        self._holders: OrderedDict[str, str] = OrderedDict()
        self._lost: dict[tuple[int, ...], float] = {}

    # Replicas

    def update_load(self, vision_id: str, load: VisionLoad) -> None:
        """Handle a replica's report, its first one or a later one."""
        replica = self._replicas.add(vision_id)
        replica.buckets = load.buckets
        replica.seconds = dict(zip(load.sizes, load.seconds, strict=False))
        replica.free_at = self._clock() + load.wait_seconds
        replica.is_shared = load.is_shared
        replica.is_idle = load.is_idle
        self._replicas.put(replica)

    def on_answer(
        self, vision_id: str, has_room: bool | None = None, wait_seconds: float | None = None
    ) -> None:
        """Handle the answer to an offer.

        If `has_room` is False, the replica takes no other item before it reports a vacancy.
        """
        if replica := self._replicas.get(vision_id):
            replica.unanswered = max(0, replica.unanswered - 1)
            self.update_replica(vision_id, has_room, wait_seconds)

    def update_replica(
        self, vision_id: str, has_room: bool | None = None, wait_seconds: float | None = None
    ) -> None:
        """Note whether a replica has room, and when it would begin another item.

        What is None has not changed.
        """
        if replica := self._replicas.get(vision_id):
            replica.has_room = replica.has_room if has_room is None else has_room
            if wait_seconds is not None:
                replica.free_at = self._clock() + wait_seconds
            self._replicas.put(replica)

    def on_item_end(self, vision_id: str, failed: bool) -> None:
        """Count an item that the replica has failed with, or reset the count after a success."""
        if replica := self._replicas.get(vision_id):
            replica.num_failed = min(replica.num_failed + 1, MAX_FAILED) if failed else 0
            self._replicas.put(replica)

    def drain(self, vision_id: str) -> None:
        """Offer nothing more to a replica."""
        if replica := self._replicas.get(vision_id):
            replica.is_draining = True
            self._lost[replica.buckets] = self._clock()
            self._replicas.put(replica)

    def remove_replica(self, vision_id: str) -> None:
        """Forget a dead replica."""
        if replica := self._replicas.remove(vision_id):
            self._lost[replica.buckets] = self._clock()

    @property
    def num_replicas(self) -> int:
        """The number of replicas that are not draining."""
        return self._replicas.num_usable

    @property
    def buckets(self) -> tuple[int, ...]:
        """The buckets of all replicas; none if a replica takes any item, or there is no replica."""
        found = [replica.buckets for replica in self._replicas.examples()]
        return tuple(sorted(set().union(*found))) if all(found) else ()

    # Items

    def add(self, item: PendingItem, first: bool = False) -> None:
        """Queue an item for a replica behind those that are as urgent.

        An item that has waited before goes `first` among them.
        """
        item.vision_id = ""
        item.is_accepted = False
        item.has_passed = False
        item.has_pixels = False
        item.expected_seconds = self._least_seconds(item.prepared.num_patches)
        self._waiting_seconds += item.expected_seconds
        enqueue(self._waiting, item.key, item, first)

    def remove(self, item: PendingItem) -> None:
        """Take an item out of the queue, if it is there."""
        if self._waiting.pop(item.key, None):
            self._waiting_seconds = (
                max(0.0, self._waiting_seconds - item.expected_seconds) if self._waiting else 0.0
            )

    @property
    def num_waiting(self) -> int:
        """The number of items in the queue."""
        return len(self._waiting)

    @property
    def queue_seconds(self) -> float:
        """The time that the queue adds before another item would begin.

        Any thread may read it.
        """
        return self._waiting_seconds / max(1, len(self._replicas))

    def remember(self, mm_hash: str, vision_id: str) -> None:
        """Note that the replica has an item's embeddings, or will have them."""
        self._holders[mm_hash] = vision_id
        self._holders.move_to_end(mm_hash)
        if len(self._holders) > REMEMBERED_ITEMS:
            self._holders.popitem(last=False)

    def forget(self, mm_hash: str) -> None:
        """Note that no replica is known to have an item's embeddings."""
        self._holders.pop(mm_hash, None)

    def hopeless_items(self) -> list[PendingItem]:
        """Return the items that no replica can run, if a fitting replica is gone for too long."""
        now = self._clock()
        hopeless = []
        for item in self._waiting.values():
            num_patches = item.prepared.num_patches
            if any(self._replicas.fitting(num_patches)):
                continue
            lost = [when for buckets, when in self._lost.items() if bucket_of(num_patches, buckets)]
            if now - max(lost, default=float("-inf")) > MISSING_SECONDS:
                hopeless.append(item)
        return hopeless

    def assign(self) -> list[PendingItem]:
        """Choose replicas for waiting items, and dequeue the items that can be offered now.

        Returns these items, with their `vision_id` set. Items are placed one after the other, each
        where it is expected to finish first. If that replica is full, the item keeps waiting for
        it, and the items behind it take its time into account.
        """
        now = self._clock()
        offers = []
        later: dict[str, float] = {}
        shortlists: dict[int, Shortlist | None] = {}
        for item in list(islice(self._waiting.values(), MAX_LOOKED_AT)):
            size = item.prepared.num_patches
            replica = self._holder(item)
            if replica is None:
                if size not in shortlists:
                    shortlists[size] = self._shortlist(size, later, now)
                shortlist = shortlists[size]
                if shortlist is None:
                    continue
                replica = self._first_to_finish(item, shortlist, now)
                if not replica.is_open:
                    later[replica.id] = later.get(replica.id, 0.0) + self._seconds(replica, size)
                    shortlist.full[replica] = self._cost(replica, size, later, now)
                    shortlists = {size: shortlist}  # the others do not know of this item
                    continue
            self._dequeue(item, replica, now)
            offers.append(item)
            shortlists = {}
        return offers

    def _dequeue(self, item: PendingItem, replica: VisionReplica, now: float) -> None:
        """Give an item to a replica, which will begin it after what it has already."""
        self.remove(item)
        item.vision_id = replica.id
        replica.unanswered += 1
        replica.is_idle = False
        replica.free_at = max(now, replica.free_at) + self._seconds(
            replica, item.prepared.num_patches
        )
        self._replicas.put(replica)

    def _holder(self, item: PendingItem) -> VisionReplica | None:
        """Return the replica that has the embeddings already. It needs no room for them."""
        replica = self._replicas.get(self._holders.get(item.prepared.mm_hash, ""))
        if (
            replica is None
            or replica.is_draining
            or replica.id in item.failed_at
            or replica.unanswered >= MAX_UNANSWERED
        ):
            return None
        return replica

    def _shortlist(
        self, num_patches: int, later: dict[str, float], now: float
    ) -> "Shortlist | None":
        """Return replicas for items of this size; None if none that can run them is open.

        `later` has the seconds of the items that wait for a full replica already.
        """
        fitting = list(self._replicas.fitting(num_patches))
        if not any(alike.num_open for alike in fitting):
            return None
        shortlist = Shortlist({}, {})
        for alike in fitting:
            for heap, costs in ((alike.open, shortlist.open), (alike.full, shortlist.full)):
                for replica in heap.first(NUM_EARLIEST):
                    costs[replica] = self._cost(replica, num_patches, later, now)
        return shortlist

    def _first_to_finish(
        self, item: PendingItem, shortlist: "Shortlist", now: float
    ) -> VisionReplica:
        """Return the replica that is expected to finish the item first.

        Among equally good ones it is one that is open, and the same for every preprocess, as far as
        possible.
        """
        size = item.prepared.num_patches
        mm_hash = item.prepared.mm_hash
        if item.failed_at:
            shortlist = shortlist.without(item.failed_at)
        open_seconds = min(shortlist.open.values(), default=math.inf)
        full_seconds = min(shortlist.full.values(), default=math.inf)
        limit = NEAR_FACTOR * min(open_seconds, full_seconds) + NEAR_SECONDS
        if open_seconds > limit:
            return min(shortlist.full, key=shortlist.full.__getitem__)
        near = [replica for replica, cost in shortlist.open.items() if cost <= limit]
        neighbours = [
            replica
            for replica in self._replicas.neighbours(mm_hash)
            if replica.is_open
            and replica.fits(size)
            and replica.id not in item.failed_at
            and self._cost(replica, size, {}, now) <= limit
        ]
        return max(neighbours or near, key=lambda replica: rank(mm_hash, replica.id))

    def _cost(
        self, replica: VisionReplica, num_patches: int, later: dict[str, float], now: float
    ) -> float:
        """Return the seconds until it is expected to finish an item of this size."""
        seconds = self._seconds(replica, num_patches) + FAILED_SECONDS * replica.num_failed
        least = UNKNOWN_WAIT * seconds if replica.may_be_busy else 0.0
        wait = max(least, replica.free_at - now) + later.get(replica.id, 0.0)
        return wait + seconds if replica.is_open else FULL_FACTOR * (max(wait, seconds) + seconds)

    def _seconds(self, replica: VisionReplica, num_patches: int) -> float:
        return replica.expected(num_patches) or self._least_seconds(num_patches)

    def _least_seconds(self, num_patches: int) -> float:
        """Return the seconds in the tower of the fastest replica, as far as measured."""
        measured: Iterable[float] = (
            alike.example.expected(num_patches) for alike in self._replicas.fitting(num_patches)
        )
        return min(
            (seconds for seconds in measured if seconds),
            default=UNMEASURED_SECONDS_PER_PATCH * num_patches,
        )
