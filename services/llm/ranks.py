"""Rank 0 sends each step plan to the other ranks of its group, which only execute it."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
from torch import Tensor

from common.events import PeerUp, Received
from common.logs import get_logger
from common.member import Event, Member
from common.messages import (
    DropAdapter,
    ExecuteStep,
    LlmInbound,
    PrepareAdapter,
    RankInbound,
    UseAdapter,
)
from common.progress import UnitTimes
from common.wire import Tensor as WireTensor
from compute.torch_tensors import to_torch, to_wire
from services.llm.lora_loading import RankAdapters
from services.llm.request import MAX_POSITION
from services.llm.step_plan import StepPlan

Execute = Callable[[StepPlan, list[Tensor]], Tensor]
"""Runs one step and returns its logits."""

CONTEXT_TOKENS = 8192
"""Attention to this many tokens takes about as long as everything else for one token."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The bounds of what a rank can execute."""

    vocab_size: int
    num_blocks: int
    block_size: int
    input_width: int
    num_position_components: int


def lead(member: Member[LlmInbound], ranks: Collection[str], execute: Execute) -> Execute:
    """Wait for the other ranks to connect; return an `execute` that makes all ranks execute.

    `ranks` are the ids of the other ranks.
    """
    followers: set[str] = set()
    early: list[Event[LlmInbound]] = []
    while len(followers) < len(ranks):
        event = member.next_event()
        if event is None:
            break
        if isinstance(event, PeerUp) and event.peer_id in ranks:
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


def follow(
    member: Member[RankInbound],
    leader: str,
    limits: StepLimits,
    execute: Execute,
    adapters: RankAdapters | None = None,
) -> None:
    """Execute what rank 0, whose id is `leader`, sends until the process must stop.

    What any other peer sends is dropped. A step of rank 0 that is wrong ends the process, because
    rank 0 waits for the result.
    """
    times = UnitTimes()
    log = get_logger()
    for event in member.events():
        if not isinstance(event, Received):
            continue
        message: object = event.message
        if event.peer_id != leader:
            message = None
        match message:
            case ExecuteStep():
                check_step(message, limits)
                plan = to_plan(message)
                with member.progress.unit(times, size_of(plan)):
                    execute(plan, [to_torch(part) for part in message.embeddings])
            case PrepareAdapter() if adapters:
                adapters.prepare(message, partial(member.links.send, leader))
            case UseAdapter(adapter=adapter) if adapters:
                adapters.use(adapter)
            case DropAdapter(adapter=adapter) if adapters:
                adapters.drop(adapter)
            case _:
                name = type(event.message).__name__
                log.warning("ignored a message", peer=event.peer_id, name=name)


def check_step(step: ExecuteStep, limits: StepLimits) -> None:
    """Raise ValueError unless a step can be executed.

    Kernels do not check their arguments: a wrong index would read or write anything.
    """
    num_tokens = step.token_ids.shape[-1:]
    num_seqs = step.query_lens.shape[-1:]
    table = (*num_seqs, *step.block_tables.shape[-1:])
    most = limits.num_blocks * limits.block_size
    rows = 0 if num_tokens == () else num_tokens[0]
    for name, shape, low, high in (
        ("token_ids", num_tokens, 0, limits.vocab_size),
        ("positions", (limits.num_position_components, *num_tokens), 0, MAX_POSITION),
        ("slot_mapping", num_tokens, 0, most),
        ("query_lens", num_seqs, 1, rows + 1),
        ("context_lens", num_seqs, 1, table[-1] * limits.block_size + 1),
        ("block_tables", table, 0, limits.num_blocks),
        ("item_rows", step.item_rows.shape[-1:], 0, rows),
        ("sampled_rows", step.sampled_rows.shape[-1:], 0, rows),
        ("rope_parameters", num_seqs, 0, 2**48),
        ("adapters", num_seqs, 0, 2**48),
        ("block_copies", (*step.block_copies.shape[:1], 2), 0, limits.num_blocks),
    ):
        tensor = getattr(step, name)
        if tensor.dtype != "int64" or len(shape) == 0 or tensor.shape != shape:
            raise ValueError(f"{name} is {tensor}, int64 {shape} is wanted")
        # As uint64 a value below the range is far above it: one pass instead of two.
        values = (tensor.numpy() - low).view(np.uint64) if low else tensor.numpy().view(np.uint64)
        if values.size and values.max() >= high - low:
            raise ValueError(f"{name} has a value outside [{low}, {high})")
    query_lens = step.query_lens.numpy()
    if query_lens.sum() != rows or (query_lens > step.context_lens.numpy()).any():
        raise ValueError("the lengths of the sequences do not fit the tokens")
    widths = {part.shape[1:] for part in step.embeddings}
    num_rows = sum(part.shape[0] for part in step.embeddings if part.shape)
    if widths - {(limits.input_width,)} or num_rows != step.item_rows.shape[0]:
        raise ValueError("the embeddings do not fit the rows of items")


def size_of(plan: StepPlan) -> int:
    """Return the size of a step as a unit of work, in tokens."""
    return plan.num_tokens + int(plan.query_lens @ plan.context_lens) // CONTEXT_TOKENS


def to_message(plan: StepPlan, embeddings: Iterable[Tensor]) -> ExecuteStep:
    arrays = {field.name: WireTensor.of(getattr(plan, field.name)) for field in fields(StepPlan)}
    return ExecuteStep(**arrays, embeddings=tuple(map(to_wire, embeddings)))


def to_plan(step: ExecuteStep) -> StepPlan:
    return StepPlan(**{field.name: getattr(step, field.name).numpy() for field in fields(StepPlan)})
