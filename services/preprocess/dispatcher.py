"""Owns each image from the hand-over of its request until the language group has its embeddings."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from common.errors import Internal, ServingError, Unavailable
from common.logs import get_logger
from common.messages import (
    Abort,
    Busy,
    CacheHit,
    Decline,
    Failed,
    Grant,
    HandedOver,
    ItemReceived,
    ItemRejected,
    Offer,
    Pixels,
    Reserved,
    Vacancy,
    VisionLoad,
)
from common.wire import Tensor
from services.preprocess.in_flight import Handover, Key, PendingItem
from services.preprocess.metrics import PreprocessMetrics
from services.preprocess.vision_pool import VisionPool

MAX_DISPATCHES = 3
"""How many replicas may try one image."""
LATE_SECONDS = 5.0
"""After the deadline the gateway has ended the request; its abort may be lost."""


class Dispatcher:
    def __init__(
        self,
        links: Any,
        pool: VisionPool,
        handovers: dict[Key, Handover],
        fail: Callable[[Key, str, ServingError], None],
        metrics: PreprocessMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`fail` tells the gateway, given by its id, of a request's end."""
        self._links = links
        self.pool = pool
        self.handovers = handovers
        self._fail = fail
        self._metrics = metrics
        self._clock = clock
        self._log = get_logger()
        self.num_bytes = 0
        """Of the pixels that are held."""

    def begin(self, key: Key, handover: Handover) -> None:
        """The request's images are encoded as soon as the language group has room for all of their
        embeddings."""
        self.handovers[key] = handover
        self.num_bytes += sum(
            dispatched.image.rgb.nbytes for dispatched in handover.images.values()
        )

    def take(self, peer_id: str, message: Any) -> None:
        """A message of a vision replica or a language group."""
        match message:
            case VisionLoad():
                self.pool.take_load(peer_id, message)
            case Vacancy(wait_seconds=wait):
                self.pool.tell(peer_id, True, wait)
                if peer_id not in self.offer_waiting():
                    self._links.send(peer_id, Decline())
            case Grant(wait_seconds=wait, has_room=has_room):
                self.pool.answered(peer_id, has_room, wait)
                self._send_pixels(message, peer_id)
            case CacheHit():
                self.pool.answered(peer_id)
                if dispatched := self._find(message, peer_id):
                    self._is_in_hand(dispatched)
            case Busy(wait_seconds=wait):
                self.pool.answered(peer_id, False, wait)
                self._take_back(message, peer_id)
            case Failed(message=reason):
                self._try_again(self._find(message, peer_id), reason, skip_cache=True)
            case Reserved():
                self._let_begin((message.request_id, message.attempt))
            case ItemReceived(image=image):
                self._let_go((message.request_id, message.attempt), image)
            case ItemRejected(reason=reason):
                self._try_again(self._find(message), reason, skip_cache=True)

    def offer_waiting(self) -> set[str]:
        """Offers what can be offered now; gives the replicas that it was offered to."""
        offers = self.pool.assign()
        for dispatched in offers:
            request_id, attempt, index = dispatched.key
            handover = self.handovers[request_id, attempt]
            image = dispatched.image
            offer = Offer(
                request_id=request_id,
                attempt=attempt,
                image=index,
                mm_hash=image.mm_hash,
                grid_thw=image.grid_thw,
                num_patches=image.num_patches,
                llm=handover.llm,
                timeout=max(0.0, handover.deadline - self._clock()),
                skip_cache=dispatched.skip_cache,
            )
            self._links.send(dispatched.vision_id, offer)
        return {dispatched.vision_id for dispatched in offers}

    def lose_replica(self, vision_id: str, reason: str) -> None:
        """Each of its images alone goes to another one."""
        self.pool.lose(vision_id)
        for dispatched in [d for d in self._all() if d.vision_id == vision_id]:
            if dispatched.key[:2] not in self.handovers:
                continue  # another image of its request has just ended that
            if dispatched.has_pixels:
                self._try_again(dispatched, f"the vision replica was lost: {reason}")
            else:
                self.pool.add(dispatched, first=True)

    def drop(self, key: Key) -> None:
        """Frees what is held for the request, here and at the replicas that have its images."""
        if handover := self.handovers.pop(key, None):
            for dispatched in handover.images.values():
                self._release(dispatched)
            for vision_id in {d.vision_id for d in handover.images.values() if d.vision_id}:
                self._links.send(vision_id, Abort(request_id=key[0], attempt=key[1]))

    def give_up(self) -> None:
        """What cannot be encoded any more: no replica takes it, or nobody waits for it."""
        for dispatched in self.pool.given_up():
            request_id, attempt, index = dispatched.key
            self._give_up_one(
                (request_id, attempt),
                index,
                Unavailable(self._why_not(dispatched), "vision", index),
            )
        now = self._clock()
        for key in [
            key
            for key, handover in self.handovers.items()
            if now > handover.deadline + LATE_SECONDS
        ]:
            self.drop(key)

    # From here on ours

    def _all(self) -> Iterator[PendingItem]:
        return (
            dispatched
            for handover in self.handovers.values()
            for dispatched in handover.images.values()
        )

    def _find(self, message: Any, vision_id: str = "") -> PendingItem | None:
        """The image that the message is about, where the replica that sent it still has it."""
        handover = self.handovers.get((message.request_id, message.attempt))
        dispatched = handover.images.get(message.image) if handover else None
        return (
            dispatched
            if dispatched and dispatched.vision_id and vision_id in ("", dispatched.vision_id)
            else None
        )

    def _let_begin(self, key: Key) -> None:
        handover = self.handovers.get(key)
        if handover and not handover.is_reserved:
            handover.is_reserved = True
            for dispatched in handover.images.values():
                self.pool.add(dispatched)

    def _send_pixels(self, grant: Grant, vision_id: str) -> None:
        dispatched = self._find(grant, vision_id)
        if dispatched:
            self._is_in_hand(dispatched)
            patches = Tensor.of(dispatched.image.patches())
            self._links.send(
                vision_id,
                Pixels(
                    request_id=grant.request_id,
                    attempt=grant.attempt,
                    image=grant.image,
                    patches=patches,
                ),
            )
        elif (grant.request_id, grant.attempt) not in self.handovers:
            self._links.send(vision_id, Abort(request_id=grant.request_id, attempt=grant.attempt))
        # Else it is a late one of an image that arrived: an Abort would take the request's other
        # images from the replica.

    def _is_in_hand(self, dispatched: PendingItem) -> None:
        dispatched.has_pixels = True
        dispatched.dispatches += 1
        self.pool.remember(dispatched.image.mm_hash, dispatched.vision_id)

    def _take_back(self, message: Busy, vision_id: str) -> None:
        if dispatched := self._find(message, vision_id):
            if dispatched.has_pixels:  # they came too late for their grant
                dispatched.dispatches -= 1
            self.pool.forget(dispatched.image.mm_hash)
            self.pool.add(dispatched, first=True)

    def _try_again(
        self, dispatched: PendingItem | None, reason: str, skip_cache: bool = False
    ) -> None:
        """One image alone goes to another replica."""
        if dispatched is None:
            return
        request_id, attempt, index = dispatched.key
        self._log.warning(
            "image failed",
            request_id=request_id,
            image=index,
            vision=dispatched.vision_id,
            reason=reason,
        )
        self._metrics.failed_dispatches.inc()
        dispatched.failed_at.add(dispatched.vision_id)
        dispatched.skip_cache |= skip_cache
        self.pool.forget(dispatched.image.mm_hash)
        self.pool.ended(dispatched.vision_id, failed=True)
        if dispatched.dispatches >= MAX_DISPATCHES:
            error = Internal(
                f"image {index} was given up after {MAX_DISPATCHES} attempts: {reason}",
                "vision",
                index,
            )
            self._give_up_one((request_id, attempt), index, error)
        else:
            self.pool.add(dispatched, first=True)

    def _why_not(self, dispatched: PendingItem) -> str:
        _, _, index = dispatched.key
        if buckets := self.pool.buckets:
            return (
                f"image {index}: its {dispatched.image.num_patches} patches fit into none of the "
                "vision replicas' buckets"
                f" {', '.join(map(str, buckets))}: send it smaller"
            )
        return f"image {index}: no vision replica is there to encode it: try again in a moment"

    def _give_up_one(self, key: Key, index: int, error: ServingError) -> None:
        if handover := self.handovers.get(key):
            handover.images[index].vision_id = ""  # it holds nothing of this one
            self.drop(key)
            self._fail(key, handover.gateway_id, error)

    def _let_go(self, key: Key, index: int) -> None:
        if handover := self.handovers.get(key):
            if dispatched := handover.images.pop(index, None):
                self.pool.ended(dispatched.vision_id, failed=False)
                self._release(dispatched)
            if not handover.images:
                del self.handovers[key]
                self._links.send(handover.gateway_id, HandedOver(request_id=key[0], attempt=key[1]))

    def _release(self, dispatched: PendingItem) -> None:
        self.pool.remove(dispatched)
        self.num_bytes -= dispatched.image.rgb.nbytes
