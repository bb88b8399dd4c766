"""A rank of a language group other than rank 0 as a target."""

from typing import Any

import numpy as np
import torch

from common.events import Event
from common.messages import ExecuteStep
from services.llm.ranks import follow, to_message
from services.llm.step_plan import StepPlan
from tests.fakes import FakeMember
from tests.fuzz.actions import Action, Member, Say
from tests.fuzz.making import Maker
from tests.fuzz.targets import Target
from tests.llm.test_ranks import LIMITS, plan

LEADER = Member("llm.0", "llm")


class RankTarget(Target):
    """Only the steps of rank 0 are executed. A wrong one may end the process, but no other may."""

    role = "llm"
    name = "rank"
    peers = (
        LEADER,
        Member("llm.9", "llm"),
        Member("gateway", "gateway"),
        Member("preprocess", "preprocess"),
        Member("vision", "vision"),
    )

    def __init__(self) -> None:
        super().__init__()
        self._member = FakeMember()
        self._member.links = self.door  # type: ignore[assignment]
        self._num_executed = 0

    def play(self, events: list[Event[Any]]) -> None:
        for event in events:
            self._member._script = iter([[event]])
            is_leaders = getattr(event, "peer_id", "") == LEADER.id
            before = self._num_executed
            try:
                member: Any = self._member
                follow(member, LEADER.id, LIMITS, self._execute)
            except (ValueError, IndexError):
                assert is_leaders, "a message of another peer ends the process"
            assert is_leaders or self._num_executed == before, "a step of another peer is executed"

    def _execute(self, plan: StepPlan, embeddings: list[torch.Tensor]) -> torch.Tensor:
        """Use every index of the plan as a kernel would, which does not check them."""
        vocabulary = np.zeros(LIMITS.vocab_size)
        cache = np.zeros(LIMITS.num_blocks * LIMITS.block_size)
        rows = np.zeros(plan.num_tokens)
        for indices, array in (
            (plan.token_ids, vocabulary),
            (plan.slot_mapping, cache),
            (plan.block_tables * LIMITS.block_size, cache),
            (plan.positions, cache),
            (plan.item_rows, rows),
            (plan.sampled_rows, rows),
        ):
            assert not indices.size or indices.min() >= 0
            array[indices] = 1
        last = (plan.context_lens - 1) // LIMITS.block_size
        np.take_along_axis(plan.block_tables, last[:, None], axis=1)
        rows[plan.item_rows] = np.concatenate(
            [np.zeros(0), *(e[:, 0].float().numpy() for e in embeddings)]
        )
        self._num_executed += 1
        return torch.zeros(0)

    def converse(self, maker: Maker) -> list[Action]:
        return [Say(maker.draw.choice(self.peers[:2]), step(maker.draw.choice([2, 3])))]

    def question(self, number: int) -> list[Action]:
        return [Say(LEADER, step(3))]

    def ask(self, number: int) -> Any:
        """Return how many steps the rank executes for one of rank 0."""
        before = self._num_executed
        self.perform(self.question(number))
        return self._num_executed - before

    def answer(self, number: int, sent: list[tuple[str, Any]]) -> Any:
        raise NotImplementedError("a rank answers nothing")

    def held(self) -> dict[str, float]:
        return {}


def step(num_tokens: int) -> ExecuteStep:
    return to_message(plan(num_tokens), [torch.ones(1, 4)])
