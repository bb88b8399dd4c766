"""Chooses the vision replica of each item, and when the item is offered to it. Uses no socket.

An item waits here, not at a replica, until a replica grants it. So the replica that is free first
gets the oldest item that fits, whether the replica was there before, came back, or is new.
"""

import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from common.buckets import bucket_of, expected_seconds
from common.messages import ItemKey, VisionLoad
from services.preprocess.in_flight import MISSING_SECONDS, PendingItem

MAX_UNANSWERED = 2
"""How many offers to one replica may be unanswered. A frozen replica delays at most these until its
lease ends."""
MAX_LOOKED_AT = 32
"""How many waiting items get a replica chosen at once."""
NEAR_FACTOR = 1.25
NEAR_SECONDS = 0.005
"""Replicas that are expected to finish within this factor and time of the first are equally good.
The item's content decides between them."""
FULL_FACTOR = 1.5
"""An item waits for a full replica if the replica is expected to finish sooner by this factor than
one with room."""
UNMEASURED_SECONDS_PER_PATCH = 1e-4
FAILED_SECONDS = 1.0
"""The time that each failure in a row adds to a replica's expected times. Otherwise a replica that
fails quickly would draw all items."""
MAX_FAILED = 10
REMEMBERED_ITEMS = 20_000


@dataclass(slots=True, eq=False)
class VisionReplica:
    """A replica that has reported what it can run."""

    id: str
    buckets: tuple[int, ...] = ()
    seconds: dict[int, float] = field(default_factory=dict)
    """The measured time of an item, by bucket."""
    free_at: float = 0.0
    """When it would begin another item, by its last report and what it was offered since."""
    has_room: bool = True
    unanswered: int = 0
    """The offers that it has not answered yet."""
    is_draining: bool = False
    num_failed: int = 0
    """The number of items in a row that it failed with."""

    def expected(self, num_patches: int) -> float:
        """Return the expected seconds in the tower; 0 if nothing was measured yet."""
        return expected_seconds(self.seconds, self.buckets, num_patches)

    def fits(self, num_patches: int) -> bool:
        """Whether it can run an item of this size."""
        return bucket_of(num_patches, self.buckets) > 0

    @property
    def is_open(self) -> bool:
        """Whether it may be offered another item now."""
        return self.has_room and self.unanswered < MAX_UNANSWERED


class VisionPool:
    """The vision replicas, and the items that wait for one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._replicas: dict[str, VisionReplica] = {}
        self._waiting: OrderedDict[ItemKey, PendingItem] = OrderedDict()
        self._waiting_seconds = 0.0
        self._holders: OrderedDict[str, str] = OrderedDict()
        self._lost: dict[tuple[int, ...], float] = {}

    # Replicas

    def update_load(self, vision_id: str, load: VisionLoad) -> None:
        """Handle a replica's report, its first one or a later one."""
        replica = self._replicas.setdefault(vision_id, VisionReplica(vision_id))
        replica.buckets = load.buckets
        replica.seconds = dict(zip(load.sizes, load.seconds, strict=False))
        replica.free_at = self._clock() + load.wait_seconds

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

    def on_item_end(self, vision_id: str, failed: bool) -> None:
        """Count an item that the replica has failed with, or reset the count after a success."""
        if replica := self._replicas.get(vision_id):
            replica.num_failed = min(replica.num_failed + 1, MAX_FAILED) if failed else 0

    def drain(self, vision_id: str) -> None:
        """Offer nothing more to a replica."""
        if replica := self._replicas.get(vision_id):
            replica.is_draining = True
            self._lost[replica.buckets] = self._clock()

    def remove_replica(self, vision_id: str) -> None:
        """Forget a dead replica."""
        if replica := self._replicas.pop(vision_id, None):
            self._lost[replica.buckets] = self._clock()

    @property
    def num_replicas(self) -> int:
        return len(self._usable())

    @property
    def buckets(self) -> tuple[int, ...]:
        """The buckets of all replicas; none if a replica takes any item, or there is no replica."""
        usable = self._usable()
        if not all(replica.buckets for replica in usable):
            return ()
        return tuple(sorted({bucket for replica in usable for bucket in replica.buckets}))

    def _usable(self) -> list[VisionReplica]:
        return [replica for replica in self._replicas.values() if not replica.is_draining]

    # Items

    def add(self, item: PendingItem, first: bool = False) -> None:
        """Queue an item for a replica. An item that has waited before goes `first`."""
        item.vision_id = ""
        item.is_accepted = False
        item.has_passed = False
        item.has_pixels = False
        item.expected_seconds = self._least_seconds(item.prepared.num_patches)
        self._waiting[item.key] = item
        self._waiting_seconds += item.expected_seconds
        if first:
            self._waiting.move_to_end(item.key, last=False)

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
        usable = self._usable()
        now = self._clock()
        hopeless = []
        for item in self._waiting.values():
            num_patches = item.prepared.num_patches
            if any(replica.fits(num_patches) for replica in usable):
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
        usable = self._usable()
        open_ids = {replica.id for replica in usable if replica.is_open}
        if not self._waiting or not usable:
            return []
        now = self._clock()
        offers = []
        free_at = {replica.id: max(now, replica.free_at) for replica in usable}
        for item in list(islice(self._waiting.values(), MAX_LOOKED_AT)):
            replica = self._holder(item) or (
                self._first_to_finish(item, usable, free_at, now) if open_ids else None
            )
            if replica is None:
                continue
            if replica.id in open_ids or replica.id == self._holders.get(item.prepared.mm_hash):
                self._dequeue(item, replica, now)
                offers.append(item)
                if not replica.is_open:
                    open_ids.discard(replica.id)
            free_at[replica.id] = max(free_at[replica.id], now) + self._seconds(
                replica, item.prepared.num_patches
            )
        return offers

    def _dequeue(self, item: PendingItem, replica: VisionReplica, now: float) -> None:
        """Give an item to a replica, which will begin it after what it has already."""
        self.remove(item)
        item.vision_id = replica.id
        replica.unanswered += 1
        replica.free_at = max(now, replica.free_at) + self._seconds(
            replica, item.prepared.num_patches
        )

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

    def _first_to_finish(
        self, item: PendingItem, usable: list[VisionReplica], free_at: dict[str, float], now: float
    ) -> VisionReplica | None:
        """Return the replica that is expected to finish the item first, if any can run it.

        Among equally good ones it is the same for every preprocess.
        """
        num_patches = item.prepared.num_patches
        fitting = [replica for replica in usable if replica.fits(num_patches)]
        candidates = [replica for replica in fitting if replica.id not in item.failed_at] or fitting
        if not candidates:
            return None
        costs = {
            replica.id: self._cost(replica, num_patches, free_at[replica.id], now)
            for replica in candidates
        }
        limit = NEAR_FACTOR * min(costs.values()) + NEAR_SECONDS
        near = [replica for replica in candidates if costs[replica.id] <= limit]
        mm_hash = item.prepared.mm_hash
        return max(near, key=lambda replica: (replica.has_room, rank(mm_hash, replica.id)))

    def _cost(self, replica: VisionReplica, num_patches: int, free_at: float, now: float) -> float:
        """Return the seconds until it is expected to finish."""
        seconds = self._seconds(replica, num_patches) + FAILED_SECONDS * replica.num_failed
        if replica.is_open:
            return free_at - now + seconds
        return FULL_FACTOR * (max(free_at - now, seconds) + seconds)

    def _seconds(self, replica: VisionReplica, num_patches: int) -> float:
        return replica.expected(num_patches) or self._least_seconds(num_patches)

    def _least_seconds(self, num_patches: int) -> float:
        """Return the seconds in the tower of the fastest replica, as far as measured."""
        measured: Iterable[float] = (
            replica.expected(num_patches)
            for replica in self._replicas.values()
            if replica.fits(num_patches)
        )
        return min(
            (seconds for seconds in measured if seconds),
            default=UNMEASURED_SECONDS_PER_PATCH * num_patches,
        )


def rank(mm_hash: str, vision_id: str) -> int:
    """Return a number that orders the replicas for an item.

    It is the same for every preprocess, so equal items meet at one replica. Different items spread.
    """
    return zlib.crc32(f"{mm_hash}{vision_id}".encode())
