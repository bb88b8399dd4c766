"""Rank 0 sends each step plan to the other ranks of its group; they execute it and nothing else."""

from collections.abc import Callable, Iterable
from dataclasses import fields

from torch import Tensor

from common.links import Received, Up
from common.member import Member
from common.messages import Step
from common.torch_tensors import to_torch, to_wire
from common.wire import Tensor as WireTensor
from services.llm.plan import StepPlan

Execute = Callable[[StepPlan, list[Tensor]], Tensor]


def lead(member: Member, num_followers: int, execute: Execute) -> Execute:
    """Waits for the other ranks' connections; gives an `execute` that has all ranks execute."""
    followers: set[str] = set()
    early = []
    while len(followers) < num_followers:
        event = member.next_event()
        if event is None:
            break
        if isinstance(event, Up) and event.role == "llm":
            followers.add(event.peer_id)
        else:
            early.append(event)
    member.put_back(early)

    def execute_on_all(plan: StepPlan, embeddings: list[Tensor]) -> Tensor:
        step = to_step(plan, embeddings)
        for follower in followers:
            member.links.send(follower, step)
        return execute(plan, embeddings)

    return execute_on_all


def follow(member: Member, execute: Execute) -> None:
    """Executes what rank 0 sends until the process is to stop."""
    for event in member.events():
        match event:
            case Received(message=Step() as step):
                execute(to_plan(step), [to_torch(part) for part in step.embeddings])


def to_step(plan: StepPlan, embeddings: Iterable[Tensor]) -> Step:
    arrays = {field.name: WireTensor.of(getattr(plan, field.name)) for field in fields(StepPlan)}
    return Step(**arrays, embeddings=tuple(map(to_wire, embeddings)))


def to_plan(step: Step) -> StepPlan:
    return StepPlan(**{field.name: getattr(step, field.name).numpy() for field in fields(StepPlan)})
