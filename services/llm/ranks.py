"""Rank 0 sends each step plan to the other ranks of its group, which only execute it."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import assert_never

from torch import Tensor

from common.events import PeerUp, Received
from common.member import Event, Member
from common.messages import ExecuteStep, LlmInbound, RankInbound
from common.progress import UnitTimes
from common.wire import Tensor as WireTensor
from compute.torch_tensors import to_torch, to_wire
from services.llm.step_plan import StepPlan

Execute = Callable[[StepPlan, list[Tensor]], Tensor]
"""Runs one step and returns its logits."""

CONTEXT_TOKENS = 8192
"""Attention to this many tokens takes about as long as everything else for one token."""


def lead(member: Member[LlmInbound], num_followers: int, execute: Execute) -> Execute:
    """Wait for the other ranks to connect; return an `execute` that makes all ranks execute."""
    followers: set[str] = set()
    early: list[Event[LlmInbound]] = []
    while len(followers) < num_followers:
        event = member.next_event()
        if event is None:
            break
        if isinstance(event, PeerUp) and event.role == "llm":
            followers.add(event.peer_id)
        else:
            early.append(event)
    member.requeue(early)
    times = UnitTimes()

    def execute_on_all(plan: StepPlan, embeddings: list[Tensor]) -> Tensor:
        if followers:
            step = to_message(plan, embeddings)
            for follower in followers:
                member.links.send(follower, step)
        with member.progress.unit(times, size_of(plan)):
            return execute(plan, embeddings)

    return execute_on_all


def follow(member: Member[RankInbound], execute: Execute) -> None:
    """Execute what rank 0 sends until the process must stop."""
    times = UnitTimes()
    for event in member.events():
        if isinstance(event, Received):
            step: RankInbound = event.message
            match step:
                case ExecuteStep():
                    plan = to_plan(step)
                    with member.progress.unit(times, size_of(plan)):
                        execute(plan, [to_torch(part) for part in step.embeddings])
                case _:
                    assert_never(step)


def size_of(plan: StepPlan) -> int:
    """Return the size of a step as a unit of work, in tokens."""
    return plan.num_tokens + int(plan.query_lens @ plan.context_lens) // CONTEXT_TOKENS


def to_message(plan: StepPlan, embeddings: Iterable[Tensor]) -> ExecuteStep:
    arrays = {field.name: WireTensor.of(getattr(plan, field.name)) for field in fields(StepPlan)}
    return ExecuteStep(**arrays, embeddings=tuple(map(to_wire, embeddings)))


def to_plan(step: ExecuteStep) -> StepPlan:
    return StepPlan(**{field.name: getattr(step, field.name).numpy() for field in fields(StepPlan)})
