"""One vision replica: offers in, grants out, one image at a time through the tower, embeddings straight to the language group."""

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Protocol

from common.links import Down, Event, Received
from common.logs import get_logger
from common.member import Member
from common.messages import Abort, Embeddings, Failed, Grant, Offer, Pixels
from common.wire import Tensor
from services.vision.cache import EmbeddingCache

# One image in the tower and one whose pixels come meanwhile: more would only hold memory.
MAX_GRANTED = 2

Key = tuple[str, int, int]
"""(request_id, attempt, image)."""


class DeviceLost(Exception):
    """The device is lost to this process: it must end, and be started anew."""


class Tower(Protocol):
    def encode(self, patches: Tensor, grid_thw: tuple[int, int, int]) -> Tensor:
        """uint8 [num_patches, channels * patch_size ** 2] to [num_image_tokens, hidden_size]."""
        ...


@dataclass(slots=True)
class Job:
    """An image that was offered. Its pixels come after the grant."""

    offer: Offer
    preprocess_id: str
    granted: bool = False
    patches: Tensor | None = None
    offered: float = field(default_factory=time.monotonic)


class Worker:
    def __init__(self, member: Member, tower: Tower, cache: EmbeddingCache, jobs: OrderedDict[Key, Job]) -> None:
        """`jobs` is shared with the member's load report: granted ones are in flight, the others queued."""
        self._member, self._tower, self._cache, self._jobs = member, tower, cache, jobs
        self._log = get_logger()

    def run(self) -> None:
        while (events := self._member.waiting_events(wait=self._next() is None)) is not None:
            for event in events:
                self._handle(event)
            self._grant()
            if job := self._next():
                self._encode(job)
                self._grant()

    def _handle(self, event: Event) -> None:
        match event:
            case Received(peer_id=peer_id, message=Offer() as offer):
                self._take_offer(peer_id, offer)
            case Received(message=Pixels() as pixels):
                self._take_pixels(pixels)
            case Received(message=Abort(request_id=request_id, attempt=attempt)):
                self._drop(lambda key, _: key[:2] == (request_id, attempt))
            case Down(peer_id=peer_id, role="preprocess", reason=reason):
                self._log.info("peer gone", peer=peer_id, reason=reason)
                self._drop(lambda _, job: job.preprocess_id == peer_id)

    def _take_offer(self, preprocess_id: str, offer: Offer) -> None:
        self._member.links.connect(offer.llm, "llm")
        job = Job(offer, preprocess_id)
        if (embeddings := self._cache.get(offer.mm_hash)) is not None:
            self._deliver(job, embeddings, queued=0.0, encoded=0.0, cached=True)
        else:
            self._jobs[offer.request_id, offer.attempt, offer.image] = job

    def _take_pixels(self, pixels: Pixels) -> None:
        job = self._jobs.get((pixels.request_id, pixels.attempt, pixels.image))
        if job is None:
            return  # it was aborted meanwhile
        if pixels.patches.shape[:1] != (job.offer.num_patches,) or pixels.patches.dtype != "uint8":
            self._fail(job, f"{pixels.patches} came for {job.offer.num_patches} patches")
        else:
            job.patches = pixels.patches

    def _grant(self) -> None:
        """Keeps the next image's pixels on their way while the tower is at work; an image that is in work twice needs them once."""
        granted = {job.offer.mm_hash for job in self._jobs.values() if job.granted}
        for (request_id, attempt, image), job in self._jobs.items():
            if len(granted) >= MAX_GRANTED:
                return
            if job.offer.mm_hash not in granted:
                job.granted = True
                granted.add(job.offer.mm_hash)
                self._member.links.send(job.preprocess_id, Grant(request_id=request_id, attempt=attempt, image=image))

    def _next(self) -> Job | None:
        return next((job for job in self._jobs.values() if job.patches is not None), None)

    def _encode(self, job: Job) -> None:
        assert job.patches is not None
        began = time.monotonic()
        try:
            embeddings = self._tower.encode(job.patches, job.offer.grid_thw)
        except DeviceLost:
            raise
        except Exception as e:  # noqa: BLE001 - the outermost loop: one image that cannot be encoded ends nothing else
            self._log.exception("image failed", request_id=job.offer.request_id, image=job.offer.image)
            self._fail(job, f"the vision tower failed ({type(e).__name__}): see the vision log")
            return
        self._cache.put(job.offer.mm_hash, embeddings)
        encoded = time.monotonic() - began
        for twin in [j for j in self._jobs.values() if j.offer.mm_hash == job.offer.mm_hash]:
            del self._jobs[twin.offer.request_id, twin.offer.attempt, twin.offer.image]
            self._deliver(twin, embeddings, queued=began - twin.offered, encoded=encoded, cached=twin is not job)

    def _deliver(self, job: Job, embeddings: Tensor, queued: float, encoded: float, cached: bool) -> None:
        offer = job.offer
        self._member.links.connect(offer.llm, "llm")  # anew, where the connection broke since the offer
        message = Embeddings(
            **name_of(offer),
            mm_hash=offer.mm_hash,
            embeddings=embeddings,
            preprocess_id=job.preprocess_id,
            queue_seconds=queued,
            encode_seconds=encoded,
            cached=cached,
        )
        self._member.links.send(offer.llm.id, message)
        self._log.debug(
            "encoded", request_id=offer.request_id, image=offer.image, patches=offer.num_patches, seconds=round(encoded, 4), cached=cached
        )

    def _fail(self, job: Job, reason: str) -> None:
        name = name_of(job.offer)
        self._jobs.pop((job.offer.request_id, job.offer.attempt, job.offer.image))
        self._member.links.send(job.preprocess_id, Failed(**name, code="Internal", message=reason, stage="vision"))

    def _drop(self, wanted: Any) -> None:
        for key in [key for key, job in self._jobs.items() if wanted(key, job)]:
            del self._jobs[key]


def name_of(offer: Offer) -> dict[str, Any]:
    return {"request_id": offer.request_id, "attempt": offer.attempt, "image": offer.image}
