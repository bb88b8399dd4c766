"""Rank 0 of a language group as a target."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher

from common.checkpoint import open_checkpoint
from common.events import Event
from common.messages import (
    Abort,
    Cleared,
    Embeddings,
    Failed,
    ItemRejected,
    Message,
    Noted,
    Peer,
    Prompt,
    Repetition,
    RequestMessage,
    StopFound,
    TokenRules,
    Tokens,
)
from common.vocabulary import open_vocabulary
from common.wire import Tensor
from compute.torch_tensors import to_wire
from services.llm.engine import Engine
from services.llm.guided_decoding import GuidedDecoding
from services.llm.sampler import Sampler
from services.llm.step_plan import StepPlan
from services.llm.worker import Worker
from tests.fakes import FakeMember
from tests.fuzz.actions import Conversation, Member, Say
from tests.fuzz.making import Maker
from tests.fuzz.targets import ADDRESS, ATTEMPTS, REQUEST_IDS, Target, innocent_key
from tests.llm.builders import HIDDEN_SIZE, Image, create_prompt, create_scheduler
from tests.llm.test_engine import NUM_BLOCKS, LogitsRunner, images
from tests.system.running import ROOT

VOCABULARY = open_vocabulary(open_checkpoint(ROOT / "models" / "tiny-ocr"))
VOCAB_SIZE = 288
END = 258
PREPROCESSES = (Member("preprocess", "preprocess"), Member("preprocess-2", "preprocess"))
GATEWAYS = (Member("gateway", "gateway"), Member("gateway-2", "gateway"))
DETOKENIZER = Member("detokenizer", "detokenizer")
VISION = Member("vision", "vision")
INNOCENTS = (
    Member("preprocess-i", "preprocess"),
    Member("gateway-i", "gateway"),
    Member("vision-i", "vision"),
    Member("detokenizer-i", "detokenizer"),
)
IMAGES: tuple[tuple[Image, ...], ...] = ((), (), ((2, 5, 1),), ((0, 2, 2), (3, 3, 1)))
GRAMMARS = (None, None, None, LLMatcher.grammar_from_regex("[a-c]{2,5}"), "no grammar")
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"num_logprobs": 2},
    {"num_prompt_logprobs": 2},
    {"temperature": 1.0, "seed": 5},
)
RULES = TokenRules(
    bias_token_ids=Tensor.of_int64([5, 6, 7]),
    bias_values=Tensor.of(np.array([100, -100, 0.5], np.float32)),
    allowed_token_ids=Tensor.of_int64([*range(40)]),
    bad_words=Tensor.of_text("[[5], [9, 9], [1, 2, 3]]"),
)


class LlmTarget(Target):
    role = "llm"
    peers = (
        *PREPROCESSES,
        *GATEWAYS,
        DETOKENIZER,
        VISION,
        Member("llm.1", "llm"),
        Member("detokenizer-2", "detokenizer"),
    )
    innocents = INNOCENTS

    def __init__(self) -> None:
        super().__init__()
        self._member = FakeMember()
        self._member.links = self.door  # type: ignore[assignment]
        runner = LogitsRunner(NUM_BLOCKS)
        guided = GuidedDecoding(lambda: VOCABULARY, VOCAB_SIZE, (END,))
        scheduler = create_scheduler(num_blocks=NUM_BLOCKS)

        def execute(plan: StepPlan, embeddings: list[torch.Tensor]) -> torch.Tensor:
            """Return logits of all tokens. Those that the fake model does not know are unlikely."""
            logits = runner.execute(plan, embeddings)
            return torch.nn.functional.pad(logits, (0, VOCAB_SIZE - logits.shape[1]), value=-9.0)

        self._engine = Engine(scheduler, execute, Sampler(), guided, HIDDEN_SIZE, ())
        self._worker = Worker(self._member, self._engine)  # type: ignore[arg-type]
        for peer in self.innocents:
            self.door.join(peer.id, peer.role)

    def pools(self, number: int) -> dict[str, Sequence[Any]]:
        hashes = tuple(hash_of(content) for content in (1, 2))
        return super().pools(number) | {
            "mm_hash": hashes,
            "adapter": ("", "unknown"),
            "rope_parameter": (0, 3),
        }

    def play(self, events: list[Event[Any]]) -> None:
        self._member.play(self._worker, events)

    def finish(self) -> None:
        while self._engine.is_compiling:
            self.play([])
        self.play([])

    def converse(self, maker: Maker) -> Conversation:
        draw = maker.draw
        request_id = draw.choice(REQUEST_IDS)
        attempt = draw.choice(ATTEMPTS)
        gateway = draw.choice(GATEWAYS)
        preprocess = draw.choice(PREPROCESSES)
        grammar = draw.choice(GRAMMARS)
        prompt = create_prompt(
            request_id,
            attempt=attempt,
            gateway_id=gateway.id,
            images=draw.choice(IMAGES),
            num_tokens=draw.choice([8, 9, 20]),
            max_tokens=draw.choice([1, 4, 12]),
            sampling=draw.choice(SAMPLINGS),
            repetition=draw.choice([None, Repetition(max_pattern_size=3, min_count=2)]),
            apart=draw.random() < 0.15,
        )
        prompt.token_rules = draw.choice([None, None, RULES])
        prompt.grammar = Tensor.of_text(grammar) if grammar else None
        found = [Say(preprocess, prompt), *map(from_vision, embeddings_of(prompt))]
        if prompt.apart and draw.random() < 0.8:
            found.append(Say(gateway, Noted(**prompt.ids)))
            found.append(Say(gateway, Cleared(**prompt.ids)))
        ends: list[Message | None] = [Abort(**prompt.ids), StopFound(**prompt.ids), None, None]
        match end := draw.choice(ends):
            case Abort():
                found.append(Say(draw.choice([gateway, preprocess]), end))
            case StopFound():
                found.append(Say(DETOKENIZER, end))
        return found

    def question(self, number: int) -> Conversation:
        preprocess, gateway, vision, detokenizer = INNOCENTS
        request_id, attempt = innocent_key(number)
        prompt = create_prompt(
            request_id,
            attempt=attempt,
            gateway_id=gateway.id,
            images=((2, 5, 5),),  # no other peer knows the name of this image
        )
        prompt.detokenizer = Peer(detokenizer.id, ADDRESS)
        return [Say(preprocess, prompt), *(Say(vision, each) for each in embeddings_of(prompt))]

    def answer(self, number: int, sent: list[tuple[str, Any]]) -> Any:
        key = innocent_key(number)
        own = [m for _, m in sent if isinstance(m, RequestMessage) and m.key == key]
        assert not any(isinstance(m, ItemRejected | Failed) for m in own)
        return [
            (peer_id, m.token_ids.numpy().tolist(), m.finish_reason)
            for peer_id, m in sent
            if isinstance(m, Tokens) and m.key == key
        ]

    def held(self) -> dict[str, float]:
        engine = self._engine
        scheduler = engine.scheduler
        return {
            "requests": len(engine.requests) + len(scheduler.running) + len(scheduler.waiting),
            "requests in the sampler": len(engine.sampler._requests),
            "grammars": len(engine.guided_decoding._matchers) + engine.guided_decoding.is_compiling,
            "blocks": NUM_BLOCKS - scheduler.pool.num_free,
            "rows of embeddings": engine.budget.num_tokens - engine.budget.num_free,
            "waiting for rows": len(engine.budget._waiting) + len(engine.budget._held),
            "turn": float(scheduler.turn.holder is not None),
            "visitors": len(self._worker._visitors - {peer.id for peer in INNOCENTS}),
            "peers": len(self._worker._report._peers - {peer.id for peer in INNOCENTS}),
        }


def hash_of(content: int) -> str:
    """Return the name of an image of the fake model."""
    return (bytes([content]) * 32).hex()


def from_vision(message: Message) -> Say:
    return Say(VISION, message)


def embeddings_of(prompt: Prompt) -> list[Message]:
    """Return what vision sends for the images of a prompt."""
    lengths = prompt.placeholders.numpy()[:, 1].tolist()
    contents = prompt.mm_hashes.numpy()[:, 0].tolist()
    return [
        Embeddings(
            **prompt.ids,
            item=item,
            mm_hash=hash_of(content),
            embeddings=to_wire(images(content, length)),
            preprocess_id="preprocess",
        )
        for item, (content, length) in enumerate(zip(contents, lengths, strict=True))
    ]
