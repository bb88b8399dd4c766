"""The steps that a card runs before it serves, so that no request waits for a kernel to compile.

Graphs cover decodes. These steps cover the rest: chunks of prompts and mixed steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from services.llm.attention_backends.trials import plan_of
from services.llm.step_plan import StepPlan

STEPS = ((8,), (16,), (32,), (100,), (300,), (1, 8))
"""The new tokens of each sequence.

Tiles grow with the rows of a step. With more than 256 rows, quantized weights are widened first.
"""


def plans(scratch_block: int, block_size: int, num_position_components: int) -> Iterator[StepPlan]:
    """Yield plans that read and write no block but one."""
    for query_lens in STEPS:
        yield plan_in_scratch(query_lens, scratch_block, block_size, num_position_components)


def plan_in_scratch(
    query_lens: Sequence[int], scratch_block: int, block_size: int, num_position_components: int
) -> StepPlan:
    """Return a plan of new sequences whose blocks are all the same one.

    Their tokens overwrite each other there, so what the plan computes means nothing.
    """
    plan = plan_of(query_lens, query_lens, block_size)
    return replace(
        plan,
        positions=np.zeros((num_position_components, plan.num_tokens), np.int64),
        slot_mapping=scratch_block * block_size + np.arange(plan.num_tokens) % block_size,
        block_tables=np.full_like(plan.block_tables, scratch_block),
        sampled_rows=plan.query_lens.cumsum() - 1,
    )
