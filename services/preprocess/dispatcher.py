"""Owns each item from the handover of its request until the language group has its embeddings."""

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import assert_never

from common.apart import MAX_DEATHS
from common.errors import Internal, ServingError, Unavailable
from common.events import Sender
from common.logs import get_logger
from common.messages import (
    Abort,
    Busy,
    CacheHit,
    Decline,
    Embeddings,
    Failed,
    Grant,
    HandedOver,
    ItemKey,
    ItemMessage,
    ItemReceived,
    ItemRejected,
    ItemsLeft,
    Offer,
    Pixels,
    PreprocessOutbound,
    RequestKey,
    Reserved,
    Vacancy,
    VisionLoad,
    request_ids,
)
from common.tracing import NO_TRACING, Tracing
from common.wire import Tensor
from services.preprocess.in_flight import Handover, PendingItem
from services.preprocess.metrics import PreprocessMetrics
from services.preprocess.vision_pool import VisionPool

MAX_FAILURES = 3
"""How often one item may fail, at whatever replicas."""
LATE_SECONDS = 5.0
"""How long after its deadline a request is dropped here. The gateway has ended it, but its abort
may be lost."""

Fail = Callable[[RequestKey, str, ServingError], None]
"""Reports the end of a request to the gateway of this id."""
Inbound = (
    VisionLoad | Vacancy | Grant | CacheHit | Busy | Failed | Reserved | ItemReceived | ItemRejected
)


class Dispatcher:
    """Moves items to vision replicas and reacts to what replicas and language groups report."""

    def __init__(
        self,
        links: Sender[PreprocessOutbound],
        pool: VisionPool,
        fail: Fail,
        metrics: PreprocessMetrics,
        clock: Callable[[], float] = time.monotonic,
        *,
        name: str = "",
        has_tower: bool = True,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        """`name` is the id of this preprocess. Without a tower, items go to the language group."""
        self._name = name
        self._has_tower = has_tower
        self._tracing = tracing
        self._links = links
        self.pool = pool
        self.handovers: dict[RequestKey, Handover] = {}
        self._fail = fail
        self._metrics = metrics
        self._clock = clock
        self._log = get_logger()
        self._apart: set[PendingItem] = set()
        """The items that a replica must work on alone."""
        self.num_bytes = 0
        """The bytes of all items that are held."""

    def begin(self, key: RequestKey, handover: Handover) -> None:
        """Take over a request. Its items are offered once the language group has room for them."""
        self.handovers[key] = handover
        self.num_bytes += sum(item.prepared.nbytes for item in handover.items.values())

    def handle_message(self, peer_id: str, message: Inbound) -> None:
        """Handle a message of a vision replica or a language group."""
        match message:
            case VisionLoad():
                self._update_load(peer_id, message)
            case Vacancy(wait_seconds=wait):
                self._note_passed(peer_id)
                self.pool.update_replica(peer_id, True, wait)
                if peer_id not in self.offer_waiting():
                    self._links.send(peer_id, Decline())
            case Grant(wait_seconds=wait, has_room=has_room):
                self.pool.on_answer(peer_id, has_room, wait)
                self._note_passed(peer_id)
                self._send_pixels(message, peer_id)
            case CacheHit():
                self.pool.on_answer(peer_id)
                if item := self._find(message, peer_id):
                    self._mark_accepted(item)
                    item.has_passed = item.is_apart  # it never waits for an equal item
            case Busy(wait_seconds=wait):
                self.pool.on_answer(peer_id, False, wait)
                self._requeue_refused(message, peer_id)
            case Failed(message=reason):
                self._retry(self._find_failed(message, peer_id), reason, "failed")
            case Reserved(key=key):
                if self._is_held_by(key, peer_id):
                    self._start_items(key)
            case ItemReceived(item=index, key=key):
                if self._is_held_by(key, peer_id):
                    self._release_item(key, index)
            case ItemRejected(reason=reason, key=key):
                if self._is_held_by(key, peer_id):
                    self._on_rejected(message.item_key, reason)
            case _:
                assert_never(message)

    def offer_waiting(self) -> set[str]:
        """Offer what can be offered now. Returns the ids of the replicas that got an offer."""
        offered = self.pool.assign()
        for item in offered:
            self._links.send(item.vision_id, self._offer_of(item))
        return {item.vision_id for item in offered}

    def on_replica_down(self, vision_id: str, reason: str) -> None:
        """Give each item of a dead replica to another one.

        Those that it worked on may be why it died. If it worked on one that is apart, no other one
        is to blame.
        """
        self.pool.remove_replica(vision_id)
        items = [item for item in self._all_items() if item.vision_id == vision_id]
        for item in items:
            item.end_span(f"the vision replica was lost: {reason}")
        suspects = [item for item in items if item.is_suspect]
        blamed = [item for item in suspects if item.is_apart] or suspects
        # The last one is the first to be offered. It is the least suspicious one.
        for item in sorted(items, key=lambda item: item.num_deaths, reverse=True):
            if request_of(item.key) not in self.handovers:
                continue  # the failure of another item has just ended this request
            if item in blamed:
                self._on_death(item, reason)
            else:
                self._redispatch(item, "lost")

    def _note_passed(self, vision_id: str) -> None:
        """A replica that works on an item apart gives no room to another one meanwhile."""
        for item in self._apart:
            if item.vision_id == vision_id:
                item.has_passed |= item.is_accepted

    def _on_death(self, item: PendingItem, reason: str) -> None:
        """Let a replica work on the item alone, or end its request after too many deaths."""
        item.num_deaths += 1
        self._apart.add(item)
        reason = f"the vision replica was lost: {reason}"
        self._count_failure(item, reason)
        if item.num_deaths < MAX_DEATHS:
            self._redispatch(item, "lost")
            return
        index = item.key[2]
        text = (
            f"{MAX_DEATHS} vision replicas in a row ended while they worked on {item.prepared.kind}"
            f" {index}, the last one on this item alone, so it is not tried again: {reason}"
        )
        self._fail_request(request_of(item.key), index, Internal(text, "vision", index))

    def drop(self, key: RequestKey) -> None:
        """Free what is held for the request, here and at the replicas that have its items."""
        if handover := self.handovers.pop(key, None):
            for item in handover.items.values():
                if item.vision_id:
                    item.end_span("the attempt ended before the embeddings arrived")
                self._free(item)
            for vision_id in {item.vision_id for item in handover.items.values() if item.vision_id}:
                self._links.send(vision_id, Abort(**request_ids(key)))

    def end_hopeless(self) -> None:
        """End requests with items that no replica can encode, and requests nobody waits for."""
        for item in self.pool.hopeless_items():
            index = item.key[2]
            error = Unavailable(self._why_hopeless(item), "vision", index)
            self._fail_request(request_of(item.key), index, error)
        now = self._clock()
        handovers = self.handovers.items()
        for key in [key for key, h in handovers if now > h.deadline + LATE_SECONDS]:
            self.drop(key)

    def _update_load(self, vision_id: str, load: VisionLoad) -> None:
        """Use a replica's report, if its figures fit together."""
        if is_sound(load):
            self.pool.update_load(vision_id, load)
        else:
            self._log.warning("a report of a vision replica makes no sense", vision=vision_id)

    def _is_held_by(self, key: RequestKey, llm_id: str) -> bool:
        """Whether this language group has the prompt of the request."""
        handover = self.handovers.get(key)
        return handover is not None and handover.llm.id == llm_id

    def _all_items(self) -> Iterator[PendingItem]:
        return (item for handover in self.handovers.values() for item in handover.items.values())

    def _offer_of(self, item: PendingItem) -> Offer:
        request_id, attempt, index = item.key
        handover = self.handovers[request_id, attempt]
        item.begin_span(self._tracing, handover.traceparent)
        return Offer(
            request_id=request_id,
            attempt=attempt,
            item=index,
            kind=item.prepared.kind,
            mm_hash=item.prepared.mm_hash,
            grid_thw=item.prepared.grid_thw,
            content_size=item.prepared.content_size,
            num_patches=item.prepared.num_patches,
            llm=handover.llm,
            timeout=max(0.0, handover.deadline - self._clock()),
            skip_cache=item.skip_cache,
            apart=item.is_apart,
            traceparent=item.span.traceparent,
            priority=item.priority,
        )

    def _find(self, message: ItemMessage, vision_id: str) -> PendingItem | None:
        """Return the item that the message is about, if the replica that sent it still has it."""
        return self._item_at(message.item_key, vision_id)

    def _find_failed(self, message: Failed, vision_id: str) -> PendingItem | None:
        if message.item is None:
            return None
        return self._item_at((*message.key, message.item), vision_id)

    def _item_at(self, key: ItemKey, vision_id: str) -> PendingItem | None:
        item = self._offered_item(key)
        return item if item and item.vision_id == vision_id else None

    def _offered_item(self, key: ItemKey) -> PendingItem | None:
        """Return an item that some replica has, or was offered."""
        handover = self.handovers.get(request_of(key))
        item = handover.items.get(key[2]) if handover else None
        return item if item and item.vision_id else None

    def _start_items(self, key: RequestKey) -> None:
        handover = self.handovers.get(key)
        if handover and not handover.is_reserved:
            handover.is_reserved = True
            for item in handover.items.values():
                if self._has_tower:
                    self.pool.add(item)
                else:
                    self._send_itself(item, handover.llm.id)

    def _send_itself(self, item: PendingItem, llm_id: str) -> None:
        """Send the patches of an item to the language group, whose model has no tower."""
        request_id, attempt, index = item.key
        patches = Embeddings(
            request_id=request_id,
            attempt=attempt,
            item=index,
            mm_hash=item.prepared.mm_hash,
            embeddings=Tensor.of(item.prepared.patches()),
            preprocess_id=self._name,
        )
        self._links.send(llm_id, patches)

    def _send_pixels(self, grant: Grant, vision_id: str) -> None:
        if item := self._find(grant, vision_id):
            if item.has_pixels:  # a second grant must not move them again
                return
            item.has_pixels = True
            self._mark_accepted(item)
            patches = Tensor.of(item.prepared.patches())
            self._links.send(vision_id, Pixels(**grant.item_ids, patches=patches))
        elif grant.key not in self.handovers:
            self._links.send(vision_id, Abort(**grant.ids))
        # Otherwise the item arrived already. An Abort would also take the request's other items
        # from the replica.

    def _mark_accepted(self, item: PendingItem) -> None:
        item.is_accepted = True
        self.pool.remember(item.prepared.mm_hash, item.vision_id)

    def _requeue_refused(self, message: Busy, vision_id: str) -> None:
        if item := self._find(message, vision_id):
            self.pool.forget(item.prepared.mm_hash)
            self.pool.add(item, first=True)

    def _redispatch(self, item: PendingItem, cause: str) -> None:
        """Put an item back to the front of the queue, because its replica did not deliver it."""
        self._metrics.redispatches.labels(cause).inc()
        self.pool.add(item, first=True)

    def _retry(self, item: PendingItem | None, reason: str, cause: str) -> None:
        """Give one failed item to another replica, or end its request after too many failures."""
        if item is None:
            return
        item.end_span(reason)
        self._count_failure(item, reason)
        item.failed_at.add(item.vision_id)
        item.skip_cache = True
        item.num_failures += 1
        self.pool.on_item_end(item.vision_id, failed=True)
        if item.num_failures >= MAX_FAILURES:
            index = item.key[2]
            name = f"{item.prepared.kind} {index}"
            text = f"{name} was given up after {MAX_FAILURES} attempts: {reason}"
            self._fail_request(request_of(item.key), index, Internal(text, "vision", index))
        else:
            self._redispatch(item, cause)

    def _on_rejected(self, key: ItemKey, reason: str) -> None:
        """Have an item encoded again, unless the language group got its patches from here."""
        if self._has_tower:
            self._retry(self._offered_item(key), reason, "rejected")
        elif key[2] in self.handovers[request_of(key)].items:
            error = Internal(f"the language group refused the item: {reason}", item=key[2])
            self._fail_request(request_of(key), key[2], error)

    def _count_failure(self, item: PendingItem, reason: str) -> None:
        request_id, _, index = item.key
        self._log.warning(
            "image failed",
            request_id=request_id,
            image=index,
            vision=item.vision_id,
            reason=reason,
        )
        self.pool.forget(item.prepared.mm_hash)

    def _why_hopeless(self, item: PendingItem) -> str:
        name = f"{item.prepared.kind} {item.key[2]}"
        if buckets := self.pool.buckets:
            return (
                f"{name}: its {item.prepared.num_patches} patches fit into none of the "
                f"vision replicas' buckets {', '.join(map(str, buckets))}: send it smaller"
            )
        return f"{name}: no vision replica is there to encode it: try again in a moment"

    def _fail_request(self, key: RequestKey, index: int, error: ServingError) -> None:
        """End a request because of one of its items."""
        if handover := self.handovers.get(key):
            handover.items[index].vision_id = ""  # the replica holds nothing of this item
            self.drop(key)
            self._fail(key, handover.gateway_id, error)

    def _release_item(self, key: RequestKey, index: int) -> None:
        """The language group has the embeddings of this item."""
        if handover := self.handovers.get(key):
            if item := handover.items.pop(index, None):
                item.end_span()
                self.pool.on_item_end(item.vision_id, failed=False)
                self._free(item)
            if handover.items:
                left = ItemsLeft(**request_ids(key), count=len(handover.items))
                self._links.send(handover.gateway_id, left)
            else:
                del self.handovers[key]
                for each in (key, *handover.siblings):
                    self._links.send(handover.gateway_id, HandedOver(**request_ids(each)))

    def _free(self, item: PendingItem) -> None:
        self.pool.remove(item)
        self._apart.discard(item)
        self.num_bytes -= item.prepared.nbytes


def request_of(key: ItemKey) -> RequestKey:
    return key[:2]


def is_sound(load: VisionLoad) -> bool:
    """Whether the figures of a report fit together."""
    is_rising = all(low < high for low, high in pairwise((0, *load.buckets)))
    return is_rising and 0 not in load.sizes and len(load.sizes) == len(load.seconds)
