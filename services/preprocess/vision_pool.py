"""Which vision replica gets which image, and when. Knows no socket.

An image waits here, not at a replica, until a replica grants it: so the one that is free first
takes the oldest that suits it, whether it was there before, came back, or is new.
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
"""Offers under way to one replica: one that is frozen keeps no more than these until its lease
ends."""
MAX_LOOKED_AT = 32
"""Waiting images for which a replica is chosen at once."""
NEAR_FACTOR = 1.25
NEAR_SECONDS = 0.005
"""Replicas that are expected to finish within this of the first are as good; which one it is, the
image decides."""
FULL_FACTOR = 1.5
"""A replica that is full is waited for where it is expected to finish so much sooner than one with
room."""
UNMEASURED_SECONDS_A_PATCH = 1e-4
FAILED_SECONDS = 1.0
"""A replica that fails with its images is taken for so much slower for each: one that is quick to
fail would draw all images."""
MAX_FAILED = 10
REMEMBERED_IMAGES = 20_000


@dataclass(slots=True, eq=False)
class VisionReplica:
    """One that has told what it can run."""

    id: str
    buckets: tuple[int, ...] = ()
    seconds: dict[int, float] = field(default_factory=dict)
    """Measured, an image, by bucket."""
    free_at: float = 0.0
    """When it would begin another image: as last told, and what was offered since."""
    has_room: bool = True
    unanswered: int = 0
    is_draining: bool = False
    num_failed: int = 0
    """Images in a row that it failed with."""

    def expected(self, num_patches: int) -> float:
        """Seconds in the tower; 0 where it measured nothing yet."""
        return expected_seconds(self.seconds, self.buckets, num_patches)

    def fits(self, num_patches: int) -> bool:
        return bucket_of(num_patches, self.buckets) > 0


class VisionPool:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._replicas: dict[str, VisionReplica] = {}
        self._waiting: OrderedDict[ItemKey, PendingItem] = OrderedDict()
        self._waiting_seconds = 0.0
        self._holders: OrderedDict[str, str] = OrderedDict()
        self._lost: dict[tuple[int, ...], float] = {}

    # Replicas

    def update_load(self, vision_id: str, load: VisionLoad) -> None:
        replica = self._replicas.setdefault(vision_id, VisionReplica(vision_id))
        replica.buckets = load.buckets
        replica.seconds = dict(zip(load.sizes, load.seconds, strict=False))
        replica.free_at = self._clock() + load.wait_seconds

    def answered(
        self, vision_id: str, has_room: bool | None = None, wait_seconds: float | None = None
    ) -> None:
        """An offer was answered. `has_room` False: not for another, before a vacancy."""
        if replica := self._replicas.get(vision_id):
            replica.unanswered = max(0, replica.unanswered - 1)
            self.update_replica(vision_id, has_room, wait_seconds)

    def update_replica(
        self, vision_id: str, has_room: bool | None = None, wait_seconds: float | None = None
    ) -> None:
        if replica := self._replicas.get(vision_id):
            replica.has_room = replica.has_room if has_room is None else has_room
            if wait_seconds is not None:
                replica.free_at = self._clock() + wait_seconds

    def ended(self, vision_id: str, failed: bool) -> None:
        """What became of an image that the replica had in hand."""
        if replica := self._replicas.get(vision_id):
            replica.num_failed = min(replica.num_failed + 1, MAX_FAILED) if failed else 0

    def drain(self, vision_id: str) -> None:
        if replica := self._replicas.get(vision_id):
            replica.is_draining = True
            self._lost[replica.buckets] = self._clock()

    def lose(self, vision_id: str) -> None:
        if replica := self._replicas.pop(vision_id, None):
            self._lost[replica.buckets] = self._clock()

    @property
    def num_replicas(self) -> int:
        return len(self._usable())

    @property
    def buckets(self) -> tuple[int, ...]:
        """All that some replica has; none where there is a replica that takes any image, or no
        replica."""
        usable = self._usable()
        if not all(replica.buckets for replica in usable):
            return ()
        return tuple(sorted({bucket for replica in usable for bucket in replica.buckets}))

    def _usable(self) -> list[VisionReplica]:
        return [replica for replica in self._replicas.values() if not replica.is_draining]

    # Images

    def add(self, item: PendingItem, first: bool = False) -> None:
        """An image waits for a replica from now on, the `first` one of all where it waited
        already."""
        item.vision_id = ""
        item.is_accepted = False
        item.expected_seconds = self._least_seconds(item.prepared.num_patches)
        self._waiting[item.key] = item
        self._waiting_seconds += item.expected_seconds
        if first:
            self._waiting.move_to_end(item.key, last=False)

    def remove(self, item: PendingItem) -> None:
        """It is not to be offered any more."""
        if self._waiting.pop(item.key, None):
            self._waiting_seconds = (
                max(0.0, self._waiting_seconds - item.expected_seconds) if self._waiting else 0.0
            )

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def queue_seconds(self) -> float:
        """What the images that wait here add to the time until another would begin. May be read by
        any thread."""
        return self._waiting_seconds / max(1, len(self._replicas))

    def remember(self, mm_hash: str, vision_id: str) -> None:
        """The replica has the image's embeddings, or will have them."""
        self._holders[mm_hash] = vision_id
        self._holders.move_to_end(mm_hash)
        if len(self._holders) > REMEMBERED_IMAGES:
            self._holders.popitem(last=False)

    def forget(self, mm_hash: str) -> None:
        self._holders.pop(mm_hash, None)

    def hopeless_items(self) -> list[PendingItem]:
        """Images that no replica can take, and for which one has been missing for too long."""
        usable = self._usable()
        now = self._clock()
        hopeless = []
        for item in self._waiting.values():
            num_patches = item.prepared.num_patches
            if not any(replica.fits(num_patches) for replica in usable):
                lost = [
                    when for buckets, when in self._lost.items() if bucket_of(num_patches, buckets)
                ]
                if now - max(lost, default=float("-inf")) > MISSING_SECONDS:
                    hopeless.append(item)
        return hopeless

    def assign(self) -> list[PendingItem]:
        """Chooses replicas for waiting images, and takes those out that are to be offered now, each
        with its `vision_id`.

        Images are placed one after the other, each where it is expected to finish first. Where that
        replica is full the image goes on waiting for it, and those behind it count with it.
        """
        usable = self._usable()
        open_ids = {replica.id for replica in usable if can_be_offered(replica)}
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
                self._offer(item, replica, now)
                offers.append(item)
                if not can_be_offered(replica):
                    open_ids.discard(replica.id)
            free_at[replica.id] = max(free_at[replica.id], now) + self._seconds(
                replica, item.prepared.num_patches
            )
        return offers

    def _offer(self, item: PendingItem, replica: VisionReplica, now: float) -> None:
        self.remove(item)
        item.vision_id = replica.id
        replica.unanswered += 1
        replica.free_at = max(now, replica.free_at) + self._seconds(
            replica, item.prepared.num_patches
        )

    def _holder(self, item: PendingItem) -> VisionReplica | None:
        """The replica that has the embeddings already: it needs no room for them."""
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
        return (
            near[0]
            if len(near) == 1
            else max(
                near,
                key=lambda replica: (replica.has_room, rank(item.prepared.mm_hash, replica.id)),
            )
        )

    def _cost(self, replica: VisionReplica, num_patches: int, free_at: float, now: float) -> float:
        """Seconds until it is expected to finish."""
        seconds = self._seconds(replica, num_patches) + FAILED_SECONDS * replica.num_failed
        if can_be_offered(replica):
            return free_at - now + seconds
        return FULL_FACTOR * (max(free_at - now, seconds) + seconds)

    def _seconds(self, replica: VisionReplica, num_patches: int) -> float:
        return replica.expected(num_patches) or self._least_seconds(num_patches)

    def _least_seconds(self, num_patches: int) -> float:
        """In the tower of the fastest replica, as far as measured."""
        measured: Iterable[float] = (
            replica.expected(num_patches)
            for replica in self._replicas.values()
            if replica.fits(num_patches)
        )
        return min(
            (seconds for seconds in measured if seconds),
            default=UNMEASURED_SECONDS_A_PATCH * num_patches,
        )


def can_be_offered(replica: VisionReplica) -> bool:
    return replica.has_room and replica.unanswered < MAX_UNANSWERED


def rank(mm_hash: str, vision_id: str) -> int:
    """The same for every preprocess, so that equal images meet at one replica, and different ones
    spread."""
    return zlib.crc32(f"{mm_hash}{vision_id}".encode())
