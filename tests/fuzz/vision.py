"""A vision replica as a target."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.checkpoint import open_checkpoint
from common.events import Event
from common.item_hash import item_hash
from common.member import Posted
from common.messages import Abort, Decline, Embeddings, Message, Offer, Peer, Pixels
from common.wire import Tensor
from services.vision.item_rules import ItemRules
from tests.fuzz.actions import Conversation, Member, Say
from tests.fuzz.clock import CLOCK
from tests.fuzz.making import Maker
from tests.fuzz.targets import ADDRESS, ATTEMPTS, REQUEST_IDS, Target, innocent_key
from tests.golden import GoldenCase
from tests.vision.test_worker import Replica

CHECKPOINT = open_checkpoint(GoldenCase("a_image").checkpoint)
RULES = ItemRules.of(CHECKPOINT)
SIDES = (2, 4)
"""Rows or columns of patches."""
CONTENTS = (1, 2, 3, 4)
"""The values of all pixels of an item. The fake tower fails with those of 0."""
PATCH_BYTES = CHECKPOINT.family.values_per_patch(CHECKPOINT)
PATCH_SIDE = int((PATCH_BYTES // 3) ** 0.5)
PREPROCESSES = tuple(Member(f"preprocess-{n}", "preprocess") for n in (1, 2, 3))
INNOCENT = Member("preprocess-i", "preprocess")


class VisionTarget(Target):
    role = "vision"
    peers = (*PREPROCESSES, Member("llm-1", "llm"))

    def __init__(self) -> None:
        super().__init__()
        self._service = Replica(cache_bytes=4000, rules=RULES)
        self._service.worker._clock = CLOCK
        self._service.worker._room._clock = CLOCK
        self._service.member.links = self.door  # type: ignore[assignment]

    def pools(self, number: int) -> dict[str, Sequence[Any]]:
        hashes = [offer_of("a", 0, 0, 2, 2, content).mm_hash for content in CONTENTS]
        hashes.append(question_of(2 * number + 1).mm_hash)
        return super().pools(number) | {"mm_hash": hashes, "num_patches": (4, 8, 16)}

    def play(self, events: list[Event[Any]]) -> None:
        self._service.play(events)
        if self._service.thread.work:
            self._service.play([Posted(self._service.thread.result())])

    def converse(self, maker: Maker) -> Conversation:
        draw = maker.draw
        peer = draw.choice(PREPROCESSES)
        request_id = draw.choice(REQUEST_IDS)
        attempt = draw.choice(ATTEMPTS)
        rows, columns = draw.choice(SIDES), draw.choice(SIDES)
        found: list[Message] = []
        for item in range(draw.choice([1, 1, 2, 3])):
            content = draw.choice(CONTENTS)
            offer = offer_of(request_id, attempt, item, rows, columns, content)
            found += [offer, pixels_of(offer, content)]
        if draw.random() < 0.3:
            found.append(Abort(request_id=request_id, attempt=attempt))
        if draw.random() < 0.3:
            found.append(Decline())
        return [Say(peer, message) for message in found]

    def question(self, number: int) -> Conversation:
        offer = question_of(number)
        return [Say(INNOCENT, offer), Say(INNOCENT, pixels_of(offer, content_of(number)))]

    def answer(self, number: int, sent: list[tuple[str, Any]]) -> Any:
        patch = PATCH_BYTES * content_of(number)
        return [
            (peer_id, message.embeddings.numpy().item() / patch)
            for peer_id, message in sent
            if isinstance(message, Embeddings) and message.key == innocent_key(number)
        ]

    def finish(self) -> None:
        while self._service.thread.work:
            self.play([])

    def held(self) -> dict[str, float]:
        worker = self._service.worker
        room = worker._room
        return {
            "items": len(worker._jobs),
            "encoding": float(worker._encoding is not None),
            "peers": len(worker._peers | worker._visitors),
            "room": len(room._queue) + len(room._invited),
            "exclusive": float(room.is_exclusive),
            "bytes beyond the cache": float(self._service.cache.num_bytes > 4000),
        }


def patches_of(rows: int, columns: int, content: int) -> Tensor:
    return Tensor.of(np.full((rows * columns, PATCH_BYTES), content, np.uint8))


def offer_of(
    request_id: str, attempt: int, item: int, rows: int, columns: int, content: int
) -> Offer:
    """Return an offer as preprocess makes it. Equal contents are equal pixels."""
    size = (rows * PATCH_SIDE, columns * PATCH_SIDE)
    patches = patches_of(rows, columns, content)
    grid = (1, rows, columns)
    return Offer(
        request_id=request_id,
        attempt=attempt,
        item=item,
        mm_hash=item_hash(CHECKPOINT.fingerprint, "image", grid, size, patches.data),
        grid_thw=grid,
        num_patches=rows * columns,
        llm=Peer("llm-1", ADDRESS),
        timeout=60.0,
        content_size=size,
    )


def content_of(number: int) -> int:
    """Return the pixels of an innocent item, which no other one has."""
    return 10 + number % 240


def question_of(number: int) -> Offer:
    return offer_of(*innocent_key(number), 0, 4, 2, content_of(number))


def pixels_of(offer: Offer, content: int) -> Pixels:
    _, rows, columns = offer.grid_thw
    return Pixels(**offer.item_ids, patches=patches_of(rows, columns, content))
