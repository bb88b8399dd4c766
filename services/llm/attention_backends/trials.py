"""Tries a backend on the device: whether it computes attention, and how fast."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from compute.attention_choice import TOLERANCES, Trial, nanoseconds_of, reason_of
from compute.cuda_graphs import GraphPool
from compute.kernels.operations import attention_by_torch
from services.llm.attention_backends.protocol import Attend, PagedBackend, Shapes
from services.llm.packing import upload
from services.llm.step_plan import StepPlan

CONTEXT = 2048
BATCH = 32
CASES = ("a decode", f"{BATCH} decodes", f"a prefill of {CONTEXT}")
"""What is timed. Decodes have CONTEXT tokens each."""
CALLS = 16
"""The calls in a captured graph, as if for the layers of a model."""
WEIGHTS = (1, 2, 1)
"""What each case counts: a busy card decodes batches."""
PROBES = ((1, 1), (1, 40), (1, 300), (5, 5), (7, 290))
"""New tokens and context of sequences whose attention is checked."""


@dataclass(frozen=True, slots=True)
class Room:
    """What the largest graph must have room for."""

    max_num_seqs: int
    max_context: int


def try_backend(
    kind: type[PagedBackend], shapes: Shapes, room: Room, device: torch.device
) -> Trial:
    """Return what came of checking and timing a backend."""
    objection = objection_to(kind, shapes, device)
    if objection:
        return Trial(kind.name, objection=objection)
    try:
        return Trial(kind.name, times_of(kind(shapes, device), shapes, room, device))
    except kind.errors() as e:
        return Trial(kind.name, objection=reason_of(e))


@torch.inference_mode()
def objection_to(kind: type[PagedBackend], shapes: Shapes, device: torch.device) -> str:
    """Return why a backend cannot be used; "" if it computes a few sequences correctly."""
    if objection := kind.objection(shapes, device):
        return objection
    try:
        return misses_of(kind(shapes, device), shapes, device)
    except kind.errors() as e:
        return reason_of(e)


def misses_of(backend: PagedBackend, shapes: Shapes, device: torch.device) -> str:
    """Return which computations differ from attention by torch; "" if none does.

    What the cache holds beyond the end of a sequence is not a number, and must not be read.
    """
    queries, contexts = zip(*PROBES, strict=True)
    plan = plan_of(queries, contexts, shapes.block_size)
    random = torch.Generator().manual_seed(0)
    size = (2, plan.block_tables.max() + 1, shapes.block_size, shapes.num_kv_heads, shapes.head_dim)
    cache = torch.randn(size, generator=random)
    cache.flatten(1, 2)[:, unused_slots(plan, shapes.block_size)] = torch.nan
    cache = cache.to(device, shapes.dtype)
    q = torch.randn(plan.num_tokens, shapes.num_heads, shapes.head_dim, generator=random)
    q = q.to(device, shapes.dtype)
    expected = written_out(plan, q, cache)
    found = planned(backend, plan, device)(q, cache, None)
    is_decode = plan.query_lens == 1
    decodes = plan_of(plan.query_lens[is_decode], plan.context_lens[is_decode], shapes.block_size)
    rows = len(decodes.query_lens)
    width = decodes.block_tables.shape[1]
    captured = captured_decodes(backend, decodes, width, device)(q[:rows], cache, None)
    for name, result, wanted in (
        ("a mixed step", found, expected),
        ("decodes", captured, expected[:rows]),
    ):
        difference = float((result.float() - wanted).abs().max())
        if not difference < TOLERANCES[shapes.dtype]:
            return f"the results of {name} are wrong by {difference:.2g}"
    return ""


def unused_slots(plan: StepPlan, block_size: int) -> Tensor:
    """Return the slots of the plan's blocks that hold no token of a sequence, int64."""
    num_blocks = -(-plan.context_lens // block_size)
    ends = num_blocks.cumsum() * block_size
    unused = num_blocks * block_size - plan.context_lens
    return torch.from_numpy(
        np.concatenate(
            [np.arange(end - count, end) for end, count in zip(ends, unused, strict=True)]
        )
    )


def written_out(plan: StepPlan, q: Tensor, cache: Tensor) -> Tensor:
    """Return the attention of consecutive blocks in float32, [T, H, D]."""
    starts = plan.query_lens.cumsum() - plan.query_lens
    rows = []
    for start, query, context, table in zip(
        starts, plan.query_lens, plan.context_lens, plan.block_tables, strict=True
    ):
        k, v = (
            paged.flatten(0, 1)[table[0] * cache.shape[2] :][:context].float() for paged in cache
        )
        new = q[start : start + query].float()
        rows.append(attention_by_torch(new, k, v, num_seqs=1, causal=True).view(new.shape))
    return torch.cat(rows)


@torch.inference_mode()
def times_of(
    backend: PagedBackend, shapes: Shapes, room: Room, device: torch.device
) -> tuple[int, ...]:
    """Return the nanoseconds of a layer's attention in each of CASES.

    Decodes run in a graph, as in a step. Nothing else of a layer is timed.
    """
    per_sequence = -(-CONTEXT // shapes.block_size)
    size = (2, BATCH * per_sequence, shapes.block_size, shapes.num_kv_heads, shapes.head_dim)
    cache = torch.empty(size, dtype=shapes.dtype, device=device).normal_()
    q = torch.empty(CONTEXT, shapes.num_heads, shapes.head_dim, dtype=shapes.dtype, device=device)
    q.normal_()
    width = -(-max(room.max_context, CONTEXT) // shapes.block_size)
    # A backend that has too little memory for the largest graph fails here already.
    blank = np.zeros((room.max_num_seqs, 1), np.int64)
    backend.of_decodes(room.max_num_seqs, width).prepare(blank[:, 0] + 1, blank)
    pool = GraphPool(device)
    times = []
    for batch in (1, BATCH):
        plan = plan_of([1] * batch, [CONTEXT] * batch, shapes.block_size)
        attend = captured_decodes(backend, plan, width, device)
        graph = pool.capture(partial(repeat, attend, q[:batch], cache))
        times.append(nanoseconds_of(graph.replay, device) // CALLS)
    attend = planned(backend, plan_of([CONTEXT], [CONTEXT], shapes.block_size), device)
    times.append(nanoseconds_of(partial(attend, q, cache, None), device))
    return tuple(times)


def repeat(attend: Attend, q: Tensor, cache: Tensor) -> Tensor:
    for _ in range(CALLS - 1):
        attend(q, cache, None)
    return attend(q, cache, None)


def planned(backend: PagedBackend, plan: StepPlan, device: torch.device) -> Attend:
    attention = backend.of_plan(plan)
    return attention.bind([x.int() for x in upload(attention.arrays, device)])


def captured_decodes(
    backend: PagedBackend, plan: StepPlan, width: int, device: torch.device
) -> Attend:
    """Return the attention of a plan of decodes as graphs have it, with tables of that width."""
    num_seqs, num_blocks = plan.block_tables.shape
    tables = np.pad(plan.block_tables, ((0, 0), (0, width - num_blocks)))
    decodes = backend.of_decodes(num_seqs, width)
    decodes.prepare(plan.context_lens, tables)
    return decodes.bind(*(x.int() for x in upload([plan.context_lens, tables], device)))


def plan_of(query_lens: Sequence[int], context_lens: Sequence[int], block_size: int) -> StepPlan:
    """Return a plan with all that attention needs, of sequences that have consecutive blocks."""
    queries, contexts = (np.array(lens, np.int64) for lens in (query_lens, context_lens))
    num_blocks = -(-contexts // block_size)
    firsts = num_blocks.cumsum() - num_blocks
    columns = np.arange(num_blocks.max())
    tables = np.where(columns < num_blocks[:, None], firsts[:, None] + columns, 0)
    per_token = np.zeros(queries.sum(), np.int64)
    per_sequence = np.zeros(len(queries), np.int64)
    return StepPlan(
        token_ids=per_token,
        positions=per_token[None],
        slot_mapping=per_token,
        query_lens=queries,
        context_lens=contexts,
        block_tables=tables,
        item_rows=per_token[:0],
        sampled_rows=per_token[:0],
        rope_parameters=per_sequence,
        adapters=per_sequence,
    )
