"""The preprocess service's shell: prepares requests one step at a time, and owns each image until its embeddings have arrived."""

import itertools
import json
import time
from collections import OrderedDict
from typing import Any

import numpy as np

from common.errors import Internal, InvalidRequest, ServingError, Unavailable
from common.links import Down, Event, Received, Up
from common.logs import get_logger
from common.member import Member
from common.messages import (
    Abort,
    Failed,
    Grant,
    ImageReceived,
    ImageRejected,
    Offer,
    Peer,
    Pixels,
    Prompt,
    Routed,
    Submit,
)
from common.wire import Tensor
from services.preprocess.families.qwen2_5_vl import Image, Preprocessor
from services.preprocess.guides import Guides
from services.preprocess.sampling_defaults import resolve_sampling, resolve_stopping
from services.preprocess.under_way import Dispatched, Handover, Key, Preparation

MAX_DISPATCHES = 3
"""How many replicas may try one image."""


class Worker:
    def __init__(
        self, member: Member, preprocessor: Preprocessor, preparations: OrderedDict[Key, Preparation], handovers: dict[Key, Handover]
    ) -> None:
        """`preparations` (queued) and `handovers` (in flight) are shared with the member's load report."""
        self._member, self._preprocessor = member, preprocessor
        self._preparations, self._handovers = preparations, handovers
        self._peers: dict[str, dict[str, Peer]] = {"vision": {}, "llm": {}}
        self._guides = Guides(preprocessor.checkpoint.path / "tokenizer.json")
        self._turn = itertools.count()
        self._log = get_logger()

    def run(self) -> None:
        """One step of the oldest request, then whatever came meanwhile: a grant does not wait for a request of many images."""
        while (events := self._member.waiting_events(wait=not self._preparations)) is not None:
            for event in events:
                self._handle(event)
            if self._preparations:
                key, preparation = next(iter(self._preparations.items()))
                self._advance(key, preparation)

    def _handle(self, event: Event) -> None:
        match event:
            case Received(peer_id=peer_id, message=message):
                self._take(peer_id, message)
            case Up(peer_id=peer_id, role=role, address=address) if role in self._peers:
                self._peers[role][peer_id] = Peer(peer_id, address)
                self._tell_state()
            case Down(peer_id=peer_id, role=role, reason=reason):
                self._log.info("peer gone", peer=peer_id, reason=reason)
                self._lose(peer_id, role, reason)

    def _take(self, peer_id: str, message: Any) -> None:
        key = (message.request_id, message.attempt)
        match message:
            case Submit():
                self._preparations[key] = Preparation(message, peer_id)
            case Abort():
                self._drop(key)
            case Grant(image=image):
                self._send_pixels(key, peer_id, image)
            case ImageReceived(image=image):
                self._let_go(key, image)
            case ImageRejected(image=image, reason=reason) | Failed(image=int(image), message=reason):
                self._dispatch_again(key, image, reason)

    def _lose(self, peer_id: str, role: str, reason: str) -> None:
        self._peers.get(role, {}).pop(peer_id, None)
        self._tell_state()
        match role:
            case "vision":
                lost = [(key, i) for key, h in self._handovers.items() for i, d in h.images.items() if d.vision_id == peer_id]
                for key, image in lost:
                    self._dispatch_again(key, image, f"the vision replica was lost: {reason}")
            case "gateway":
                for key in [k for k, p in self._preparations.items() if p.gateway_id == peer_id]:
                    self._drop(key)
                for key in [k for k, h in self._handovers.items() if h.gateway_id == peer_id]:
                    self._drop(key)
            case "llm":  # its gateway sees the death, too, and decides what becomes of the request
                for key in [k for k, h in self._handovers.items() if h.llm.id == peer_id]:
                    self._drop(key)

    def _tell_state(self) -> None:
        """Ready means that a request with images can be handed on."""
        missing = [role for role, peers in self._peers.items() if not peers]
        self._member.waits_for(missing)

    # Preparing

    def _advance(self, key: Key, preparation: Preparation) -> None:
        """Tokenizes, or prepares the next image, or hands the request over."""
        if time.monotonic() > preparation.deadline:
            del self._preparations[key]  # the gateway has told its client by now
            return
        try:
            self._take_step(key, preparation)
        except ServingError as e:
            self._preparations.pop(key, None)
            self._fail(key, preparation.gateway_id, e)
        except Exception:  # noqa: BLE001 - the outermost loop: what one request's bytes lead to must not end the others
            self._log.exception("request failed", request_id=key[0])
            self._preparations.pop(key, None)
            self._fail(key, preparation.gateway_id, Internal("the request could not be prepared: see the preprocess log"))

    def _take_step(self, key: Key, preparation: Preparation) -> None:
        submit = preparation.submit
        if preparation.token_ids is None:
            preparation.token_ids = self._preprocessor.tokenize(submit.prompt_kind, prompt_of(submit))
            if submit.guide_kind:
                guide = submit.guide.text() if submit.guide else ""
                preparation.grammar = Tensor.of_text(self._guides.grammar(submit.guide_kind, guide))
        elif len(preparation.images) < len(submit.images):
            self._prepare_image(preparation)
        else:
            del self._preparations[key]
            self._hand_over(key, preparation)

    def _prepare_image(self, preparation: Preparation) -> None:
        began, index = time.monotonic(), len(preparation.images)
        try:
            preparation.images.append(self._preprocessor.image_plan(preparation.submit.images[index].data))
        except InvalidRequest as e:
            raise type(e)(f"image {index}: {e.message}", image=index) from e
        preparation.image_seconds.append(time.monotonic() - began)

    def _hand_over(self, key: Key, preparation: Preparation) -> None:
        """The prompt to a language group, and each image to a replica."""
        submit, images = preparation.submit, preparation.images
        assert preparation.token_ids is not None
        expanded = self._preprocessor.expand(preparation.token_ids, images)
        stopping = resolve_stopping(submit.stopping, expanded.num_tokens, self._preprocessor.max_model_len)
        sampling = resolve_sampling(submit.sampling, self._preprocessor.checkpoint.generation_config)
        llm = self._choose_llm(submit.avoid)
        name: dict[str, Any] = {"request_id": submit.request_id, "attempt": submit.attempt}
        prompt = Prompt(
            **name,
            gateway_id=preparation.gateway_id,
            token_ids=Tensor.of(expanded.token_ids),
            positions=Tensor.of(expanded.positions),
            rope_delta=expanded.rope_delta,
            placeholders=Tensor.of(expanded.placeholders),
            mm_hashes=Tensor.of(hashes_of(images)),
            sampling=sampling,
            stopping=stopping,
            detokenizer=submit.detokenizer,
            timeout=max(0.0, preparation.deadline - time.monotonic()),
            timings=timings_of(preparation),
            grammar=preparation.grammar,
            output_token_ids=submit.output_token_ids,
        )
        ids = Tensor.of(expanded.token_ids) if submit.return_prompt_token_ids else None
        self._member.links.send(preparation.gateway_id, Routed(**name, llm=llm, prompt_token_ids=ids))
        self._member.links.send(llm.id, prompt)
        if images:
            self._handovers[key] = Handover(preparation.gateway_id, llm, preparation.deadline)
            for index, image in enumerate(images):
                if key in self._handovers:  # until one finds no replica
                    self._dispatch(key, index, image, dispatches=1)
        self._log.debug("handed over", request_id=submit.request_id, num_tokens=expanded.num_tokens, images=len(images))

    def _choose_llm(self, avoid: str) -> Peer:
        groups = [llm for llm in self._peers["llm"].values() if llm.id != avoid]
        if not groups:
            raise Unavailable("no language group is connected: try again in a moment", stage="llm")
        return groups[next(self._turn) % len(groups)]

    # Images under way

    def _dispatch(self, key: Key, index: int, image: Image, dispatches: int, avoid: str = "") -> None:
        """Offers an image to the replica that has the fewest of ours in hand."""
        handover = self._handovers[key]
        held = {vision_id: 0 for vision_id in self._peers["vision"] if vision_id != avoid}
        for dispatched in (d for h in self._handovers.values() for d in h.images.values()):
            if dispatched.vision_id in held:
                held[dispatched.vision_id] += 1
        if not held:
            self._fail_handover(
                key, Unavailable(f"image {index}: no vision replica is there to encode it: try again in a moment", "vision", index)
            )
            return
        vision_id = min(held, key=held.__getitem__)
        handover.images[index] = Dispatched(image, vision_id, dispatches)
        offer = Offer(
            request_id=key[0],
            attempt=key[1],
            image=index,
            mm_hash=image.mm_hash,
            grid_thw=image.grid_thw,
            num_patches=image.num_patches,
            llm=handover.llm,
            timeout=max(0.0, handover.deadline - time.monotonic()),
        )
        self._member.links.send(vision_id, offer)

    def _dispatch_again(self, key: Key, index: int, reason: str) -> None:
        """One image alone goes to another replica."""
        handover = self._handovers.get(key)
        dispatched = handover.images.pop(index, None) if handover else None
        if dispatched is None:
            return
        self._log.warning("image failed", request_id=key[0], image=index, vision=dispatched.vision_id, reason=reason)
        if dispatched.dispatches == MAX_DISPATCHES:
            self._fail_handover(key, Internal(f"image {index} was given up after {MAX_DISPATCHES} attempts: {reason}", "vision", index))
        else:
            avoid = dispatched.vision_id if len(self._peers["vision"]) > 1 else ""
            self._dispatch(key, index, dispatched.image, dispatched.dispatches + 1, avoid)

    def _send_pixels(self, key: Key, vision_id: str, index: int) -> None:
        handover = self._handovers.get(key)
        if handover is None:
            self._member.links.send(vision_id, Abort(request_id=key[0], attempt=key[1]))
            return
        dispatched = handover.images.get(index)
        if dispatched is None or dispatched.vision_id != vision_id:
            return  # a late one; no Abort, which would take the request's other images from the replica
        patches = Tensor.of(dispatched.image.patches())
        self._member.links.send(vision_id, Pixels(request_id=key[0], attempt=key[1], image=index, patches=patches))

    def _let_go(self, key: Key, index: int) -> None:
        if handover := self._handovers.get(key):
            handover.images.pop(index, None)
            if not handover.images:
                del self._handovers[key]

    # Endings

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

    def _fail_handover(self, key: Key, error: ServingError) -> None:
        gateway_id = self._handovers[key].gateway_id
        self._drop(key)
        self._fail(key, gateway_id, error)

    def _drop(self, key: Key) -> None:
        """Frees what is held for the request, here and at the replicas that have its images."""
        self._preparations.pop(key, None)
        if handover := self._handovers.pop(key, None):
            for vision_id in {d.vision_id for d in handover.images.values()}:
                self._member.links.send(vision_id, Abort(request_id=key[0], attempt=key[1]))


def prompt_of(submit: Submit) -> Any:
    return submit.prompt.numpy() if submit.prompt_kind == "token_ids" else json.loads(submit.prompt.bytes())


def hashes_of(images: list[Image]) -> np.ndarray:
    """uint8 [num_images, 32]."""
    return np.array([list(bytes.fromhex(image.mm_hash)) for image in images], np.uint8).reshape(-1, 32)


def timings_of(preparation: Preparation) -> Tensor:
    timings = {
        "preprocess_seconds": time.monotonic() - preparation.received,
        "images": [{"preprocess_seconds": seconds} for seconds in preparation.image_seconds],
    }
    return Tensor.of_text(json.dumps(timings))
