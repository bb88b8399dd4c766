"""The vision worker's bargain with preprocess and the language group, with a tower that only adds."""

import itertools
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

from common.links import Down, Event
from common.messages import Abort, Embeddings, Failed, Grant, Offer, Peer, Pixels
from common.wire import Tensor
from services.vision.__main__ import load_of
from services.vision.cache import EmbeddingCache
from services.vision.worker import MAX_GRANTED, DeviceLost, Job, Key, Worker
from tests.fakes import FakeMember, received

LLM = Peer("llm-1", "ipc:///llm-1")
NUM_PATCHES = 4


class FakeTower:
    """An image's embedding is the sum of its patches; where that is 0, it has no memory for it."""

    def __init__(self) -> None:
        self.encoded: list[int] = []
        self.error: type[Exception] = MemoryError

    def encode(self, patches: Tensor, grid_thw: tuple[int, int, int]) -> Tensor:
        total = patches.numpy().sum(dtype=np.int64)
        self.encoded.append(int(total))
        if not total:
            raise self.error("no memory is left")
        return Tensor.of(np.array([[total]], np.float32))


class Replica:
    """A worker and what is around it."""

    def __init__(self, cache_bytes: int = 1000) -> None:
        self.member, self.tower, self.jobs = FakeMember(), FakeTower(), OrderedDict[Key, Job]()
        self.worker = Worker(self.member, self.tower, EmbeddingCache(cache_bytes), self.jobs)

    def play(self, *batches: list[Event]) -> None:
        self.member.play(self.worker, *batches)

    def grants(self) -> list[tuple[str, int]]:
        return [(grant.request_id, grant.image) for grant in self.member.links.of(Grant)]

    def embeddings(self) -> list[tuple[str, float]]:
        """(request_id, value) of what went to the language group."""
        assert self.member.links.of(Embeddings) == [m for m in self.member.links.to(LLM.id) if isinstance(m, Embeddings)]
        return [(message.request_id, message.embeddings.numpy().item()) for message in self.member.links.of(Embeddings)]


def offer(request_id: str, mm_hash: str, image: int = 0, preprocess: str = "preprocess-1") -> list[Event]:
    message = Offer(
        request_id=request_id, attempt=0, image=image, mm_hash=mm_hash, grid_thw=(1, 2, 2), num_patches=NUM_PATCHES, llm=LLM, timeout=60
    )
    return received(preprocess, "preprocess", message)


def pixels(request_id: str, value: int, image: int = 0, **changed: Any) -> list[Event]:
    tensor = Tensor.of(np.full(changed.get("shape", (NUM_PATCHES, 1)), value, changed.get("dtype", np.uint8)))
    return received("preprocess-1", "preprocess", Pixels(request_id=request_id, attempt=0, image=image, patches=tensor))


def abort(request_id: str) -> list[Event]:
    return received("preprocess-1", "preprocess", Abort(request_id=request_id, attempt=0))


def test_embeddings_go_straight_to_the_language_group_that_the_offer_names() -> None:
    replica = Replica()
    replica.play(offer("r", "a", image=3), pixels("r", 5, image=3))
    assert replica.grants() == [("r", 3)]
    [message] = replica.member.links.of(Embeddings)
    assert replica.embeddings() == [("r", 20.0)]
    assert (message.attempt, message.image, message.mm_hash, message.preprocess_id) == (0, 3, "a", "preprocess-1")
    assert not message.cached and message.encode_seconds > 0 and message.queue_seconds > 0
    assert replica.member.links.connected[0] == (LLM, "llm")
    assert not replica.jobs


def test_no_more_images_are_granted_than_the_bound_whoever_offers_them() -> None:
    replica = Replica()
    waiting = list(itertools.chain.from_iterable(offer(f"r{n}", f"hash {n}", preprocess=f"preprocess-{n}") for n in range(MAX_GRANTED + 3)))
    replica.play(waiting)
    assert replica.grants() == [(f"r{n}", 0) for n in range(MAX_GRANTED)]
    assert [receiver for receiver, _ in replica.member.links.sent] == [f"preprocess-{n}" for n in range(MAX_GRANTED)]
    assert load_of(replica.jobs) == (MAX_GRANTED, 3)
    replica.play(pixels("r0", 1))
    assert replica.grants()[MAX_GRANTED:] == [(f"r{MAX_GRANTED}", 0)]


def test_an_image_in_the_cache_needs_no_pixels() -> None:
    replica = Replica()
    replica.play(offer("r0", "a"), pixels("r0", 5), offer("r1", "a"))
    assert replica.grants() == [("r0", 0)]
    assert replica.embeddings() == [("r0", 20.0), ("r1", 20.0)]
    assert [message.cached for message in replica.member.links.of(Embeddings)] == [False, True]
    assert not replica.jobs


@pytest.mark.parametrize("cache_bytes", [1000, 0])
def test_an_image_that_is_in_work_twice_is_sent_and_encoded_once(cache_bytes: int) -> None:
    replica = Replica(cache_bytes)
    replica.play(offer("r0", "a") + offer("r1", "a") + offer("r2", "b"), pixels("r0", 5))
    assert replica.grants() == [("r0", 0), ("r2", 0)]
    assert replica.tower.encoded == [20]
    assert replica.embeddings() == [("r0", 20.0), ("r1", 20.0)]
    assert [message.cached for message in replica.member.links.of(Embeddings)] == [False, True]
    assert [key[0] for key in replica.jobs] == ["r2"]


def test_the_second_of_two_equal_images_is_granted_where_the_first_is_aborted() -> None:
    replica = Replica()
    replica.play(offer("r0", "a") + offer("r1", "a"), abort("r0"), pixels("r1", 5))
    assert replica.grants() == [("r0", 0), ("r1", 0)]
    assert replica.embeddings() == [("r1", 20.0)]


def test_the_second_of_two_equal_images_is_granted_where_the_first_fails() -> None:
    replica = Replica()
    replica.play(offer("r0", "a") + offer("r1", "a"), pixels("r0", 0))
    assert replica.grants() == [("r0", 0), ("r1", 0)]
    assert list(replica.jobs) == [("r1", 0, 0)]


@pytest.mark.parametrize("wrong", [{"shape": (NUM_PATCHES - 1, 1)}, {"shape": ()}, {"dtype": np.float32}])
def test_pixels_that_are_not_as_offered_fail_their_image_alone(wrong: dict[str, Any]) -> None:
    replica = Replica()
    replica.play(offer("r0", "a", image=2) + offer("r1", "b"), pixels("r0", 5, image=2, **wrong), pixels("r1", 1))
    [failed] = replica.member.links.of(Failed)
    assert (failed.request_id, failed.image, failed.stage, failed.code) == ("r0", 2, "vision", "Internal")
    assert f"for {NUM_PATCHES} patches" in failed.message
    assert replica.embeddings() == [("r1", 4.0)] and replica.tower.encoded == [4]
    assert not replica.jobs


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, IndexError])
def test_an_image_that_the_tower_cannot_encode_fails_alone(error: type[Exception]) -> None:
    replica = Replica()
    replica.tower.error = error
    replica.play(offer("r0", "a", image=1) + offer("r1", "b"), pixels("r0", 0, image=1), pixels("r1", 1))
    [failed] = replica.member.links.of(Failed)
    assert (failed.request_id, failed.image, failed.stage) == ("r0", 1, "vision")
    assert error.__name__ in failed.message
    assert replica.embeddings() == [("r1", 4.0)]
    assert not replica.jobs


def test_a_lost_device_ends_the_process() -> None:
    replica = Replica()
    replica.tower.error = DeviceLost
    with pytest.raises(DeviceLost):
        replica.play(offer("r", "a"), pixels("r", 0))


def test_an_abort_drops_all_images_of_its_request_granted_or_not() -> None:
    replica = Replica()
    images = [offer("r0", f"hash {n}", image=n) for n in range(MAX_GRANTED + 1)]
    replica.play([*itertools.chain(*images), *offer("r1", "other")])
    assert load_of(replica.jobs) == (MAX_GRANTED, 2)
    replica.play(abort("r0"), pixels("r0", 5), pixels("r1", 1))
    assert replica.embeddings() == [("r1", 4.0)], "late pixels of an aborted image are dropped"
    assert not replica.jobs


def test_an_abort_of_another_attempt_drops_nothing() -> None:
    replica = Replica()
    replica.play(offer("r", "a"), received("preprocess-1", "preprocess", Abort(request_id="r", attempt=1)))
    assert list(replica.jobs) == [("r", 0, 0)]


def test_the_images_of_a_lost_preprocess_are_dropped_and_no_others() -> None:
    replica = Replica()
    lost = [offer(f"r{n}", f"hash {n}", preprocess="preprocess-2") for n in range(MAX_GRANTED)]
    replica.play([*itertools.chain(*lost), *offer("r9", "b")], [Down("preprocess-2", "preprocess", "gone")], pixels("r9", 1))
    assert replica.grants()[-1] == ("r9", 0)
    assert replica.embeddings() == [("r9", 4.0)]
    assert not replica.jobs


def test_a_connection_to_the_language_group_that_broke_since_the_offer_is_made_anew() -> None:
    replica = Replica()
    replica.play(offer("r", "a"))
    replica.member.links.connected.clear()
    replica.play(pixels("r", 5))
    assert replica.member.links.connected == [(LLM, "llm")]
