"""Preprocess as a target. What its sandboxes do happens in this process."""

import json
from typing import Any

import numpy as np

from common.events import Event
from common.messages import (
    Abort,
    Busy,
    CacheHit,
    Cleared,
    Failed,
    Grant,
    Item,
    ItemReceived,
    ItemRejected,
    LlmLoad,
    Message,
    Noted,
    Offer,
    Peer,
    Pixels,
    Prompt,
    RequestMessage,
    Reserved,
    Sampling,
    Stopping,
    Submit,
    TokenRules,
    VisionLoad,
)
from common.wire import Tensor
from services.preprocess.metrics import PreprocessMetrics
from services.preprocess.vision_pool import VisionPool
from services.preprocess.worker import Worker
from tests.fakes import FakeMember
from tests.fuzz.actions import Action, Conversation, Member, Say, Work
from tests.fuzz.clock import CLOCK
from tests.fuzz.making import Maker
from tests.fuzz.targets import ADDRESS, ATTEMPTS, REQUEST_IDS, Target, innocent_key
from tests.preprocess.builders import IMAGES, PREPROCESSOR, InlineTasks

GATEWAYS = (Member("gateway-1", "gateway"), Member("gateway-2", "gateway"))
REPLICAS = (Member("vision-1", "vision"), Member("vision-2", "vision"))
GROUPS = (Member("llm-1", "llm"), Member("llm-2", "llm"))
GATEWAY, REPLICA, GROUP = (
    Member("gateway-i", "gateway"),
    Member("vision-i", "vision"),
    Member("llm-i", "llm"),
)
LOAD = VisionLoad(sizes=(16,), seconds=(0.1,))
MOMENT = 10.0
"""Seconds for which a prompt without images is remembered, and more."""


class PreprocessTarget(Target):
    role = "preprocess"
    peers = GATEWAYS + REPLICAS + GROUPS

    def __init__(self) -> None:
        super().__init__()
        self._member = FakeMember()
        self._member.links = self.door  # type: ignore[assignment]
        self._pool = VisionPool(CLOCK)
        metrics = PreprocessMetrics(self._pool)
        tasks = InlineTasks(PREPROCESSOR, self._member)
        member: Any = self._member
        self._worker = Worker(member, PREPROCESSOR, tasks, self._pool, metrics, CLOCK)

    def play(self, events: list[Event[Any]]) -> None:
        self._member.play(self._worker, events)

    def finish(self) -> None:
        CLOCK.ahead += MOMENT
        self.play([])

    def converse(self, maker: Maker) -> list[Action]:
        draw = maker.draw
        request_id = draw.choice(REQUEST_IDS)
        attempt = draw.choice(ATTEMPTS)
        gateway = draw.choice(GATEWAYS)
        request = submit(request_id, attempt, draw.choice([0, 0, 1, 2]), draw.randrange(8))
        request.apart = draw.random() < 0.15
        if draw.random() < 0.1:
            request.guide_kind = draw.choice(["json_object", "json_schema", "regex"])
            request.guide = Tensor.of_text(draw.choice(["{}", "[ab]+", '{"type": "object"}']))
        found: Conversation = [Say(each, LOAD) for each in REPLICAS]
        found.append(Say(gateway, request))
        if request.apart:
            found += [Say(gateway, Noted(**request.ids)), Say(gateway, Cleared(**request.ids))]
        for group in GROUPS:
            found.append(Say(group, LlmLoad(running=1, waiting=0, free_tokens=1000)))
            found.append(Say(group, Reserved(**request.ids)))
        for item in range(len(request.items)):
            ids = {**request.ids, "item": item}
            answers: list[Message] = [
                Grant(**ids),
                CacheHit(**ids),
                Busy(**ids),
                maker.make(Failed),
            ]
            ends: list[Message] = [ItemReceived(**ids), ItemRejected(**ids, reason="not finite")]
            found += [Say(replica, draw.choice(answers)) for replica in REPLICAS]
            found += [Say(group, draw.choice(ends)) for group in GROUPS]
        if draw.random() < 0.2:
            found.append(Say(gateway, Abort(**request.ids)))
        return [*found]

    def question(self, number: int) -> list[Action]:
        request = submit(*innocent_key(number), 1, 0)
        ids = {**request.ids, "item": 0}
        return [
            Say(REPLICA, LOAD),
            Say(GROUP, LlmLoad(running=0, waiting=0, free_tokens=1000)),
            Say(GATEWAY, request),
            Work(),
            Say(GROUP, Reserved(**request.ids)),
            Work(),
            Say(REPLICA, Grant(**ids)),
            Work(),
            Say(GROUP, ItemReceived(**ids)),
            Work(),
        ]

    def answer(self, number: int, sent: list[tuple[str, Any]]) -> Any:
        """Return what was sent about the request to those that may be trusted.

        Others may submit a request of the same name once this one was handed over.
        """
        return [
            (peer_id, type(message).__name__, told(message))
            for peer_id, message in sent
            if isinstance(message, RequestMessage)
            and message.key == innocent_key(number)
            and peer_id in (GATEWAY.id, REPLICA.id, GROUP.id)
            and getattr(message, "gateway_id", GATEWAY.id) == GATEWAY.id
        ]

    def held(self) -> dict[str, float]:
        worker = self._worker
        dispatcher = worker._dispatcher
        return {
            "preparations": len(worker._preparations),
            "handovers": len(dispatcher.handovers),
            "bytes": dispatcher.num_bytes + worker._prepared_bytes,
            "unconfirmed": len(worker._unconfirmed),
            "turn": float(worker._turn.holder is not None),
            "items that wait": self._pool.num_waiting,
            "seconds that wait": float(self._pool.queue_seconds > 1e-6),
            "replicas": len(self._pool._replicas),
            "groups": len(worker._groups),
        }


class GatewaysTarget(PreprocessTarget):
    """Preprocess whose gateways send anything, while its replica and its group can be trusted.

    So an innocent request among them must be handed over.
    """

    name = "preprocess from gateways"
    peers = GATEWAYS
    innocents = (GATEWAY, REPLICA, GROUP)

    def __init__(self) -> None:
        super().__init__()
        for peer in self.innocents:
            self.door.join(peer.id, peer.role)

    def question(self, number: int) -> list[Action]:
        """Return the question with the request first, so that no other one takes its name."""
        loads, rest = (found := super().question(number))[:2], found[2:]
        return [*rest[:1], *loads, *rest[1:]]

    def converse(self, maker: Maker) -> list[Action]:
        found = super().converse(maker)
        return [each for each in found if isinstance(each, Say) and each.peer in GATEWAYS]

    def held(self) -> dict[str, float]:
        return super().held() | {"replicas": 0, "groups": 0}


RULES = TokenRules(
    bias_token_ids=Tensor.of_int64([5]),
    bias_values=Tensor.of(np.array([0.5], np.float32)),
    allowed_token_ids=Tensor.of_int64([5, 6]),
    bad_words=Tensor.of_text('["no", " "]'),
)


def submit(request_id: str, attempt: int, num_images: int, first_image: int) -> Submit:
    """Return a request as a gateway sends it."""
    files = [IMAGES[(first_image + n) % len(IMAGES)] for n in range(num_images)]
    content = [*({"type": "image"} for _ in files), {"type": "text", "text": "Read it."}]
    return Submit(
        request_id=request_id,
        attempt=attempt,
        prompt_kind="messages",
        prompt=Tensor.of_text(json.dumps([{"role": "user", "content": content}])),
        items=tuple(Item("image", Tensor.of_bytes(file)) for file in files),
        sampling=Sampling(),
        stopping=Stopping(),
        detokenizer=Peer("detokenizer-1", ADDRESS),
        timeout=60.0,
        token_rules=RULES,
    )


def told(message: Message) -> Any:
    """Return what a message says that must not depend on other requests."""
    match message:
        case Prompt():
            return message.token_ids.bytes(), message.mm_hashes.bytes(), message.sampling
        case Offer():
            return message.mm_hash, message.grid_thw
        case Pixels():
            return hash(message.patches.bytes())
    return None
