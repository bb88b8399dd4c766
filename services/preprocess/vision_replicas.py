"""The vision replicas of a pool, kept so that good ones are found without a look at all of them.

Replicas are alike if they run the same buckets at about the same speed. Those that are alike stand
in two heaps by the time at which they would begin another item: the open ones and the full ones.
So the number of replicas that a choice looks at does not grow with the fleet.
"""

import itertools
import math
import zlib
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from common.buckets import bucket_of, expected_seconds
from services.preprocess.heap import NO_ENTRY, Heap

MAX_UNANSWERED = 2
"""How many offers to one replica may be unanswered. A frozen replica delays at most these until its
lease ends."""
NUM_EARLIEST = 8
"""How many open and how many full replicas of each kind a choice looks at."""
NUM_NEIGHBOURS = 16
"""How many further replicas it looks at. They depend on the content of the item alone."""
ALIKE_FACTOR = 1.25
"""Replicas are alike if their speeds differ by about this factor at most."""

IDLE = float("-inf")
"""Where replicas stand in a heap that are known to be idle while others may be."""

Kind = tuple[tuple[int, ...], int | None, int]
"""Buckets, speed as a logarithm (None if unknown), and the number of failures in a row."""


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
    is_shared: bool = False
    """Whether too many preprocesses use it for each to learn of its items."""
    is_idle: bool = False
    """Whether it has reported that, though shared, it is idle, and was offered nothing since."""
    entry: int = NO_ENTRY
    kind: Kind | None = None
    """Where it was put; None if it was put nowhere."""
    counts_as_open: bool = False
    """Whether it was put among the open ones."""

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

    @property
    def may_be_busy(self) -> bool:
        """Whether it may have items of others that nobody knows of here."""
        return self.is_shared and not self.is_idle

    def own_kind(self) -> Kind:
        speed = None
        if self.seconds:
            size, seconds = max(self.seconds.items())
            speed = round(math.log(max(seconds, 1e-9) / size, ALIKE_FACTOR))
        return self.buckets, speed, self.num_failed


class Alike:
    """The replicas of one kind."""

    def __init__(self) -> None:
        self.members: dict[str, VisionReplica] = {}
        self.open = Heap[VisionReplica]()
        self.full = Heap[VisionReplica]()
        self.num_open = 0

    @property
    def example(self) -> VisionReplica:
        return next(iter(self.members.values()))


class VisionReplicas:
    """All replicas by id. Those that are not draining can be chosen."""

    def __init__(self) -> None:
        self._by_id: dict[str, VisionReplica] = {}
        self._kinds: dict[Kind, Alike] = {}
        self._ring: list[tuple[int, str]] = []
        """The replicas that can be chosen, at places that depend on their ids alone."""

    def get(self, vision_id: str) -> VisionReplica | None:
        return self._by_id.get(vision_id)

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def num_usable(self) -> int:
        """The number of replicas that are not draining."""
        return len(self._ring)

    def add(self, vision_id: str) -> VisionReplica:
        """Return the replica with this id, a new one if there is none. `put` lets it be chosen."""
        return self._by_id.setdefault(vision_id, VisionReplica(vision_id))

    def put(self, replica: VisionReplica) -> None:
        """Put a replica where it belongs, because something about it has changed."""
        kind = None if replica.is_draining else replica.own_kind()
        if kind != replica.kind:
            self._take_out(replica)
            if kind is not None:
                self._kinds.setdefault(kind, Alike()).members[replica.id] = replica
                insort(self._ring, place_of(replica.id))
                replica.kind = kind
        if kind is None:
            return
        alike = self._kinds[kind]
        alike.num_open += replica.is_open - replica.counts_as_open
        replica.counts_as_open = replica.is_open
        heap = alike.open if replica.is_open else alike.full
        is_first = replica.is_shared and replica.is_idle
        heap.put(replica, IDLE if is_first else replica.free_at, len(alike.members))

    def _take_out(self, replica: VisionReplica) -> None:
        if replica.kind is None:
            return
        alike = self._kinds[replica.kind]
        alike.num_open -= replica.counts_as_open
        del alike.members[replica.id]
        if not alike.members:
            del self._kinds[replica.kind]
        del self._ring[bisect_left(self._ring, place_of(replica.id))]
        replica.kind = None
        replica.entry = NO_ENTRY
        replica.counts_as_open = False

    def remove(self, vision_id: str) -> VisionReplica | None:
        """Forget a replica, and return it."""
        replica = self._by_id.pop(vision_id, None)
        if replica:
            self._take_out(replica)
        return replica

    def fitting(self, num_patches: int) -> Iterator[Alike]:
        """Yield the kinds of replicas that can run an item of this size."""
        return (alike for alike in self._kinds.values() if alike.example.fits(num_patches))

    def examples(self) -> Iterator[VisionReplica]:
        """Yield a replica of each kind."""
        return (alike.example for alike in self._kinds.values())

    def neighbours(self, mm_hash: str) -> Iterator[VisionReplica]:
        """Yield a few replicas that depend on the content alone.

        They are the same in every preprocess, so equal items meet at one of them.
        """
        start = bisect_left(self._ring, (zlib.crc32(mm_hash.encode()), ""))
        around = itertools.chain(self._ring[start : start + NUM_NEIGHBOURS], self._ring)
        for _, vision_id in itertools.islice(around, min(NUM_NEIGHBOURS, len(self._ring))):
            yield self._by_id[vision_id]


def place_of(vision_id: str) -> tuple[int, str]:
    return zlib.crc32(vision_id.encode()), vision_id


def rank(mm_hash: str, vision_id: str) -> int:
    """Return a number that orders the replicas for an item.

    It is the same for every preprocess, so equal items meet at one replica. Different items spread.
    """
    return zlib.crc32(f"{mm_hash}{vision_id}".encode())
