"""A replica is chosen by where an image fits, finishes first, and was encoded before."""

import time
from collections import Counter

import numpy as np
import pytest

from common.messages import VisionLoad
from services.preprocess.in_flight import MISSING_SECONDS, PendingItem
from services.preprocess.prepared import ReadyItem
from services.preprocess.vision_pool import MAX_UNANSWERED, VisionPool
from tests.preprocess.builders import Clock


class Pool(VisionPool):
    """A pool of replicas with given seconds per 64 patches. Images are named by numbers."""

    def __init__(self, **seconds: float) -> None:
        self.clock = Clock()
        super().__init__(self.clock)
        for vision_id, each in seconds.items():
            self.join(vision_id, each)

    def join(
        self, vision_id: str, seconds: float = 0.1, buckets: tuple[int, ...] = (), wait: float = 0.0
    ) -> None:
        measured = tuple(seconds * bucket / 64 for bucket in buckets or (64,))
        self.update_load(
            vision_id,
            VisionLoad(
                buckets=buckets, sizes=buckets or (64,), seconds=measured, wait_seconds=wait
            ),
        )

    def put(self, *contents: int, num_patches: int = 64) -> list[PendingItem]:
        made = [dispatched(content, num_patches) for content in contents]
        for one in made:
            self.add(one)
        return made

    def offers(self) -> list[tuple[str, int]]:
        """Return (replica, content) of the items that are offered now."""
        return [(one.vision_id, one.key[2]) for one in self.assign()]


def dispatched(content: int, num_patches: int = 64) -> PendingItem:
    rows = np.zeros((num_patches, 588), np.uint8)
    size = (14 * 2, 14 * num_patches // 2)
    grid = (1, 2, num_patches // 2)
    name = f"{content:064x}"
    item = ReadyItem("image", name, grid, size, num_patches, num_patches // 4, rows)
    return PendingItem(("r", 0, content), item)


def serve(pool: Pool, until: int, slots: int = 2) -> Counter[str]:
    """Play replicas that take the time they report, and count the images of each.

    Each grants `slots` images at once.
    """
    done: Counter[str] = Counter()
    ends: list[tuple[float, str]] = []
    free = dict.fromkeys(pool._replicas._by_id, pool.clock.now)
    while sum(done.values()) < until:
        for one in pool.assign():
            free[one.vision_id] = max(pool.clock.now, free[one.vision_id]) + pool._replicas._by_id[
                one.vision_id
            ].expected(one.prepared.num_patches)
            ends.append((free[one.vision_id], one.vision_id))
            granted = sum(vision_id == one.vision_id for _, vision_id in ends)
            pool.on_answer(one.vision_id, granted < slots, free[one.vision_id] - pool.clock.now)
        ends.sort()
        now, vision_id = ends.pop(0)
        pool.clock.now = max(pool.clock.now, now)
        done[vision_id] += 1
        pool.update_replica(vision_id, True, max(0.0, free[vision_id] - pool.clock.now))
    return done


def test_images_wait_here_and_few_offers_to_a_replica_are_unanswered() -> None:
    pool = Pool(a=0.1)
    pool.put(*range(10))
    assert pool.offers() == [("a", 0), ("a", 1)] and MAX_UNANSWERED == 2
    assert pool.offers() == []
    pool.on_answer("a", True, 0.1)
    assert pool.offers() == [("a", 2)]
    pool.on_answer("a", False, 0.2)
    pool.on_answer("a")
    assert pool.offers() == [], "there is no room until it says so"
    pool.update_replica("a", True, 0.1)
    assert pool.offers() == [("a", 3), ("a", 4)]
    assert pool.num_waiting == 5


def test_images_that_arrive_together_are_spread_over_all_replicas() -> None:
    pool = Pool(**{f"v{n}": 0.1 for n in range(8)})
    pool.put(*range(8))
    assert sorted(vision_id for vision_id, _ in pool.offers()) == [f"v{n}" for n in range(8)]


def test_a_replica_gets_images_in_proportion_to_its_speed() -> None:
    pool = Pool(fast=0.1, slow=0.4)
    pool.put(*range(100))
    done = serve(pool, 100)
    assert 74 <= done["fast"] <= 86 and done["fast"] + done["slow"] == 100


def test_an_image_waits_for_a_fast_replica_rather_than_going_to_a_far_slower_one() -> None:
    pool = Pool(fast=0.1, slow=10.0)
    pool.update_replica("fast", False, 0.2)
    pool.put(0)
    assert pool.offers() == []
    pool.update_replica("fast", True, 0.1)
    assert pool.offers() == [("fast", 0)]


def test_a_slow_replica_takes_an_image_when_the_fast_one_has_too_many_before_it() -> None:
    pool = Pool(fast=1.0, slow=6.0)
    pool.update_replica("fast", False, 2.0)
    pool.put(*range(10))
    offers = pool.offers()
    assert offers[0][1] > 0, "the first wait for the fast one"
    assert {vision_id for vision_id, _ in offers} == {"slow"}


def test_images_of_another_size_that_wait_for_a_replica_count_as_well() -> None:
    pool = Pool()
    pool.join("fast", 1.0, (64, 128))
    pool.join("slow", 20.0, (64, 128))
    pool.update_replica("fast", False, 2.0)
    pool.put(0)
    pool.put(*range(1, 7), num_patches=128)
    assert pool.offers() == []
    pool.put(7)
    assert pool.offers() == [("slow", 7)]


def test_images_go_to_an_idle_replica_not_to_one_that_others_keep_busy() -> None:
    pool = Pool()
    pool.join("busy", wait=3.0)
    pool.join("idle")
    pool.put(*range(4))
    assert {vision_id for vision_id, _ in pool.offers()} == {"idle"}


def test_a_full_replica_that_is_late_is_not_preferred_to_one_with_room() -> None:
    pool = Pool(full=0.1, open=0.1)
    pool.update_replica("full", False, 0.0)
    pool.update_replica("open", True, 0.09)
    pool.put(0)
    assert pool.offers() == [("open", 0)]


def test_two_preprocesses_send_equal_images_to_one_replica_and_spread_others() -> None:
    names = {f"v{n}": 0.1 for n in range(8)}
    first = Pool(**names)
    second = Pool(**names)
    chosen = {}
    for content in range(64):
        for pool in (first, second):
            pool.put(content)
            [(vision_id, _)] = pool.offers()
            pool.on_answer(vision_id, True, 0.0)
            assert chosen.setdefault(content, vision_id) == vision_id
    assert max(Counter(chosen.values()).values()) <= 20 and len(set(chosen.values())) == 8


def test_a_replica_that_others_use_unseen_is_preferred_once_it_reports_that_it_is_idle() -> None:
    pool = Pool()
    names = [f"v{n}" for n in range(40)]
    measured = {"sizes": (64,), "seconds": (0.1,), "is_shared": True}
    for name in names:
        pool.update_load(name, VisionLoad(**measured))
    pool.update_load("v7", VisionLoad(**measured, is_idle=True))
    pool.update_load("v9", VisionLoad(**measured, is_idle=True))
    pool.put(0, 1)
    assert {vision_id for vision_id, _ in pool.offers()} == {"v7", "v9"}
    pool.put(*range(2, 30))
    assert len({vision_id for vision_id, _ in pool.offers()}) > 8, "the others are as good"


def test_an_image_goes_where_its_embeddings_are_even_if_there_is_no_room() -> None:
    pool = Pool(a=0.1, b=0.1)
    [one] = pool.put(0)
    pool.remember(one.prepared.mm_hash, "a")
    pool.update_replica("a", False, 5.0)
    assert pool.offers() == [("a", 0)]
    pool.on_answer("a", False, 5.0)
    pool.forget(one.prepared.mm_hash)
    pool.add(one, first=True)
    assert pool.offers() == [("b", 0)]


def test_an_image_avoids_a_replica_where_it_failed_unless_there_is_no_other() -> None:
    pool = Pool(a=0.1, b=5.0)
    [one] = pool.put(0)
    one.failed_at = {"a"}
    assert pool.offers() == [("b", 0)]
    pool.remove_replica("b")
    pool.add(one, first=True)
    assert pool.offers() == [("a", 0)]


def test_a_quickly_failing_replica_does_not_draw_all_images_and_may_recover() -> None:
    pool = Pool(broken=0.001, sound=0.1)
    pool.put(0)
    assert pool.offers() == [("broken", 0)]
    pool.on_answer("broken", True, 0.0)
    pool.on_item_end("broken", failed=True)
    pool.put(1, 2)
    assert pool.offers() == [("sound", 1), ("sound", 2)]
    pool.on_item_end("broken", failed=False)
    pool.put(3)
    assert pool.offers() == [("broken", 3)]


@pytest.mark.parametrize(
    ("num_patches", "chosen"), [(40, "small"), (64, "small"), (68, "large"), (1024, "large")]
)
def test_an_image_goes_to_the_replica_whose_bucket_costs_least(
    num_patches: int, chosen: str
) -> None:
    pool = Pool()
    pool.join("large", 0.1, (1024,))
    pool.join("small", 0.1, (64,))
    pool.put(0, num_patches=num_patches)
    assert pool.offers() == [(chosen, 0)]
    assert pool.buckets == (64, 1024)


def test_there_are_no_buckets_if_one_replica_takes_any_image() -> None:
    pool = Pool(any=0.1)
    pool.join("static", buckets=(64,))
    assert pool.buckets == ()


def test_an_image_that_fits_nowhere_does_not_delay_others() -> None:
    pool = Pool()
    pool.join("static", buckets=(64,))
    pool.put(0, num_patches=128)
    pool.put(1)
    assert pool.offers() == [("static", 1)]


def test_only_images_whose_replicas_are_gone_for_too_long_are_given_up() -> None:
    pool = Pool()
    pool.join("small", buckets=(64,))
    pool.join("large", buckets=(1024,))
    small = pool.put(0)[0]
    large = pool.put(1, num_patches=1024)[0]
    pool.remove_replica("large")
    pool.clock.now += MISSING_SECONDS - 1
    assert pool.hopeless_items() == []
    pool.clock.now += 2
    assert pool.hopeless_items() == [large] and small in pool._waiting.values()
    pool.join("large again", buckets=(1024,))
    assert pool.hopeless_items() == []


def test_the_queues_wait_is_its_work_shared_by_the_replicas() -> None:
    pool = Pool(a=0.5, b=0.5)
    pool.update_replica("a", False, 1.0)
    pool.update_replica("b", False, 1.0)
    waiting = pool.put(*range(8))
    assert pool.queue_seconds == pytest.approx(2.0)
    pool.join("c", 0.5)
    pool.update_replica("c", False)
    assert pool.queue_seconds == pytest.approx(8 * 0.5 / 3)
    for one in waiting:
        pool.remove(one)
    assert pool.queue_seconds == 0


def test_choosing_among_many_replicas_is_cheap() -> None:
    """The bound is far above what it takes, in CPU time of this process."""
    pool = Pool(**{f"v{n}": 0.1 for n in range(32)})
    pool.put(*range(2000))
    began = time.process_time()
    serve(pool, 2000)
    assert (time.process_time() - began) / 2000 < 0.002
