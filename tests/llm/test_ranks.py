"""ExecuteStep plans on their way from rank 0 to the others."""

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from common.events import Event, PeerUp, Received
from common.messages import HOPS, ExecuteStep
from common.progress import Progress
from common.wire import decode, encode
from services.llm.ranks import StepLimits, follow, lead, to_message, to_plan
from services.llm.step_plan import StepPlan
from tests.fakes import FakeLinks

LIMITS = StepLimits(
    vocab_size=10, num_blocks=4, block_size=16, input_width=4, num_position_components=3
)


class ScriptedMember:
    """Its events are a list."""

    def __init__(self, events: list[Event]) -> None:
        self.links = FakeLinks()
        self.waiting = deque(events)
        self.progress = Progress()

    def next_event(self) -> Event | None:
        return self.waiting.popleft() if self.waiting else None

    def requeue(self, events: list[Event]) -> None:
        self.waiting.extend(events)

    def events(self) -> Iterator[Event]:
        while self.waiting:
            yield self.waiting.popleft()


def plan(num_tokens: int = 3) -> StepPlan:
    ids = np.arange(num_tokens)
    return StepPlan(
        token_ids=ids,
        positions=np.stack([ids, ids, ids]),
        slot_mapping=ids + 16,
        query_lens=np.array([num_tokens]),
        context_lens=np.array([num_tokens]),
        block_tables=np.array([[1, 0]]),
        item_rows=np.array([1]),
        sampled_rows=np.array([num_tokens - 1]),
        rope_parameters=np.array([3]),
        adapters=np.array([1]),
        block_copies=np.array([[1, 3]]),
    )


def assert_equal(a: StepPlan, b: StepPlan) -> None:
    for name in StepPlan.__dataclass_fields__:
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_a_plan_comes_out_of_the_wire_as_it_went_in() -> None:
    sent = to_message(plan(), [torch.ones(1, 4, dtype=torch.bfloat16)])
    came = decode(encode(sent), HOPS["llm", "llm"])
    assert isinstance(came, ExecuteStep)
    assert_equal(to_plan(came), plan())
    assert came.embeddings[0].dtype == "bfloat16" and came.embeddings[0].shape == (1, 4)


def test_rank_0_waits_for_all_ranks_and_then_sends_each_step_to_all() -> None:
    early = Received("gateway", "gateway", object())
    member = ScriptedMember(
        [PeerUp("llm.1", "llm"), early, PeerUp("preprocess", "preprocess"), PeerUp("llm.2", "llm")]
    )
    executed: list[StepPlan] = []
    execute = lead(member, {"llm.1", "llm.2"}, lambda p, e: executed.append(p) or torch.zeros(1))
    execute(plan(), [])
    assert len(executed) == 1
    assert sorted(
        peer for peer, message in member.links.sent if isinstance(message, ExecuteStep)
    ) == ["llm.1", "llm.2"]
    assert early in member.waiting, "what came too early comes again"


def test_the_other_ranks_execute_what_they_are_sent_in_order() -> None:
    steps = [to_message(plan(n), [torch.full((1, 4), float(n))]) for n in (3, 2)]
    member = ScriptedMember(
        [PeerUp("llm.0", "llm"), *(Received("llm.0", "llm", step) for step in steps)]
    )
    executed: list[tuple[int, float]] = []

    def execute(step: StepPlan, embeddings: list[torch.Tensor]) -> torch.Tensor:
        executed.append((step.num_tokens, embeddings[0].mean().item()))
        return torch.zeros(0)

    follow(member, "llm.0", LIMITS, execute)
    assert executed == [(3, 3.0), (2, 2.0)]
