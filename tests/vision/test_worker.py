"""What the vision worker agrees with preprocess and sends to the language group.

Its tower only adds numbers.
"""

import queue
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.checkpoint import open_checkpoint
from common.events import Event, PeerDown, PeerUp
from common.member import Drain, Posted
from common.messages import (
    Abort,
    Busy,
    CacheHit,
    Decline,
    Embeddings,
    Failed,
    Grant,
    ItemKey,
    Offer,
    Peer,
    Pixels,
    Vacancy,
    VisionLoad,
)
from common.progress import Progress
from common.wire import Tensor
from services.vision.cache import EmbeddingCache
from services.vision.encode_times import EncodeTimes
from services.vision.item_rules import ItemRules
from services.vision.metrics import VisionMetrics
from services.vision.room import ANSWER_SECONDS, MAX_GRANTED
from services.vision.tower_thread import (
    DeviceLost,
    EncodeResult,
    ItemShape,
    TowerThread,
    encode,
    size_of,
)
from services.vision.worker import MAX_JOINED, MAX_NOTIFIED, NUM_TOLD_IDLE, Job, Worker
from tests.fakes import FakeMember, received
from tests.golden import GoldenCase

LLM = Peer("llm-1", "ipc:///llm-1")
NUM_PATCHES = 4
CHECKPOINT = open_checkpoint(GoldenCase("a_image").checkpoint)


class FakeTower:
    """Returns the sum of the patches as the only embedding, and raises an error if it is 0."""

    dtype = "float32"

    def __init__(self) -> None:
        self.encoded: list[int] = []
        self.error: type[Exception] = MemoryError

    def encode(self, patches: Tensor, shape: ItemShape) -> Tensor:
        total = patches.numpy().sum(dtype=np.int64)
        self.encoded.append(int(total))
        if not total:
            raise self.error("no memory is left")
        return Tensor.of(np.array([[total]], np.float32))


class AnyItem(ItemRules):
    """The rules of tests about other things: contents have short names, patches one value."""

    def objection_to(self, offer: Offer) -> str:
        return ""

    def objection_to_patches(self, offer: Offer, patches: Tensor) -> str:
        if (patches.dtype, patches.shape) == ("uint8", (offer.num_patches, 1)):
            return ""
        return f"{patches} came for {offer.num_patches} patches"


class FakeThread:
    """Holds an item until the test asks for its result."""

    def __init__(self, tower: FakeTower) -> None:
        self.tower = tower
        self.work: list[tuple[ItemKey, Tensor, ItemShape]] = []

    def begin(self, key: ItemKey, patches: Tensor, shape: ItemShape) -> None:
        assert not self.work, "one image at a time"
        self.work.append((key, patches, shape))

    def result(self) -> EncodeResult:
        # Where items are offered depends on this time, and a test must not depend on a machine's.
        return replace(encode(self.tower, *self.work.pop()), seconds=0.001)


class Replica:
    """A worker with fakes around it."""

    def __init__(
        self,
        cache_bytes: int = 1000,
        buckets: tuple[int, ...] = (),
        dtype: str = "float32",
        is_new: bool = False,
        rules: ItemRules | None = None,
    ) -> None:
        """Unless it is new, the replica has encoded an image before.

        By default it takes any item of NUM_PATCHES patches, whatever its name.
        """
        self.member = FakeMember()
        self.tower = FakeTower()
        self.thread = FakeThread(self.tower)
        self.now = 100.0
        self.cache = EmbeddingCache(cache_bytes)
        self.metrics = VisionMetrics(self.cache)
        self.times = EncodeTimes(buckets)
        thread: Any = self.thread
        self.worker = Worker(
            self.member,
            thread,
            self.cache,
            dtype,
            self.times,
            self.metrics,
            rules or AnyItem(CHECKPOINT, 1000, frozenset({"image"})),
            lambda: self.now,
        )
        if not is_new:
            self.worker._room.size = MAX_GRANTED

    @property
    def jobs(self) -> OrderedDict[ItemKey, Job]:
        return OrderedDict((key, job) for (_, key), job in self.worker._jobs.items())

    def play(self, *batches: list[Event]) -> None:
        self.member.play(self.worker, *batches)

    def finish(self) -> None:
        """Let the tower finish its item."""
        self.play([Posted(self.thread.result())])

    def encode_all(self) -> None:
        while self.thread.work:
            self.finish()

    def take(self, kind: type[Any]) -> list[Any]:
        """Return (receiver, message) of this kind since the last call."""
        links = self.member.links
        found = [
            (receiver, message) for receiver, message in links.sent if isinstance(message, kind)
        ]
        links.sent = [
            (receiver, message) for receiver, message in links.sent if not isinstance(message, kind)
        ]
        return found

    def grants(self) -> list[tuple[str, int]]:
        return [(grant.request_id, grant.item) for grant in self.member.links.of(Grant)]

    def embeddings(self) -> list[tuple[str, float]]:
        """Return (request_id, value) of the embeddings sent to the language group."""
        assert self.member.links.of(Embeddings) == [
            m for m in self.member.links.to(LLM.id) if isinstance(m, Embeddings)
        ]
        return [
            (message.request_id, message.embeddings.numpy().item())
            for message in self.member.links.of(Embeddings)
        ]

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def offer(
    request_id: str, mm_hash: str, image: int = 0, preprocess: str = "preprocess-1", **fields: Any
) -> list[Event]:
    given = {"num_patches": NUM_PATCHES, "llm": LLM, "timeout": 60} | fields
    message = Offer(
        request_id=request_id, attempt=0, item=image, mm_hash=mm_hash, grid_thw=(1, 2, 2), **given
    )
    return received(preprocess, "preprocess", message)


def pixels(request_id: str, value: int, image: int = 0, **changed: Any) -> list[Event]:
    tensor = Tensor.of(
        np.full(changed.get("shape", (NUM_PATCHES, 1)), value, changed.get("dtype", np.uint8))
    )
    return received(
        "preprocess-1",
        "preprocess",
        Pixels(request_id=request_id, attempt=0, item=image, patches=tensor),
    )


def abort(request_id: str) -> list[Event]:
    return received("preprocess-1", "preprocess", Abort(request_id=request_id, attempt=0))


def declines(preprocess: str) -> list[Event]:
    return received(preprocess, "preprocess", Decline())


def test_of_two_items_that_came_together_the_more_urgent_one_is_encoded_first() -> None:
    replica = Replica()
    replica.play(offer("r0", "a", priority=1) + offer("r1", "b"))
    replica.play(pixels("r0", 1) + pixels("r1", 2))
    replica.encode_all()
    assert [request_id for request_id, _ in replica.embeddings()] == ["r1", "r0"]


def test_embeddings_go_straight_to_the_language_group_that_the_offer_names() -> None:
    replica = Replica()
    replica.play(offer("r", "a", image=3), pixels("r", 5, image=3))
    assert replica.grants() == [("r", 3)]
    replica.encode_all()
    [message] = replica.member.links.of(Embeddings)
    assert replica.embeddings() == [("r", 20.0)]
    assert (message.attempt, message.item, message.mm_hash, message.preprocess_id) == (
        0,
        3,
        "a",
        "preprocess-1",
    )
    assert not message.cached and message.encode_seconds > 0 and message.queue_seconds > 0
    assert replica.member.links.connected[0] == (LLM, "llm")
    assert not replica.jobs


# Offers


def test_no_more_images_are_granted_than_the_bound_by_however_many_peers() -> None:
    replica = Replica()
    replica.play(
        *(offer(f"r{n}", f"hash {n}", preprocess=f"preprocess-{n}") for n in range(MAX_GRANTED + 2))
    )
    assert replica.grants() == [(f"r{n}", 0) for n in range(MAX_GRANTED)]
    assert [grant.has_room for grant in replica.member.links.of(Grant)] == [True] * (
        MAX_GRANTED - 1
    ) + [False]
    assert [(receiver, m.request_id) for receiver, m in replica.take(Busy)] == [
        ("preprocess-2", "r2"),
        ("preprocess-3", "r3"),
    ]
    assert replica.worker.load() == (MAX_GRANTED, 0), "nothing is held of what was refused"


def test_a_new_replica_grants_one_image_alone_until_it_has_measured_one() -> None:
    replica = Replica(is_new=True)
    replica.play(offer("r0", "a") + offer("r1", "b"), pixels("r0", 1))
    assert replica.grants() == [("r0", 0)] and len(replica.take(Busy)) == 1
    replica.finish()
    replica.play(offer("r1", "b") + offer("r2", "c") + offer("r3", "d"))
    assert replica.grants() == [("r0", 0), ("r1", 0), ("r2", 0)]


def test_vacancies_are_announced_in_order_and_reserved() -> None:
    replica = Replica()
    replica.play(
        offer("a0", "a0") + offer("a1", "a1"),
        offer("b", "b", preprocess="preprocess-2"),
        offer("c", "c", preprocess="preprocess-3"),
    )
    replica.play(pixels("a0", 1))
    assert not replica.take(Vacancy)
    replica.finish()
    [(receiver, _)] = replica.take(Vacancy)
    assert receiver == "preprocess-1", (
        "it took the last room, so it comes before the peers that were refused later"
    )
    replica.play(offer("d", "d", preprocess="preprocess-3"))
    assert [m.request_id for _, m in replica.take(Busy)] == ["b", "c", "d"]
    replica.play(declines("preprocess-1"))
    assert [receiver for receiver, _ in replica.take(Vacancy)] == ["preprocess-2"]
    replica.play(offer("b", "b", preprocess="preprocess-2"))
    assert replica.grants()[-1] == ("b", 0)


def test_reserved_room_that_is_not_taken_in_time_goes_to_the_next_peer() -> None:
    replica = Replica()
    replica.play(
        offer("a0", "a0") + offer("a1", "a1"),
        offer("b", "b", preprocess="preprocess-2"),
        pixels("a0", 1),
        pixels("a1", 1),
    )
    replica.finish()
    assert [receiver for receiver, _ in replica.take(Vacancy)] == ["preprocess-1"]
    replica.now += ANSWER_SECONDS + 0.1
    replica.play([])
    assert [receiver for receiver, _ in replica.take(Vacancy)] == ["preprocess-2"]


def test_room_reserved_for_a_lost_preprocess_goes_to_the_next_peer() -> None:
    replica = Replica()
    replica.play(
        offer("a0", "a0") + offer("a1", "a1"),
        offer("b", "b", preprocess="preprocess-2"),
        pixels("a0", 1),
    )
    replica.finish()
    replica.play([PeerDown("preprocess-1", "preprocess", "gone")])
    assert [receiver for receiver, _ in replica.take(Vacancy)] == ["preprocess-1", "preprocess-2"]


def test_offers_are_answered_and_pixels_accepted_while_the_tower_works() -> None:
    replica = Replica()
    replica.play(
        offer("r0", "a"), pixels("r0", 1), offer("r1", "b"), pixels("r1", 2), offer("r2", "c")
    )
    assert replica.grants() == [("r0", 0), ("r1", 0)] and len(replica.take(Busy)) == 1
    assert replica.tower.encoded == []
    replica.finish()
    assert len(replica.thread.work) == 1, "the next is in the tower at once"
    assert [receiver for receiver, _ in replica.take(Vacancy)] == ["preprocess-1"]


def test_a_grant_lapses_if_no_pixels_follow_and_its_room_is_free() -> None:
    replica = Replica()
    replica.play(
        offer("r0", "a") + offer("r1", "b"),
        offer("r2", "c", preprocess="preprocess-2"),
        pixels("r1", 1),
    )
    replica.take(Busy)
    replica.now += ANSWER_SECONDS + 0.1
    replica.play([])
    assert [(receiver, m.request_id) for receiver, m in replica.take(Busy)] == [
        ("preprocess-1", "r0")
    ]
    assert {receiver for receiver, _ in replica.take(Vacancy)} <= {"preprocess-1", "preprocess-2"}
    replica.play(pixels("r0", 1))
    replica.encode_all()
    assert [request_id for request_id, _ in replica.embeddings()] == ["r1"], (
        "late pixels are dropped"
    )


def test_an_image_in_the_cache_needs_no_pixels_and_no_room() -> None:
    replica = Replica()
    replica.play(offer("r0", "a"), pixels("r0", 5))
    replica.finish()
    replica.play(offer("x0", "x") + offer("x1", "y"), offer("r1", "a"))
    assert replica.embeddings() == [("r0", 20.0), ("r1", 20.0)]
    assert [message.cached for message in replica.member.links.of(Embeddings)] == [False, True]
    assert [(receiver, m.request_id) for receiver, m in replica.take(CacheHit)] == [
        ("preprocess-1", "r1")
    ]
    assert replica.count("twinlens_vision_items_total", kind="image", outcome="cached") == 1


def test_embeddings_that_were_rejected_are_encoded_again() -> None:
    replica = Replica()
    replica.play(offer("r0", "a"), pixels("r0", 5))
    replica.finish()
    replica.play(offer("r0", "a", skip_cache=True), pixels("r0", 5))
    replica.finish()
    assert replica.tower.encoded == [20, 20] and not replica.take(CacheHit)


def test_embeddings_of_another_dtype_are_not_found() -> None:
    first = Replica()
    second = Replica(dtype="bfloat16")
    first.play(offer("r0", "a"), pixels("r0", 5))
    first.finish()
    second.worker._cache = first.cache
    second.play(offer("r1", "a"))
    assert second.grants() == [("r1", 0)]


# Equal images


@pytest.mark.parametrize("cache_bytes", [1000, 0])
def test_an_image_that_is_in_work_twice_is_sent_and_encoded_once(cache_bytes: int) -> None:
    replica = Replica(cache_bytes)
    replica.play(offer("r0", "a") + offer("r1", "a") + offer("r2", "b"), pixels("r0", 5))
    assert replica.grants() == [("r0", 0), ("r2", 0)]
    assert [m.request_id for _, m in replica.take(CacheHit)] == ["r1"]
    replica.finish()
    assert replica.tower.encoded == [20]
    assert replica.embeddings() == [("r0", 20.0), ("r1", 20.0)]
    assert [message.cached for message in replica.member.links.of(Embeddings)] == [False, True]
    assert [key[0] for key in replica.jobs] == ["r2"]


def test_the_second_of_two_equal_images_is_granted_if_the_first_is_aborted() -> None:
    replica = Replica()
    replica.play(offer("r0", "a") + offer("r1", "a"), abort("r0"), pixels("r1", 5))
    replica.encode_all()
    assert replica.grants() == [("r0", 0), ("r1", 0)]
    assert replica.embeddings() == [("r1", 20.0)]


def test_the_second_of_two_equal_images_gets_the_embeddings_of_an_aborted_first() -> None:
    replica = Replica()
    replica.play(offer("r0", "a"), pixels("r0", 5), abort("r0"), offer("r1", "a"))
    assert replica.worker.load() == (0, 1)
    assert [m.request_id for _, m in replica.take(CacheHit)] == ["r1"]
    replica.finish()
    assert replica.embeddings() == [("r1", 20.0)] and replica.grants() == [("r0", 0)]


def test_the_second_of_two_equal_images_is_granted_if_the_first_fails() -> None:
    replica = Replica()
    replica.play(offer("r0", "a") + offer("r1", "a"), pixels("r0", 0))
    replica.finish()
    assert replica.grants() == [("r0", 0), ("r1", 0)]
    assert list(replica.jobs) == [("r1", 0, 0)]


def test_the_second_of_two_equal_images_is_granted_if_the_first_was_aborted_and_fails() -> None:
    replica = Replica()
    replica.play(offer("r0", "a"), pixels("r0", 0), abort("r0"), offer("r1", "a"))
    replica.finish()
    assert replica.grants() == [("r0", 0), ("r1", 0)] and not replica.take(Failed)


def test_no_more_equal_images_wait_than_the_bound() -> None:
    replica = Replica()
    replica.play([event for n in range(MAX_JOINED + 5) for event in offer(f"r{n}", "a")])
    assert len(replica.jobs) == MAX_JOINED + 1, (
        "one of the offers above the bound is granted the last room"
    )
    assert len(replica.take(Busy)) == 4


# Failures and ends


@pytest.mark.parametrize(
    "wrong", [{"shape": (NUM_PATCHES - 1, 1)}, {"shape": ()}, {"dtype": np.float32}]
)
def test_pixels_that_are_not_as_offered_fail_their_image_alone(wrong: dict[str, Any]) -> None:
    replica = Replica()
    replica.play(
        offer("r0", "a", image=2) + offer("r1", "b"),
        pixels("r0", 5, image=2, **wrong),
        pixels("r1", 1),
    )
    replica.encode_all()
    [failed] = replica.member.links.of(Failed)
    assert (failed.request_id, failed.item, failed.stage, failed.code) == (
        "r0",
        2,
        "vision",
        "Internal",
    )
    assert f"for {NUM_PATCHES} patches" in failed.message
    assert replica.embeddings() == [("r1", 4.0)] and replica.tower.encoded == [4]
    assert not replica.jobs


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, IndexError])
def test_an_image_that_the_tower_cannot_encode_fails_alone(error: type[Exception]) -> None:
    replica = Replica()
    replica.tower.error = error
    replica.play(
        offer("r0", "a", image=1) + offer("r1", "b"), pixels("r0", 0, image=1), pixels("r1", 1)
    )
    replica.encode_all()
    [failed] = replica.member.links.of(Failed)
    assert (failed.request_id, failed.item, failed.stage) == ("r0", 1, "vision")
    assert error.__name__ in failed.message
    assert replica.embeddings() == [("r1", 4.0)]
    assert not replica.jobs


def test_a_lost_device_ends_the_process() -> None:
    replica = Replica()
    replica.tower.error = DeviceLost
    replica.play(offer("r", "a"), pixels("r", 0))
    with pytest.raises(DeviceLost):
        replica.finish()


def test_an_abort_drops_all_images_of_its_request_and_their_room_is_free() -> None:
    replica = Replica()
    replica.play(offer("r0", "a", image=0) + offer("r0", "b", image=1), offer("r1", "c"))
    replica.play(abort("r0"), pixels("r0", 5), offer("r1", "c"), pixels("r1", 1))
    replica.encode_all()
    assert replica.embeddings() == [("r1", 4.0)], "late pixels of an aborted image are dropped"
    assert not replica.jobs


def test_an_aborted_image_in_the_tower_takes_room_until_the_tower_has_finished() -> None:
    replica = Replica()
    replica.play(offer("r0", "a"), pixels("r0", 5), abort("r0"), offer("r1", "b"), offer("r2", "c"))
    assert replica.grants() == [("r0", 0), ("r1", 0)]
    assert [m.request_id for _, m in replica.take(Busy)] == ["r2"]
    replica.finish()
    assert replica.embeddings() == []
    assert len(replica.take(Vacancy)) == 1


def test_an_abort_of_another_attempt_drops_nothing() -> None:
    replica = Replica()
    replica.play(
        offer("r", "a"), received("preprocess-1", "preprocess", Abort(request_id="r", attempt=1))
    )
    assert list(replica.jobs) == [("r", 0, 0)]


def test_the_images_of_a_lost_preprocess_are_dropped_and_no_others() -> None:
    replica = Replica()
    replica.play(
        offer("r0", "a", preprocess="preprocess-2"),
        offer("r9", "b"),
        [PeerDown("preprocess-2", "preprocess", "gone")],
        pixels("r9", 1),
    )
    replica.encode_all()
    assert replica.embeddings() == [("r9", 4.0)]
    assert not replica.jobs


def test_a_connection_to_the_language_group_that_broke_since_the_offer_is_restored() -> None:
    replica = Replica()
    replica.play(offer("r", "a"), pixels("r", 5))
    replica.member.links.connected.clear()
    replica.finish()
    assert replica.member.links.connected == [(LLM, "llm")]


def test_a_draining_replica_finishes_what_it_granted_and_grants_nothing_more() -> None:
    replica = Replica()
    drain: Any = Drain()
    replica.play(
        offer("r0", "a") + offer("r1", "b"),
        offer("r2", "c"),
        [drain],
        offer("r3", "d"),
        pixels("r0", 1),
        pixels("r1", 2),
    )
    replica.encode_all()
    assert [request_id for request_id, _ in replica.embeddings()] == ["r0", "r1"]
    assert [m.request_id for _, m in replica.take(Busy)] == ["r2", "r3"]
    assert not replica.take(Vacancy)
    assert replica.worker.load() == (0, 0)


def test_a_draining_replica_refuses_an_image_even_if_it_has_room() -> None:
    replica = Replica()
    drain: Any = Drain()
    replica.play([drain], offer("r0", "a"))
    assert replica.grants() == [] and len(replica.take(Busy)) == 1


# Reports of its load


def test_a_preprocess_that_connects_receives_the_buckets_and_their_times() -> None:
    replica = Replica(buckets=(64, 256))
    replica.times.record(100, 0.5)
    replica.play([PeerUp("preprocess-1", "preprocess")])
    assert replica.take(VisionLoad) == [
        ("preprocess-1", VisionLoad(buckets=(64, 256), sizes=(256,), seconds=(0.5,)))
    ]


def test_the_first_grant_is_reported_to_the_others_and_a_measurement_to_all() -> None:
    replica = Replica()
    replica.play([PeerUp("preprocess-1", "preprocess"), PeerUp("preprocess-2", "preprocess")])
    replica.take(VisionLoad)
    replica.play(offer("r0", "a"), offer("r1", "b"))
    assert [receiver for receiver, _ in replica.take(VisionLoad)] == ["preprocess-2"]
    replica.play(pixels("r0", 1))
    replica.finish()
    reports = replica.take(VisionLoad)
    assert sorted(receiver for receiver, _ in reports) == ["preprocess-1", "preprocess-2"]
    assert reports[0][1].sizes == (4,)


def idle_reports(reports: list[tuple[str, VisionLoad]]) -> set[str]:
    return {receiver for receiver, load in reports if load.is_idle}


def test_a_replica_of_many_preprocesses_reports_to_two_of_them_when_it_is_idle() -> None:
    replica = Replica()
    names = {f"preprocess-{n}" for n in range(MAX_NOTIFIED + 1)}
    replica.play([PeerUp(name, "preprocess") for name in sorted(names)])
    reports = replica.take(VisionLoad)
    assert {receiver for receiver, load in reports if load.is_shared} == names
    told = idle_reports(reports)
    assert len(told) == NUM_TOLD_IDLE
    replica.play(offer("r0", "a"), pixels("r0", 1))
    reports = replica.take(VisionLoad)
    assert {receiver for receiver, _ in reports} == told - {"preprocess-1"}
    assert not idle_reports(reports), "they learn that it is not idle any more"
    replica.finish()
    told = idle_reports(replica.take(VisionLoad))
    assert len(told) == NUM_TOLD_IDLE
    lost = max(told)
    replica.play([PeerDown(lost, "preprocess", "gone")])
    reports = replica.take(VisionLoad)
    assert {receiver for receiver, _ in reports} == names - {lost}
    assert not any(load.is_shared for _, load in reports), "it is not shared by many any more"


def shared_replica(*extra: str) -> tuple[Replica, set[str]]:
    """Return an idle replica of many preprocesses, and those that know that it is idle."""
    replica = Replica()
    names = [f"preprocess-{n}" for n in range(MAX_NOTIFIED + 1)]
    replica.play([PeerUp(name, "preprocess") for name in (*names, *extra)])
    return replica, idle_reports(replica.take(VisionLoad))


def test_an_idle_replica_that_becomes_shared_again_reports_it_again() -> None:
    replica, told = shared_replica()
    lost = min({f"preprocess-{n}" for n in range(MAX_NOTIFIED + 1)} - told)
    replica.play([PeerDown(lost, "preprocess", "gone")])
    replica.take(VisionLoad)
    replica.play([PeerUp(lost, "preprocess")])
    assert len(idle_reports(replica.take(VisionLoad))) == NUM_TOLD_IDLE


def test_the_loss_of_one_that_knows_of_idleness_does_not_mislead_the_other() -> None:
    replica, told = shared_replica("preprocess-10", "preprocess-11")
    replica.play([PeerDown(min(told), "preprocess", "gone")])
    replica.take(VisionLoad)
    other = min({"preprocess-1", "preprocess-2", "preprocess-3"} - told)
    replica.play(offer("r0", "a", preprocess=other))
    assert max(told) in {receiver for receiver, _ in replica.take(VisionLoad)}


def test_a_cache_hit_does_not_end_the_reports_of_idleness() -> None:
    replica, told = shared_replica()
    replica.play(offer("r0", "a"), pixels("r0", 1))
    replica.take(VisionLoad)
    replica.finish()
    told = idle_reports(replica.take(VisionLoad))
    for number, name in enumerate(sorted(told)):
        assert not replica.take(VisionLoad)
        replica.play(offer(f"r{1 + number}", "a", preprocess=name))
    assert len(idle_reports(replica.take(VisionLoad))) == NUM_TOLD_IDLE


def test_the_wait_is_the_time_of_all_granted_images_less_the_time_already_spent() -> None:
    replica = Replica()
    replica.times.record(NUM_PATCHES, 2.0)
    replica.play(offer("r0", "a") + offer("r1", "b"), pixels("r0", 1))
    assert [m.wait_seconds for _, m in replica.take(Grant)] == [2.0, 4.0]
    assert replica.member.expected_delay == 4.0
    replica.now += 1.5
    replica.play(offer("r2", "c"))
    assert [m.wait_seconds for _, m in replica.take(Busy)] == [2.5]


def test_the_credits_are_the_free_places() -> None:
    replica = Replica()
    replica.play([PeerUp("preprocess-1", "preprocess")])
    assert replica.member.credits == 2
    replica.play(offer("r0", "a"), pixels("r0", 1))
    assert replica.member.credits == 1
    replica.finish()
    assert replica.member.credits == 2


def test_padding_is_counted_if_there_are_buckets() -> None:
    replica = Replica(buckets=(64, 256))
    replica.play(offer("r0", "a"), pixels("r0", 1))
    replica.finish()
    assert replica.count("twinlens_vision_patches_total") == NUM_PATCHES
    assert replica.count("twinlens_vision_padding_patches_total") == 64 - NUM_PATCHES
    assert replica.count("twinlens_vision_items_total", kind="image", outcome="encoded") == 1


def test_the_times_and_the_tokens_of_an_item_are_counted_by_its_kind() -> None:
    replica = Replica()
    replica.play(offer("r0", "a"), pixels("r0", 1))
    replica.finish()
    replica.play(offer("r1", "a"))
    [delivered, _] = replica.member.links.of(Embeddings)
    num_tokens = delivered.embeddings.shape[0]
    assert replica.count("twinlens_vision_offers_total", kind="image") == 2
    for outcome in ("encoded", "cached"):
        name = "twinlens_vision_item_tokens_total"
        assert replica.count(name, kind="image", outcome=outcome) == num_tokens
    parts = [f"twinlens_vision_{name}_seconds_sum" for name in ("wait", "encode", "item")]
    wait, encode, whole = (replica.count(name, kind="image") for name in parts)
    assert whole == pytest.approx(wait + encode) and encode > 0
    assert replica.count("twinlens_vision_items_in_flight") == 0
    assert replica.count("twinlens_vision_cache_entries") == 1


# The thread


def test_the_thread_reports_each_image_and_stamps_its_progress() -> None:
    reports: queue.SimpleQueue[EncodeResult] = queue.SimpleQueue()
    began: list[float] = []

    class Watched(Progress):
        def begin(self, expected_seconds: float = 0.0) -> None:
            began.append(expected_seconds)
            super().begin(expected_seconds)

    thread = TowerThread(FakeTower(), reports.put, Watched())
    for n in (3, 0):
        patches = Tensor.of(np.full((NUM_PATCHES, 1), n, np.uint8))
        thread.begin((f"r{n}", 0, 0), patches, ItemShape((1, 2, 2), (2, 2)))
    first = reports.get(timeout=10)
    second = reports.get(timeout=10)
    assert (
        first.key == ("r3", 0, 0)
        and first.embeddings is not None
        and first.embeddings.numpy().item() == 12
    )
    assert second.embeddings is None and isinstance(second.error, MemoryError)
    assert began[0] > 0 and len(began) >= 3, "each image is a unit of work with an expected time"


# Items that are apart


def test_an_item_that_is_apart_has_the_replica_to_itself() -> None:
    replica = Replica()
    replica.play(offer("r0", "a"), pixels("r0", 1), offer("suspect", "b", apart=True))
    assert replica.grants() == [("r0", 0)]
    replica.play(offer("r1", "c", preprocess="preprocess-2"))
    assert [m.request_id for _, m in replica.take(Busy)] == ["suspect", "r1"]
    replica.finish()
    assert [receiver for receiver, _ in replica.take(Vacancy)] == ["preprocess-1"]
    replica.play(offer("suspect", "b", apart=True), offer("r2", "d"), offer("twin", "b"))
    assert replica.grants() == [("r0", 0), ("suspect", 0)]
    assert [m.request_id for _, m in replica.take(Busy)] == ["r2", "twin"]
    replica.play(offer("cached", "a", preprocess="preprocess-2"))
    assert [m.request_id for _, m in replica.take(CacheHit)] == ["cached"], "it needs no work"
    replica.play(pixels("suspect", 2))
    replica.finish()
    assert [receiver for receiver, _ in replica.take(Vacancy)] == ["preprocess-1"]
    replica.play(declines("preprocess-1"))
    assert [receiver for receiver, _ in replica.take(Vacancy)] == ["preprocess-2"]


def test_an_item_that_is_apart_does_not_join_an_equal_one_among_others() -> None:
    replica = Replica()
    replica.play(offer("r0", "a"), pixels("r0", 1), offer("suspect", "a", apart=True))
    assert [m.request_id for _, m in replica.take(Busy)] == ["suspect"]


def test_the_size_of_an_item_as_a_unit_of_work_grows_with_its_attention() -> None:
    """Sixteen times the patches may take 256 times as long, and are not hung before."""
    few, many = (size_of(Tensor.of(np.zeros((n, 1), np.uint8))) for n in (16_384, 16 * 16_384))
    assert 128 * few < many
