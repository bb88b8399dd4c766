"""One vision replica: answers offers at once, one image at a time through the tower, embeddings
straight to the language group."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from common.buckets import bucket_of
from common.events import PeerDown, PeerUp, Received
from common.logs import get_logger
from common.member import Drain, Event, Member
from common.messages import (
    Abort,
    Busy,
    CacheHit,
    Decline,
    Embeddings,
    Failed,
    Grant,
    Offer,
    Pixels,
    Vacancy,
    VisionLoad,
)
from common.wire import Tensor
from services.vision.cache import EmbeddingCache
from services.vision.encode_times import EncodeTimes
from services.vision.metrics import VisionMetrics
from services.vision.room import ANSWER_SECONDS, MAX_GRANTED, Room
from services.vision.tower_thread import DeviceLost, EncodeResult, Key, TowerThread

MAX_JOINED = 256
"""Offers that wait for an equal image of another request."""


@dataclass(slots=True, eq=False)
class Job:
    """An image that was granted, or waits for an equal one that was."""

    offer: Offer
    preprocess_id: str
    content: str
    """Names the embeddings."""
    granted_at: float | None = None
    patches: Tensor | None = None
    offered: float = field(default_factory=time.monotonic)


class Worker:
    def __init__(
        self,
        member: Member,
        tower: TowerThread,
        cache: EmbeddingCache,
        jobs: OrderedDict[Key, Job],
        dtype: str,
        times: EncodeTimes,
        metrics: VisionMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`jobs` is shared with the member's load report. The tower's results come as events of the
        member."""
        self._member = member
        self._tower = tower
        self._cache = cache
        self._jobs = jobs
        self._dtype = dtype
        self._times = times
        self._metrics = metrics
        self._clock = clock
        self._room = Room(clock)
        self._working: Job | None = None
        self._began = 0.0
        self._peers: set[str] = set()
        self._draining = False
        self._log = get_logger()

    def run(self) -> None:
        while (
            events := self._member.take_events(
                wait=True, timeout=ANSWER_SECONDS if self._awaits_answer else None
            )
        ) is not None:
            for event in events:
                self._handle(event)
            self._drop_lapsed()
            self._feed()
            self._invite()
            self._member.expected_delay = self._queue_seconds()

    def _queue_seconds(self) -> float:
        """Until another image would begin."""
        working = self._working
        left = max(0.0, self._expected(working) - (self._clock() - self._began)) if working else 0.0
        return left + sum(
            self._expected(job)
            for job in self._jobs.values()
            if job.granted_at is not None and job is not working
        )

    def _expected(self, job: Job) -> float:
        return self._times.expected(job.offer.num_patches)

    def _handle(self, event: Event | EncodeResult) -> None:
        match event:
            case EncodeResult():
                self._take_encoded(event)
            case Received(peer_id=peer_id, message=message):
                self._take(peer_id, message)
            case PeerUp(peer_id=peer_id, role="preprocess"):
                self._peers.add(peer_id)
                self._tell_load([peer_id])
            case PeerDown(peer_id=peer_id, role="preprocess", reason=reason):
                self._log.info("peer gone", peer=peer_id, reason=reason)
                self._peers.discard(peer_id)
                self._room.forget(peer_id)
                self._drop(lambda job: job.preprocess_id == peer_id)
            case Drain():
                self._draining = True

    def _take(self, peer_id: str, message: Any) -> None:
        match message:
            case Offer():
                self._answer(Job(message, peer_id, f"{message.mm_hash}.{self._dtype}"))
            case Pixels():
                self._take_pixels(message)
            case Abort(request_id=request_id, attempt=attempt):
                self._drop(
                    lambda job: (job.offer.request_id, job.offer.attempt) == (request_id, attempt)
                )
            case Decline():
                self._room.passes(peer_id)

    # Offers

    def _answer(self, job: Job) -> None:
        offer = job.offer
        peer_id = job.preprocess_id
        self._member.links.connect(offer.llm, "llm")
        if offer.skip_cache:
            self._cache.drop(job.content)
        has_room = self._room.admits(peer_id, self._num_granted()) and not self._draining
        if (embeddings := self._cache.get(job.content)) is not None:
            self._send(job, CacheHit(**name_of(offer)))
            self._deliver(job, embeddings, "cached", queued=0.0, encoded=0.0)
        elif self._is_in_work(job.content) and len(self._jobs) < MAX_JOINED:
            self._jobs[key_of(offer)] = job
            self._send(job, CacheHit(**name_of(offer)))
        elif has_room:
            self._jobs[key_of(offer)] = job
            self._grant(job)
        else:
            self._refuse(job)

    def _grant(self, job: Job) -> None:
        was_idle = not self._num_granted()
        job.granted_at = self._clock()
        has_room = self._room.admits(job.preprocess_id, self._num_granted())
        self._send(
            job, Grant(**name_of(job.offer), wait_seconds=self._queue_seconds(), has_room=has_room)
        )
        if not has_room:
            self._room.enqueue(job.preprocess_id)
        if was_idle:
            self._tell_load(self._peers - {job.preprocess_id})

    def _refuse(self, job: Job) -> None:
        self._room.enqueue(job.preprocess_id)
        self._send(job, Busy(**name_of(job.offer), wait_seconds=self._queue_seconds()))

    def _invite(self) -> None:
        """A draining replica has room for nobody."""
        for peer_id in [] if self._draining else self._room.invite(self._num_granted()):
            self._member.links.send(peer_id, Vacancy(wait_seconds=self._queue_seconds()))

    def _num_granted(self) -> int:
        """An image in the tower takes its room even where nobody wants it any more."""
        granted = sum(job.granted_at is not None for job in self._jobs.values())
        return granted + (
            self._working is not None
            and self._jobs.get(key_of(self._working.offer)) is not self._working
        )

    def _is_in_work(self, content: str) -> bool:
        if self._working and self._working.content == content:
            return True
        return any(job.content == content for job in self._jobs.values())

    @property
    def _awaits_answer(self) -> bool:
        return self._room.awaits_answer or any(
            job.granted_at is not None and job.patches is None for job in self._jobs.values()
        )

    def _drop_lapsed(self) -> None:
        """The pixels of a granted image did not come: its room is another's now, and its owner
        offers it again."""
        now = self._clock()
        late = [
            j
            for j in self._jobs.values()
            if j.granted_at is not None
            and j.patches is None
            and now - j.granted_at > ANSWER_SECONDS
        ]
        self._drop(lambda job: job in late)
        for job in late:
            self._log.warning(
                "a grant lapsed",
                request_id=job.offer.request_id,
                image=job.offer.image,
                preprocess=job.preprocess_id,
            )
            self._refuse(job)

    # Images in work

    def _take_pixels(self, pixels: Pixels) -> None:
        job = self._jobs.get((pixels.request_id, pixels.attempt, pixels.image))
        if job is None or job.granted_at is None:
            return  # it was aborted, or the grant lapsed
        if pixels.patches.shape[:1] != (job.offer.num_patches,) or pixels.patches.dtype != "uint8":
            self._fail(job, f"{pixels.patches} came for {job.offer.num_patches} patches")
        else:
            job.patches = pixels.patches

    def _feed(self) -> None:
        if self._working is None and (
            job := next((job for job in self._jobs.values() if job.patches is not None), None)
        ):
            assert job.patches is not None
            self._working = job
            self._began = self._clock()
            self._tower.begin(key_of(job.offer), job.patches, job.offer.grid_thw)

    def _take_encoded(self, encoded: EncodeResult) -> None:
        job = self._working
        self._working = None
        assert job is not None and key_of(job.offer) == encoded.key
        if isinstance(encoded.error, DeviceLost):
            raise encoded.error
        if encoded.embeddings is None:
            self._log.error(
                "image failed",
                request_id=job.offer.request_id,
                image=job.offer.image,
                exc_info=encoded.error,
            )
            self._fail(
                job, f"the vision tower failed ({type(encoded.error).__name__}): see the vision log"
            )
            return
        self._cache.put(job.content, encoded.embeddings)
        self._observe(job, encoded)
        for twin in [other for other in self._jobs.values() if other.content == job.content]:
            del self._jobs[key_of(twin.offer)]
            outcome = "encoded" if twin is job else "joined"
            self._deliver(
                twin,
                encoded.embeddings,
                outcome,
                queued=max(0.0, encoded.began - twin.offered),
                encoded=encoded.seconds,
            )

    def _observe(self, job: Job, encoded: EncodeResult) -> None:
        num_patches = job.offer.num_patches
        self._times.measured(num_patches, encoded.seconds)
        self._room.size = MAX_GRANTED
        self._metrics.encode_seconds.observe(encoded.seconds)
        self._metrics.wait_seconds.observe(max(0.0, encoded.began - job.offered))
        self._metrics.patches.inc(num_patches)
        if self._times.buckets:
            self._metrics.padding_patches.inc(
                bucket_of(num_patches, self._times.buckets) - num_patches
            )
        if self._times.changed_notably():
            self._tell_load(self._peers)

    def _deliver(
        self, job: Job, embeddings: Tensor, outcome: str, queued: float, encoded: float
    ) -> None:
        offer = job.offer
        self._metrics.images.labels(outcome).inc()
        # Anew, where the connection broke since the offer.
        self._member.links.connect(offer.llm, "llm")
        message = Embeddings(
            **name_of(offer),
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
            image=offer.image,
            patches=offer.num_patches,
            seconds=round(encoded, 4),
            how=outcome,
        )

    def _fail(self, job: Job, reason: str) -> None:
        self._metrics.images.labels("failed").inc()
        if self._jobs.get(key_of(job.offer)) is job:
            self._send(
                job, Failed(**name_of(job.offer), code="Internal", message=reason, stage="vision")
            )
        self._drop(lambda other: other is job)
        self._grant_twin(job.content)

    def _drop(self, wanted: Callable[[Job], bool]) -> None:
        """What is in the tower goes on: another request may have come for it."""
        dropped = [job for job in self._jobs.values() if wanted(job)]
        for job in dropped:
            del self._jobs[key_of(job.offer)]
        for content in {job.content for job in dropped if job.granted_at is not None}:
            self._grant_twin(content)

    def _grant_twin(self, content: str) -> None:
        """An image that waited for an equal one takes its place where that one will not be
        encoded."""
        twins = [job for job in self._jobs.values() if job.content == content]
        is_granted = any(job.granted_at is not None for job in twins) or (
            self._working is not None and self._working.content == content
        )
        if twins and not is_granted:
            self._grant(twins[0])

    def _tell_load(self, peer_ids: Iterable[str]) -> None:
        times = self._times
        load = VisionLoad(
            buckets=times.buckets,
            sizes=tuple(times.seconds),
            seconds=tuple(times.seconds.values()),
            wait_seconds=self._queue_seconds(),
        )
        for peer_id in peer_ids:
            self._member.links.send(peer_id, load)

    def _send(self, job: Job, message: Any) -> None:
        self._member.links.send(job.preprocess_id, message)


def key_of(offer: Offer) -> Key:
    return offer.request_id, offer.attempt, offer.image


def name_of(offer: Offer) -> dict[str, Any]:
    return {"request_id": offer.request_id, "attempt": offer.attempt, "image": offer.image}
