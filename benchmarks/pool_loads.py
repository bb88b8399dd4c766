"""The fleets and items that `benchmarks.pool` simulates, and an ideal queue for the same items."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MEAN_SECONDS = 0.1
"""The time of an average item at a replica of speed 1."""
SIZES = (256, 1024, 4096)
"""Patches of small, usual and large items."""
SHARES = (0.25, 0.5, 0.25)
SECONDS_PER_PATCH = MEAN_SECONDS / float(np.dot(SIZES, SHARES))
SMALL_BUCKETS = (1024,)
BULK = 0.9


@dataclass(frozen=True, slots=True)
class Spec:
    """One vision replica."""

    speed: float = 1.0
    buckets: tuple[int, ...] = ()

    def fits(self, num_patches: int) -> bool:
        return not self.buckets or num_patches <= self.buckets[-1]

    def seconds(self, num_patches: int) -> float:
        """Return the time in the tower. A replica with buckets pads."""
        padded = next((bucket for bucket in self.buckets if bucket >= num_patches), num_patches)
        return padded * SECONDS_PER_PATCH / self.speed


@dataclass(frozen=True, slots=True)
class Arrival:
    """One item: when and where it arrives, its size, and the name of its content."""

    time: float
    preprocess: int
    num_patches: int
    content: int


def equal_fleet(count: int) -> list[Spec]:
    """Return replicas of speed 1 without buckets."""
    return [Spec()] * count


def mixed_fleet(count: int) -> list[Spec]:
    """Return replicas of which a tenth are four times as slow, and a fifth take no large items."""
    return [
        Spec(0.25 if n % 10 == 9 else 1.0, SMALL_BUCKETS if n % 5 == 2 else ())
        for n in range(count)
    ]


def rate_of(fleet: Sequence[Spec]) -> float:
    """Return the items per second that the fleet can encode if each replica has its share.

    Replicas that take no large items work on the others.
    """
    usual = [spec.speed / MEAN_SECONDS for spec in fleet if not spec.buckets]
    small = [spec.speed for spec in fleet if spec.buckets]
    small_seconds = [1024 * SECONDS_PER_PATCH / speed for speed in small]
    return sum(usual) + sum(1 / seconds for seconds in small_seconds)


def arrivals(
    fleet: Sequence[Spec], num_preprocess: int, load: float, count: int, seed: int
) -> list[Arrival]:
    """Return items of mixed sizes that arrive at random, at this share of the fleet's rate.

    With an infinite load all of them are there at once.
    """
    random = np.random.default_rng(seed)
    gaps = random.exponential(1 / (load * rate_of(fleet)), count)
    times = np.cumsum(gaps)
    sizes = random.choice(SIZES, count, p=SHARES)
    places = random.integers(0, num_preprocess, count)
    return [
        Arrival(float(when), int(place), int(size), content)
        for content, (when, place, size) in enumerate(zip(times, places, sizes, strict=True))
    ]


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of all items."""

    waits: Sequence[float]
    """Seconds from the arrival of each to its begin."""
    begins: Sequence[float]
    """When each began, in any order."""

    @property
    def bulk_seconds(self) -> float:
        """When nine tenths of the items had begun. The last ones leave replicas without work."""
        return float(np.quantile(self.begins, BULK))


def ideal(fleet: Sequence[Spec], items: Sequence[Arrival]) -> Finished:
    """Return what one central queue does that knows everything and whose messages take no time.

    The oldest item that fits goes to the fastest idle replica. Whenever one becomes idle, it takes
    the oldest item that fits it.
    """
    idle = sorted(range(len(fleet)), key=lambda n: (-fleet[n].speed, not fleet[n].buckets))
    busy: list[tuple[float, int]] = []
    queue: list[Arrival] = []
    waits: list[float] = []
    begins: list[float] = []
    coming = list(reversed(items))
    now = 0.0

    def start(replica: int, item: Arrival) -> None:
        waits.append(now - item.time)
        begins.append(now)
        heapq.heappush(busy, (now + fleet[replica].seconds(item.num_patches), replica))

    while coming or busy:
        if coming and (not busy or coming[-1].time <= busy[0][0]):
            item = coming.pop()
            now = item.time
            place = next((n for n in idle if fleet[n].fits(item.num_patches)), None)
            if place is None:
                queue.append(item)
            else:
                idle.remove(place)
                start(place, item)
        else:
            now, replica = heapq.heappop(busy)
            spec = fleet[replica]
            index = next((i for i, one in enumerate(queue) if spec.fits(one.num_patches)), None)
            if index is None:
                idle.append(replica)
                idle.sort(key=lambda n: (-fleet[n].speed, not fleet[n].buckets))
            else:
                start(replica, queue.pop(index))
    return Finished(waits, begins)
