"""Builds messages to preprocess and a worker with fake peers, and reads what it sent."""

import json
from collections import OrderedDict
from typing import Any

from common.checkpoint import Checkpoint, open_checkpoint
from common.events import Event, PeerUp
from common.messages import (
    Abort,
    Busy,
    CacheHit,
    Failed,
    Grant,
    HandedOver,
    Item,
    ItemReceived,
    ItemRejected,
    ItemsLeft,
    Offer,
    Peer,
    Prompt,
    RequestKey,
    Reserved,
    Sampling,
    Stopping,
    Submit,
    Vacancy,
    VisionLoad,
)
from common.wire import Tensor
from services.preprocess import families
from services.preprocess.families import ItemLimits
from services.preprocess.in_flight import Handover, Preparation
from services.preprocess.metrics import PreprocessMetrics
from services.preprocess.preprocessor import Preprocessor
from services.preprocess.sandbox.meter import Meter
from services.preprocess.sandbox.pool import Finished, Task
from services.preprocess.sandbox.work import Workbench
from services.preprocess.vision_pool import VisionPool
from services.preprocess.worker import Worker
from tests.fakes import FakeMember, received
from tests.preprocess.cases import checkpoint_path, encoded, noise


def create_preprocessor(
    checkpoint: Checkpoint,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    max_model_len: int | None = None,
    resizes_oversized: bool = True,
) -> Preprocessor:
    limits = ItemLimits(min_pixels, max_pixels, resizes_oversized)
    rules = families.load(checkpoint, limits)
    return Preprocessor(
        checkpoint, rules, max_model_len, video_rules=families.load_video(checkpoint, limits)
    )


PREPROCESSOR = create_preprocessor(open_checkpoint(str(checkpoint_path("a_image"))))
LLM = Peer("llm-1", "ipc:///llm-1")
IMAGES = [encoded(noise(56, 56, seed)) for seed in range(8)]

Sent = list[tuple[str, Any]]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


class InlineTasks:
    """Does each task at once, in this process, and posts what came of it."""

    def __init__(self, preprocessor: Preprocessor, member: FakeMember) -> None:
        self._workbench = Workbench(preprocessor)
        self._member = member
        self.num_waiting = 0
        self.started: list[Task] = []

    def start(self, task: Task) -> None:
        self.started.append(task)
        result, blobs = self._workbench.do(task.job, task.blobs, Meter())
        self._member.post(Finished(task, result, [memoryview(blob) for blob in blobs]))

    def cancel(self, task: Task) -> None: ...

    def handle(self, event: object) -> Finished | None:
        assert isinstance(event, Finished)
        return event

    def look(self) -> None: ...


class Preprocess:
    """A worker that is connected to a language group and these replicas (100 ms per image)."""

    def __init__(
        self,
        *vision_ids: str,
        llm: bool = True,
        buckets: tuple[int, ...] = (),
        preprocessor: Preprocessor = PREPROCESSOR,
    ) -> None:
        self.member = FakeMember()
        self.clock = Clock()
        self.items_left: list[int] = []
        self.encoded: list[str] = []
        pool = VisionPool(self.clock)
        self.metrics = PreprocessMetrics(pool)
        self.tasks = InlineTasks(preprocessor, self.member)
        self.worker = Worker(self.member, preprocessor, self.tasks, pool, self.metrics, self.clock)
        self.play(
            [event for vision_id in vision_ids for event in joins(vision_id, buckets)]
            + [PeerUp(LLM.id, "llm", LLM.address)] * llm
        )

    def play(self, *batches: list[Event]) -> Sent:
        """Handle batches of events, and return what was sent meanwhile.

        `encoded` collects the ids of the requests whose images have all arrived.
        """
        self.member.play(self.worker, *batches)
        sent = self.member.links.take()
        self.items_left += [message.count for _, message in sent if isinstance(message, ItemsLeft)]
        self.encoded += [
            message.request_id for _, message in sent if isinstance(message, HandedOver)
        ]
        return [
            (receiver, message)
            for receiver, message in sent
            if not isinstance(message, HandedOver | ItemsLeft)
        ]

    def dispatch(self, request_id: str, *images: bytes, **fields: Any) -> Sent:
        """Submit a request, reserve room for its embeddings, and return what was sent then."""
        self.play(submit(request_id, *images, **fields))
        return self.play(reserved(request_id))

    def wait(self, seconds: float) -> Sent:
        self.clock.now += seconds
        return self.play([])

    @property
    def preparations(self) -> OrderedDict[RequestKey, Preparation]:
        return self.worker._preparations

    @property
    def handovers(self) -> dict[RequestKey, Handover]:
        return self.worker._dispatcher.handovers

    @property
    def holds_nothing(self) -> bool:
        worker: Any = self.worker
        pool_is_empty = (
            not worker._pool.num_waiting
            and worker._pool.queue_seconds == 0
            and worker._dispatcher.num_bytes == 0
            and worker._prepared_bytes == 0
        )
        return not self.preparations and not self.handovers and pool_is_empty


def joins(vision_id: str, buckets: tuple[int, ...] = (), **load: Any) -> list[Event]:
    report = VisionLoad(
        buckets=buckets,
        **({"sizes": buckets or (16,), "seconds": (0.1,) * max(1, len(buckets))} | load),
    )
    return [
        PeerUp(vision_id, "vision", f"ipc:///{vision_id}"),
        *received(vision_id, "vision", report),
    ]


def submit(
    request_id: str,
    *images: bytes,
    gateway: str = "gateway-1",
    prompt: bytes | Tensor = b"",
    timeout: float = 60,
    **fields: Any,
) -> list[Event]:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "Read it."}]
    message = Submit(
        request_id=request_id,
        attempt=0,
        prompt_kind=fields.get("prompt_kind", "messages"),
        prompt=prompt
        if isinstance(prompt, Tensor)
        else Tensor.of_bytes(prompt or json.dumps([{"role": "user", "content": content}]).encode()),
        items=tuple(Item("image", Tensor.of_bytes(image)) for image in images),
        sampling=fields.get("sampling", Sampling()),
        stopping=fields.get("stopping", Stopping()),
        detokenizer=Peer("detokenizer-1", "ipc:///detokenizer-1"),
        timeout=timeout,
        return_prompt_token_ids=fields.get("return_prompt_token_ids", False),
        avoid=fields.get("avoid", ""),
        apart=fields.get("apart", False),
        apart_in_llm=fields.get("apart_in_llm", False),
        task=fields.get("task", "generate"),
        token_rules=fields.get("token_rules"),
        priority=fields.get("priority", 0),
        siblings=fields.get("siblings", ()),
        output_token_ids=fields.get("output_token_ids"),
        returns_token_names=fields.get("returns_token_names", False),
    )
    return received(gateway, "gateway", message)


def reserved(request_id: str = "r") -> list[Event]:
    return received(LLM.id, "llm", Reserved(request_id=request_id, attempt=0))


def abort(request_id: str) -> list[Event]:
    return received("gateway-1", "gateway", Abort(request_id=request_id, attempt=0))


def grant(
    vision_id: str, image: int, request_id: str = "r", wait: float = 0.1, has_room: bool = True
) -> list[Event]:
    return received(
        vision_id,
        "vision",
        Grant(request_id=request_id, attempt=0, item=image, wait_seconds=wait, has_room=has_room),
    )


def held(vision_id: str, image: int, request_id: str = "r") -> list[Event]:
    return received(vision_id, "vision", CacheHit(request_id=request_id, attempt=0, item=image))


def busy(vision_id: str, image: int, request_id: str = "r", wait: float = 0.1) -> list[Event]:
    return received(
        vision_id, "vision", Busy(request_id=request_id, attempt=0, item=image, wait_seconds=wait)
    )


def vacancy(vision_id: str, wait: float = 0.0) -> list[Event]:
    return received(vision_id, "vision", Vacancy(wait_seconds=wait))


def failed(vision_id: str, image: int, request_id: str = "r") -> list[Event]:
    message = Failed(
        request_id=request_id,
        attempt=0,
        code="Internal",
        message="the tower failed",
        stage="vision",
        item=image,
    )
    return received(vision_id, "vision", message)


def arrived(image: int, request_id: str = "r") -> list[Event]:
    return received(LLM.id, "llm", ItemReceived(request_id=request_id, attempt=0, item=image))


def rejected(image: int, request_id: str = "r") -> list[Event]:
    return received(
        LLM.id,
        "llm",
        ItemRejected(
            request_id=request_id, attempt=0, item=image, reason="embeddings that are no numbers"
        ),
    )


def offers(sent: Sent) -> list[tuple[str, int]]:
    """Return (replica, image) of each Offer."""
    return [(receiver, message.item) for receiver, message in sent if isinstance(message, Offer)]


def offered_to(sent: Sent) -> dict[int, str]:
    """Return the replica that each image was offered to."""
    return {image: vision_id for vision_id, image in offers(sent)}


def failures(sent: Sent) -> list[tuple[str, str, str, int | None]]:
    return [
        (receiver, m.request_id, m.code, m.item) for receiver, m in sent if isinstance(m, Failed)
    ]


def prompts(sent: Sent) -> list[str]:
    return [message.request_id for _, message in sent if isinstance(message, Prompt)]
