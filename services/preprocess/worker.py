"""The preprocess service's shell: prepares requests one step at a time, and serves in between what
images under way need."""

import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np

from common.errors import Internal, InvalidRequest, ServingError, Unavailable
from common.events import PeerDown, PeerDraining, PeerUp, Received
from common.logs import get_logger
from common.member import Event, Member
from common.messages import Abort, Failed, LlmLoad, Peer, Prompt, Routed, Submit, VisionLoad
from common.progress import UnitTimes
from common.wire import Tensor
from services.preprocess.dispatcher import Dispatcher
from services.preprocess.families.qwen2_5_vl import Image, Preprocessor
from services.preprocess.grammars import Guides
from services.preprocess.in_flight import Handover, Key, PendingItem, Preparation, Sent
from services.preprocess.llm_groups import LlmGroups
from services.preprocess.metrics import PreprocessMetrics
from services.preprocess.sampling_defaults import resolve_sampling, resolve_stopping
from services.preprocess.vision_pool import VisionPool

CHECK_SECONDS = 0.5
UNCONFIRMED_SECONDS = 5.0
"""A prompt that was sent so shortly before its connection is found broken may not have arrived: the
lease, and some."""
MAX_HELD_BYTES = 512 * 2**20
"""Of decoded images that wait to be encoded: beyond it no further image is decoded."""


class Worker:
    def __init__(
        self,
        member: Member,
        preprocessor: Preprocessor,
        preparations: OrderedDict[Key, Preparation],
        handovers: dict[Key, Handover],
        pool: VisionPool,
        metrics: PreprocessMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`preparations` (queued) and `handovers` (in flight) are shared with the member's load
        report."""
        self._member = member
        self._preprocessor = preprocessor
        self._metrics = metrics
        self._clock = clock
        self._preparations = preparations
        self._pool = pool
        self._dispatcher = Dispatcher(member.links, pool, handovers, self._fail, metrics, clock)
        self._groups = LlmGroups(clock)
        self._guides = Guides(preprocessor.checkpoint.path / "tokenizer.json")
        self._times = UnitTimes(least_seconds=2.5)  # a small file may be a large picture
        self._unconfirmed: deque[Sent] = deque()
        self._next_check = 0.0
        self._missing: list[str] | None = None
        self._log = get_logger()

    def run(self) -> None:
        """One step of the oldest request, then whatever came meanwhile: a grant does not wait for a
        request of many images."""
        while (
            events := self._member.take_events(wait=self._next() is None, timeout=self._timeout())
        ) is not None:
            for event in events:
                self._handle(event)
            self._check()
            self._dispatcher.offer_waiting()
            self._member.expected_delay = self._pool.queue_seconds
            if found := self._next():
                self._advance(*found)

    def _timeout(self) -> float | None:
        return CHECK_SECONDS if self._preparations or self._dispatcher.handovers else None

    def _next(self) -> tuple[Key, Preparation] | None:
        """The oldest preparation that can go on."""
        return next(
            (
                (key, preparation)
                for key, preparation in self._preparations.items()
                if self._can_advance(preparation)
            ),
            None,
        )

    def _can_advance(self, preparation: Preparation) -> bool:
        if preparation.is_prepared:
            return (
                self._groups.has_other(preparation.submit.avoid) or self._groups.missing_too_long()
            )
        return not preparation.needs_image or self._dispatcher.num_bytes < MAX_HELD_BYTES

    def _handle(self, event: Event) -> None:
        match event:
            case Received(peer_id=peer_id, message=message):
                self._take(peer_id, message)
            case PeerUp(peer_id=peer_id, role="llm", address=address):
                self._groups.add(Peer(peer_id, address))
            case PeerDraining(peer_id=peer_id, role=role):
                (self._pool if role == "vision" else self._groups).drain(peer_id)
            case PeerDown(peer_id=peer_id, role=role, reason=reason):
                self._log.info("peer gone", peer=peer_id, reason=reason)
                self._lose(peer_id, role, reason)
        if not isinstance(event, Received) or isinstance(event.message, VisionLoad):
            self._tell_state()

    def _take(self, peer_id: str, message: Any) -> None:
        match message:
            case Submit():
                self._preparations[message.request_id, message.attempt] = Preparation(
                    message, peer_id, self._clock()
                )
            case Abort():
                self._drop((message.request_id, message.attempt))
            case LlmLoad():
                self._groups.take_load(peer_id, message)
            case _:
                self._dispatcher.take(peer_id, message)

    def _lose(self, peer_id: str, role: str, reason: str) -> None:
        match role:
            case "vision":
                self._dispatcher.lose_replica(peer_id, reason)
            case "gateway":
                self._drop_where(lambda owned: owned.gateway_id == peer_id)
            case "llm":
                self._groups.lose(peer_id)
                self._lose_handovers(peer_id, reason)

    def _lose_handovers(self, llm_id: str, reason: str) -> None:
        """Their gateways may not see what we see of the language group: their connections to it may
        stand."""
        for key, handover in [
            (k, h) for k, h in self._dispatcher.handovers.items() if h.llm.id == llm_id
        ]:
            self._drop(key)
            self._tell_lost(key, handover.gateway_id, reason)
        for sent in [sent for sent in self._unconfirmed if sent.llm_id == llm_id]:
            self._unconfirmed.remove(sent)
            self._tell_lost(sent.key, sent.gateway_id, reason)

    def _tell_lost(self, key: Key, gateway_id: str, reason: str) -> None:
        self._fail(
            key,
            gateway_id,
            Unavailable(f"preprocess lost the language group: {reason}", stage="llm"),
        )

    def _drop_where(self, wanted: Callable[[Preparation | Handover], bool]) -> None:
        owned: list[tuple[Key, Preparation | Handover]] = [
            *self._preparations.items(),
            *self._dispatcher.handovers.items(),
        ]
        for key in [key for key, one in owned if wanted(one)]:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        self._preparations.pop(key, None)
        self._dispatcher.drop(key)

    def _tell_state(self) -> None:
        """Ready means that a request with images can be handed on."""
        missing = [
            role
            for role, count in (("vision", self._pool.num_replicas), ("llm", len(self._groups)))
            if not count
        ]
        if missing != self._missing:
            self._missing = missing
            self._member.set_missing_roles(missing)

    def _check(self) -> None:
        """What is past its time, now and then."""
        if (now := self._clock()) < self._next_check:
            return
        self._next_check = now + CHECK_SECONDS
        self._dispatcher.give_up()
        while self._unconfirmed and now > self._unconfirmed[0].when + UNCONFIRMED_SECONDS:
            self._unconfirmed.popleft()
        # The gateway has told their clients by now.
        for key in [
            key for key, preparation in self._preparations.items() if now > preparation.deadline
        ]:
            del self._preparations[key]

    # Preparing

    def _advance(self, key: Key, preparation: Preparation) -> None:
        """Tokenizes, or prepares the next image, or hands the request over."""
        try:
            with self._member.progress.unit(self._times, 1):
                self._take_step(key, preparation)
        except ServingError as e:
            self._preparations.pop(key, None)
            self._fail(key, preparation.gateway_id, e)
        except Exception:  # noqa: BLE001 - the outermost loop: what one request's bytes lead to must not end the others
            self._log.exception("request failed", request_id=key[0])
            self._preparations.pop(key, None)
            self._fail(
                key,
                preparation.gateway_id,
                Internal("the request could not be prepared: see the preprocess log"),
            )

    def _take_step(self, key: Key, preparation: Preparation) -> None:
        submit = preparation.submit
        if preparation.token_ids is None:
            preparation.token_ids = self._preprocessor.tokenize(
                submit.prompt_kind, prompt_of(submit)
            )
            if submit.guide_kind:
                guide = submit.guide.text() if submit.guide else ""
                preparation.grammar = Tensor.of_text(self._guides.grammar(submit.guide_kind, guide))
        elif preparation.needs_image:
            self._prepare_image(preparation)
        else:
            del self._preparations[key]
            self._hand_over(key, preparation)

    def _prepare_image(self, preparation: Preparation) -> None:
        began = time.monotonic()
        index = len(preparation.images)
        try:
            preparation.images.append(
                self._preprocessor.image_plan(
                    preparation.submit.images[index].data, self._pool.buckets
                )
            )
        except InvalidRequest as e:
            raise type(e)(f"image {index}: {e.message}", image=index) from e
        preparation.image_seconds.append(time.monotonic() - began)
        self._metrics.image_seconds.observe(preparation.image_seconds[-1])

    def _hand_over(self, key: Key, preparation: Preparation) -> None:
        """The prompt to a language group; its images follow when it has room for their
        embeddings."""
        submit = preparation.submit
        images = preparation.images
        assert preparation.token_ids is not None
        expanded = self._preprocessor.expand(preparation.token_ids, images)
        stopping = resolve_stopping(
            submit.stopping, expanded.num_tokens, self._preprocessor.max_model_len
        )
        llm = self._groups.choose(expanded, [image.mm_hash for image in images], submit.avoid)
        if llm is None:
            raise Unavailable("no language group is connected: try again in a moment", stage="llm")
        name: dict[str, Any] = {"request_id": submit.request_id, "attempt": submit.attempt}
        prompt = Prompt(
            **name,
            gateway_id=preparation.gateway_id,
            token_ids=Tensor.of(expanded.token_ids),
            positions=Tensor.of(expanded.positions),
            rope_delta=expanded.rope_delta,
            placeholders=Tensor.of(expanded.placeholders),
            mm_hashes=Tensor.of(hashes_of(images)),
            sampling=resolve_sampling(
                submit.sampling, self._preprocessor.checkpoint.generation_config
            ),
            stopping=stopping,
            detokenizer=submit.detokenizer,
            timeout=max(0.0, preparation.deadline - self._clock()),
            timings=timings_of(preparation, self._clock()),
            grammar=preparation.grammar,
            output_token_ids=submit.output_token_ids,
        )
        ids = Tensor.of(expanded.token_ids) if submit.return_prompt_token_ids else None
        self._member.links.send(
            preparation.gateway_id, Routed(**name, llm=llm, prompt_token_ids=ids)
        )
        self._member.links.send(llm.id, prompt)
        if images:
            dispatched = {i: PendingItem((*key, i), image) for i, image in enumerate(images)}
            self._dispatcher.begin(
                key, Handover(preparation.gateway_id, llm, preparation.deadline, dispatched)
            )
        else:
            self._unconfirmed.append(Sent(self._clock(), key, preparation.gateway_id, llm.id))
        self._log.debug(
            "handed over",
            request_id=submit.request_id,
            num_tokens=expanded.num_tokens,
            images=len(images),
        )

    def _fail(self, key: Key, gateway_id: str, error: ServingError) -> None:
        message = Failed(
            request_id=key[0],
            attempt=key[1],
            code=error.code,
            message=error.message[:2000],
            stage=error.stage or "preprocess",
            image=error.image,
        )
        self._member.links.send(gateway_id, message)


def prompt_of(submit: Submit) -> Any:
    return (
        submit.prompt.numpy()
        if submit.prompt_kind == "token_ids"
        else json.loads(submit.prompt.bytes())
    )


def hashes_of(images: list[Image]) -> np.ndarray:
    """uint8 [num_images, 32]."""
    return np.array([list(bytes.fromhex(image.mm_hash)) for image in images], np.uint8).reshape(
        -1, 32
    )


def timings_of(preparation: Preparation, now: float) -> Tensor:
    timings = {
        "preprocess_seconds": now - preparation.received,
        "images": [{"preprocess_seconds": seconds} for seconds in preparation.image_seconds],
    }
    return Tensor.of_text(json.dumps(timings))
