"""Attention over the paged cache equals attention written out, for any mix of decodes and
chunks."""

import numpy as np
import pytest
import torch

from services.llm.attention import GatheredAttention, RotaryTables
from services.llm.decoder import rotary_tables
from services.llm.step_plan import StepPlan
from tests.golden import max_difference

BLOCK_SIZE = 4
NUM_BLOCKS = 64
HEAD_DIM = 8


def plan_of(query_lens: list[int], context_lens: list[int]) -> StepPlan:
    """Blocks are dealt at random; those of the padding belong to nobody."""
    blocks = np.random.default_rng(1).permutation(np.arange(1, NUM_BLOCKS))
    num_blocks = [-(-context // BLOCK_SIZE) for context in context_lens]
    tables = np.zeros((len(query_lens), max(num_blocks)), np.int64)
    for i, count in enumerate(num_blocks):
        tables[i, :count] = blocks[:count]
        blocks = blocks[count:]
    num_tokens = sum(query_lens)
    return StepPlan(
        token_ids=np.zeros(num_tokens, np.int64),
        positions=np.zeros((3, num_tokens), np.int64),
        slot_mapping=np.concatenate(
            [
                slots(tables[i], c)[c - q :]
                for i, (q, c) in enumerate(zip(query_lens, context_lens, strict=True))
            ]
        ),
        query_lens=np.array(query_lens),
        context_lens=np.array(context_lens),
        block_tables=tables,
        item_rows=np.zeros(0, np.int64),
        sampled_rows=np.zeros(0, np.int64),
        rope_parameters=np.zeros(len(query_lens), np.int64),
        adapters=np.zeros(len(query_lens), np.int64),
    )


def slots(table: np.ndarray, length: int) -> np.ndarray:
    index = np.arange(length)
    return table[index // BLOCK_SIZE] * BLOCK_SIZE + index % BLOCK_SIZE


def random_tables(plan: StepPlan, random: torch.Generator) -> RotaryTables:
    """The tables of angles that no model has, another for each token and entry."""
    return rotary_tables(6 * torch.rand(plan.num_tokens, HEAD_DIM // 2, generator=random))


def rotated(
    qkv: torch.Tensor, num_heads: int, num_kv_heads: int, tables: RotaryTables
) -> list[torch.Tensor]:
    """Return the rotated queries and keys and the values, written out in complex numbers."""
    half = qkv.shape[-1] // 2
    cos, signed_sin = (table[:, None, half:] for table in tables)
    q, k, v = qkv.clone().split((num_heads, num_kv_heads, num_kv_heads), 1)
    for x in (q, k):
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, signed_sin)
        x.copy_(torch.cat((turned.real, turned.imag), -1))
    return [q, k, v]


def written_out(plan: StepPlan, q_THD: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    groups = q_THD.shape[1] // cache.shape[-2]
    start = 0
    rows = []
    for table, query, context in zip(
        plan.block_tables, plan.query_lens, plan.context_lens, strict=True
    ):
        k, v = cache.flatten(1, 2)[:, torch.from_numpy(slots(table, context))].repeat_interleave(
            groups, 2
        )
        for i in range(query):
            seen = context - query + i + 1
            scores = torch.einsum("hd,shd->hs", q_THD[start + i], k[:seen]) * HEAD_DIM**-0.5
            rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[:seen]).flatten())
        start += query
    return torch.stack(rows)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [
        ([1], [1]),
        ([1], [9]),
        ([1, 1, 1], [8, 8, 8]),
        ([1, 1, 1, 1], [1, 13, 4, 5]),
        ([7], [7]),
        ([3], [11]),
        ([1, 5, 1, 2, 6], [12, 5, 3, 9, 20]),
    ],
)
def test_any_mix_equals_attention_written_out(
    query_lens: list[int], context_lens: list[int], num_heads: int, num_kv_heads: int
) -> None:
    plan = plan_of(query_lens, context_lens)
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(plan.num_tokens, num_heads + 2 * num_kv_heads, HEAD_DIM, generator=random)
    tables = random_tables(plan, random)
    scale = torch.rand(plan.num_tokens, generator=random)
    q, k, v = rotated(qkv, num_heads, num_kv_heads, tables)
    cache = torch.randn(2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, HEAD_DIM, generator=random)
    # What nobody owns is not read, be it ever so bad.
    cache[:, 0] = torch.nan
    step = GatheredAttention(plan, BLOCK_SIZE, torch.float32, torch.device("cpu"))
    found = step.run(qkv, num_heads, num_kv_heads, tables, scale, cache)
    stored = cache.flatten(1, 2)[:, torch.from_numpy(plan.slot_mapping)]
    assert max_difference(stored[0].numpy(), k.numpy()) < 1e-5
    assert stored[1].equal(v)
    expected = written_out(plan, q * scale[:, None, None], cache)
    assert max_difference(found.numpy(), expected.numpy()) < 1e-5
