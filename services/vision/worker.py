"""One vision replica: it answers offers at once and encodes one item at a time.

Embeddings go straight to the language group that the offer names.
"""

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import assert_never

from common.buckets import bucket_of
from common.events import PeerDown, PeerUp, Received
from common.logs import get_logger
from common.member import Drain, Event, Member, Posted
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
    Pixels,
    Vacancy,
    VisionInbound,
    VisionLoad,
    VisionToPreprocess,
)
from common.wire import Tensor
from services.vision.cache import EmbeddingCache
from services.vision.encode_times import EncodeTimes
from services.vision.item_rules import ItemRules
from services.vision.metrics import VisionMetrics
from services.vision.room import ANSWER_SECONDS, MAX_GRANTED, Room
from services.vision.tower_thread import DeviceLost, EncodeResult, TowerThread
from services.vision.traces import record_failure, record_item

MAX_JOINED = 256
"""Offers of one preprocess that may wait for an equal item of another request."""

MAX_NOTIFIED = 8
"""Up to this many preprocesses learn of each item that another one brings to an idle replica."""
NUM_TOLD_IDLE = 2
"""If there are more, this many learn that the replica has become idle, chosen at random. So the
messages for an item do not grow with the number of preprocesses."""

JobKey = tuple[str, ItemKey]
"""(preprocess, item): one preprocess cannot take the key of an item of another."""


@dataclass(slots=True, eq=False)
class Job:
    """An item that was granted, or that waits for an equal item that was."""

    offer: Offer
    preprocess_id: str
    content: str
    """The name of the embeddings in the cache."""
    granted_at: float | None = None
    patches: Tensor | None = None
    offered: float = field(default_factory=time.monotonic)

    @property
    def key(self) -> JobKey:
        return self.preprocess_id, self.offer.item_key


class Worker:
    """The work loop of a vision replica. It owns the items that were offered and accepted."""

    def __init__(
        self,
        member: Member[VisionInbound],
        tower: TowerThread,
        cache: EmbeddingCache,
        dtype: str,
        times: EncodeTimes,
        metrics: VisionMetrics,
        rules: ItemRules,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Results of `tower` arrive as events posted to `member`."""
        self._member = member
        self._tower = tower
        self._cache = cache
        self._dtype = dtype
        self._times = times
        self._metrics = metrics
        self._rules = rules
        self._clock = clock
        self._jobs: OrderedDict[JobKey, Job] = OrderedDict()
        self._room = Room(clock)
        self._encoding: Job | None = None
        self._encoding_since = 0.0
        self._peers: set[str] = set()
        """Every preprocess that is connected."""
        self._visitors: set[str] = set()
        """The peers that connected to this process. It connects to none of them itself."""
        self._told_idle: set[str] = set()
        """The peers that believe that the shared replica is idle."""
        self._random = random.Random(member.id)
        self._draining = False
        self._log = get_logger()
        member.track_load(self.load)
        metrics.watch_load(self.load)

    def load(self) -> tuple[int, int]:
        """Return (granted items, items that wait for an equal one). Other threads call this."""
        # A copy, because the work loop changes the dictionary meanwhile.
        granted = [job.granted_at is not None for job in self._jobs.copy().values()]
        return sum(granted), len(granted) - sum(granted)

    def run(self) -> None:
        """Handle events until the process must stop or has drained."""
        while (events := self._wait_for_events()) is not None:
            self.step(events)

    def step(self, events: Iterable[Event[VisionInbound]]) -> None:
        """Handle events, and do what they make possible."""
        for event in events:
            self._handle_alone(event)
        self._drop_lapsed_grants()
        self._encode_next()
        self._announce_vacancies()
        self._announce_idleness()
        self._member.expected_delay = self._queue_seconds()

    def _wait_for_events(self) -> list[Event[VisionInbound]] | None:
        self._member.credits = self._room.num_free(self._num_granted())
        timeout = ANSWER_SECONDS if self._awaits_answer else None
        return self._member.take_events(wait=True, timeout=timeout)

    def _queue_seconds(self) -> float:
        """The seconds until another item would begin."""
        encoding = self._encoding
        left = 0.0
        if encoding:
            left = max(0.0, self._expected(encoding) - (self._clock() - self._encoding_since))
        waiting = [
            job for job in self._jobs.values() if job.granted_at is not None and job is not encoding
        ]
        return left + sum(map(self._expected, waiting))

    def _expected(self, job: Job) -> float:
        return self._times.expected(job.offer.num_patches)

    def _handle_alone(self, event: Event[VisionInbound]) -> None:
        """Handle an event so that whatever is wrong with it fails its own item alone."""
        try:
            self._handle(event)
        except DeviceLost:
            raise
        except Exception:  # noqa: BLE001 - one message must not end the others
            self._log.exception("a message could not be handled")
            if isinstance(event, Received) and isinstance(event.message, Offer | Pixels):
                job = self._jobs.get((event.peer_id, event.message.item_key))
                if job is not None:
                    self._fail(job, "the item could not be handled: see the vision log")

    def _handle(self, event: Event[VisionInbound]) -> None:
        match event:
            case PeerUp(peer_id=peer_id, address=""):
                self._visitors.add(peer_id)
            case PeerDown(peer_id=peer_id):
                self._visitors.discard(peer_id)
        match event:
            case Posted(event=EncodeResult() as result):
                self._handle_result(result)
            case Received(peer_id=peer_id, message=message):
                self._handle_message(peer_id, message)
            case PeerUp(peer_id=peer_id, role="preprocess"):
                self._peers.add(peer_id)
                is_news = len(self._peers) == MAX_NOTIFIED + 1
                self._send_load(self._peers if is_news else [peer_id])
            case PeerDown(peer_id=peer_id, role="preprocess", reason=reason):
                self._log.info("peer gone", peer=peer_id, reason=reason)
                self._forget_peer(peer_id)
            case Drain():
                self._draining = True

    def _forget_peer(self, peer_id: str) -> None:
        self._peers.discard(peer_id)
        if len(self._peers) == MAX_NOTIFIED:
            self._send_load(self._peers)
        self._told_idle.discard(peer_id)
        self._room.forget(peer_id)
        self._drop(lambda job: job.preprocess_id == peer_id)

    def _handle_message(self, peer_id: str, message: VisionInbound) -> None:
        match message:
            case Offer():
                self._handle_offer(Job(message, peer_id, f"{message.mm_hash}.{self._dtype}"))
            case Pixels():
                self._handle_pixels(peer_id, message)
            case Abort(key=key):
                self._drop(lambda job: (job.preprocess_id, job.offer.key) == (peer_id, key))
            case Decline():
                self._room.declined(peer_id)
            case _:
                assert_never(message)

    # Offers

    def _handle_offer(self, job: Job) -> None:
        self._metrics.offers.labels(job.offer.kind).inc()
        self._told_idle.discard(job.preprocess_id)  # whatever the answer is
        if job.key in self._jobs:
            request_id = job.offer.request_id
            self._log.warning(
                "ignored a second offer", peer=job.preprocess_id, request_id=request_id
            )
        elif job.offer.llm.id in self._visitors:
            self._report_failure(job, f"{job.offer.llm.id!r} is not a language group")
        elif reason := self._rules.objection_to(job.offer):
            self._report_failure(job, reason)
        else:
            self._answer_offer(job)

    def _answer_offer(self, job: Job) -> None:
        offer = job.offer
        self._member.links.connect(offer.llm, "llm")
        if offer.skip_cache:
            self._cache.drop(job.content)
        has_room = self._room.admits(job.preprocess_id, self._num_granted(), offer.apart)
        has_room = has_room and not self._draining
        if (embeddings := self._cache.get(job.content)) is not None:
            self._send(job, CacheHit(**offer.item_ids))
            self._deliver(job, embeddings, "cached", queued=0.0, encoded=0.0)
        elif self._may_join(job):
            self._jobs[job.key] = job
            self._send(job, CacheHit(**offer.item_ids))
        elif has_room:
            self._jobs[job.key] = job
            self._grant(job)
        else:
            self._refuse(job)

    def _may_join(self, job: Job) -> bool:
        """Whether the item may wait for an equal one that is in work."""
        return (
            self._num_jobs_of(job.preprocess_id) < MAX_JOINED
            and not self._room.is_exclusive
            and self._is_in_work(job.content)
        )

    def _grant(self, job: Job) -> None:
        was_idle = not self._num_granted()
        job.granted_at = self._clock()
        has_room = self._room.admits(job.preprocess_id, self._num_granted())
        wait = self._queue_seconds()
        self._send(job, Grant(**job.offer.item_ids, wait_seconds=wait, has_room=has_room))
        if not has_room:
            self._room.enqueue(job.preprocess_id, job.offer.priority)
        if was_idle:
            notified = self._told_idle if self._is_shared else self._peers
            self._send_load(notified - {job.preprocess_id})

    def _refuse(self, job: Job) -> None:
        self._room.enqueue(job.preprocess_id, job.offer.priority)
        self._send(job, Busy(**job.offer.item_ids, wait_seconds=self._queue_seconds()))

    def _announce_vacancies(self) -> None:
        """A draining replica has room for nobody."""
        if self._draining:
            return
        for peer_id in self._room.invite(self._num_granted()):
            self._member.links.send(peer_id, Vacancy(wait_seconds=self._queue_seconds()))

    def _announce_idleness(self) -> None:
        """Notify a few peers that the replica is idle, if it is shared by many."""
        is_idle = not (self._num_granted() or self._room.awaits_answer or self._draining)
        if is_idle and self._is_shared and not self._told_idle:
            self._told_idle = set(self._random.sample(sorted(self._peers), NUM_TOLD_IDLE))
            self._send_load(self._told_idle, is_idle=True)

    @property
    def _is_shared(self) -> bool:
        return len(self._peers) > MAX_NOTIFIED

    def _num_granted(self) -> int:
        """The items that take room. One in the tower does so even if nobody wants it any more."""
        granted = sum(job.granted_at is not None for job in self._jobs.values())
        encoding = self._encoding
        is_orphan = encoding is not None and self._jobs.get(encoding.key) is not encoding
        return granted + is_orphan

    def _num_jobs_of(self, preprocess_id: str) -> int:
        return sum(job.preprocess_id == preprocess_id for job in self._jobs.values())

    def _is_in_work(self, content: str) -> bool:
        if self._encoding and self._encoding.content == content:
            return True
        return any(job.content == content for job in self._jobs.values())

    @property
    def _awaits_answer(self) -> bool:
        return self._room.awaits_answer or any(map(awaits_pixels, self._jobs.values()))

    def _drop_lapsed_grants(self) -> None:
        """If the pixels of a granted item did not come, its room is free; its owner offers it
        again."""
        now = self._clock()
        lapsed = [
            job
            for job in self._jobs.values()
            if job.granted_at is not None
            and job.patches is None
            and now - job.granted_at > ANSWER_SECONDS
        ]
        self._drop(lambda job: job in lapsed)
        for job in lapsed:
            self._log.warning(
                "a grant lapsed",
                request_id=job.offer.request_id,
                image=job.offer.item,
                preprocess=job.preprocess_id,
            )
            self._refuse(job)

    # Items in work

    def _handle_pixels(self, peer_id: str, pixels: Pixels) -> None:
        job = self._jobs.get((peer_id, pixels.item_key))
        if job is None or job.granted_at is None or job.patches is not None:
            return  # it was aborted, or the grant lapsed, or the pixels came twice
        if reason := self._rules.objection_to_patches(job.offer, pixels.patches):
            self._fail(job, reason)
        else:
            job.patches = pixels.patches

    def _encode_next(self) -> None:
        """Give the first item with pixels to the tower, if the tower is free.

        That is the oldest one of those that are most urgent.
        """
        ready = [job for job in self._jobs.values() if job.patches is not None]
        if self._encoding is None and ready:
            job = min(ready, key=lambda job: job.offer.priority)
            assert job.patches is not None
            self._encoding = job
            self._encoding_since = self._clock()
            shape = self._rules.shape_of(job.offer)
            self._tower.begin(job.offer.item_key, job.patches, shape)

    def _handle_result(self, result: EncodeResult) -> None:
        job = self._encoding
        self._encoding = None
        assert job is not None and job.offer.item_key == result.key
        if isinstance(result.error, DeviceLost):
            raise result.error
        if result.embeddings is None:
            self._log.error(
                "image failed",
                request_id=job.offer.request_id,
                image=job.offer.item,
                exc_info=result.error,
            )
            name = type(result.error).__name__
            self._fail(job, f"the vision tower failed ({name}): see the vision log")
            return
        self._cache.put(job.content, result.embeddings)
        self._observe(job, result)
        for twin in [other for other in self._jobs.values() if other.content == job.content]:
            del self._jobs[twin.key]
            self._deliver(
                twin,
                result.embeddings,
                outcome="encoded" if twin is job else "joined",
                queued=max(0.0, result.began - twin.offered),
                encoded=result.seconds,
            )

    def _observe(self, job: Job, result: EncodeResult) -> None:
        """Record how long the item took, and report it to every preprocess if that is news."""
        num_patches = job.offer.num_patches
        kind = job.offer.kind
        waited = max(0.0, result.began - job.offered)
        self._times.record(num_patches, result.seconds)
        self._room.size = MAX_GRANTED
        self._metrics.encode_seconds.labels(kind).observe(result.seconds)
        self._metrics.wait_seconds.labels(kind).observe(waited)
        self._metrics.item_seconds.labels(kind).observe(waited + result.seconds)
        self._metrics.patches.inc(num_patches)
        if self._times.buckets:
            padding = bucket_of(num_patches, self._times.buckets) - num_patches
            self._metrics.padding_patches.inc(padding)
        if self._times.changed_notably():
            self._send_load(self._peers)

    def _deliver(
        self, job: Job, embeddings: Tensor, outcome: str, queued: float, encoded: float
    ) -> None:
        offer = job.offer
        self._metrics.items.labels(offer.kind, outcome).inc()
        self._metrics.item_tokens.labels(offer.kind, outcome).inc(embeddings.shape[0])
        record_item(self._member.tracing, offer, job.offered, outcome, queued, encoded)
        # The connection may have broken since the offer.
        self._member.links.connect(offer.llm, "llm")
        message = Embeddings(
            **offer.item_ids,
            mm_hash=offer.mm_hash,
            embeddings=embeddings,
            preprocess_id=job.preprocess_id,
            queue_seconds=queued,
            encode_seconds=encoded,
            cached=outcome != "encoded",
        )
        self._member.links.send(offer.llm.id, message)
        self._log.debug(
            "delivered",
            request_id=offer.request_id,
            image=offer.item,
            patches=offer.num_patches,
            seconds=round(encoded, 4),
            how=outcome,
        )

    def _fail(self, job: Job, reason: str) -> None:
        if self._jobs.get(job.key) is job:
            self._report_failure(job, reason)
        else:
            self._count_failed(job)
        self._drop(lambda other: other is job)
        self._grant_twin(job.content)

    def _count_failed(self, job: Job) -> None:
        self._metrics.items.labels(job.offer.kind, "failed").inc()

    def _report_failure(self, job: Job, reason: str) -> None:
        self._count_failed(job)
        self._log.warning("image refused", request_id=job.offer.request_id, reason=reason)
        record_failure(self._member.tracing, job.offer, job.offered, reason)
        failed = Failed(**job.offer.item_ids, code="Internal", message=reason, stage="vision")
        self._send(job, failed)

    def _drop(self, is_dropped: Callable[[Job], bool]) -> None:
        """Forget items. The tower finishes what it has begun: another request may ask for it."""
        dropped = [job for job in self._jobs.values() if is_dropped(job)]
        for job in dropped:
            del self._jobs[job.key]
        for content in {job.content for job in dropped if job.granted_at is not None}:
            self._grant_twin(content)

    def _grant_twin(self, content: str) -> None:
        """If an item will not be encoded, one that waited for it takes its place."""
        twins = [job for job in self._jobs.values() if job.content == content]
        is_encoding = self._encoding is not None and self._encoding.content == content
        is_granted = is_encoding or any(job.granted_at is not None for job in twins)
        if twins and not is_granted:
            self._grant(twins[0])

    def _send_load(self, peer_ids: Collection[str], is_idle: bool = False) -> None:
        if not is_idle:
            self._told_idle = self._told_idle.difference(peer_ids)
        times = self._times
        load = VisionLoad(
            buckets=times.buckets,
            sizes=tuple(times.seconds),
            seconds=tuple(times.seconds.values()),
            wait_seconds=self._queue_seconds(),
            is_shared=self._is_shared,
            is_idle=is_idle,
        )
        for peer_id in peer_ids:
            self._member.links.send(peer_id, load)

    def _send(self, job: Job, message: VisionToPreprocess) -> None:
        self._member.links.send(job.preprocess_id, message)


def awaits_pixels(job: Job) -> bool:
    return job.granted_at is not None and job.patches is None
