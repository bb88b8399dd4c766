"""Rank 0 sends each step plan to the other ranks of its group; they execute it and nothing else."""

from collections.abc import Callable, Iterable
from dataclasses import fields

from torch import Tensor

from common.events import PeerUp, Received
from common.member import Member
from common.messages import ExecuteStep
from common.progress import UnitTimes
from common.wire import Tensor as WireTensor
from compute.torch_tensors import to_torch, to_wire
from services.llm.step_plan import StepPlan

Execute = Callable[[StepPlan, list[Tensor]], Tensor]

CONTEXT_TOKENS = 8192
"""Attention to so many tokens takes about as long as all else that is computed for one token."""


def lead(member: Member, num_followers: int, execute: Execute) -> Execute:
    """Waits for the other ranks' connections; gives an `execute` that has all ranks execute."""
    followers: set[str] = set()
    early = []
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
            step = to_step(plan, embeddings)
            for follower in followers:
                member.links.send(follower, step)
        with member.progress.unit(times, size_of(plan)):
            return execute(plan, embeddings)

    return execute_on_all


def follow(member: Member, execute: Execute) -> None:
    """Executes what rank 0 sends until the process is to stop."""
    times = UnitTimes()
    for event in member.events():
        match event:
            case Received(message=ExecuteStep() as step):
                plan = to_plan(step)
                with member.progress.unit(times, size_of(plan)):
                    execute(plan, [to_torch(part) for part in step.embeddings])


def size_of(plan: StepPlan) -> int:
    """Of a step as a unit of work, in tokens."""
    return plan.num_tokens + int(plan.query_lens @ plan.context_lens) // CONTEXT_TOKENS


def to_step(plan: StepPlan, embeddings: Iterable[Tensor]) -> ExecuteStep:
    arrays = {field.name: WireTensor.of(getattr(plan, field.name)) for field in fields(StepPlan)}
    return ExecuteStep(**arrays, embeddings=tuple(map(to_wire, embeddings)))


def to_plan(step: ExecuteStep) -> StepPlan:
    return StepPlan(**{field.name: getattr(step, field.name).numpy() for field in fields(StepPlan)})
