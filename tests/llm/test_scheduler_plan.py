"""What the ranks are told of a step."""

import numpy as np

from services.llm.request import Request
from services.llm.scheduler import Chunk, embeddings_of
from services.llm.step_plan import StepPlan
from tests.llm.builders import create_request, create_scheduler


def held(
    request: Request, blocks: list[int], num_computed: int = 0, output: tuple[int, ...] = ()
) -> Request:
    """A request under way."""
    request.block_table.extend(blocks)
    request.num_computed_tokens = num_computed
    request.output_token_ids += output
    return request


def plan_of(*chunks: Chunk) -> StepPlan:
    return create_scheduler().plan(list(chunks))


def mixed() -> list[Chunk]:
    """A decode, a chunk in the midst of an image, and a resumed request at its end."""
    decode = held(create_request("d", token_ids=[1, 2, 3], rope_delta=7), [5, 2], 4, (10, 11))
    image = held(create_request("i", num_tokens=12, images=((2, 3, 0), (6, 5, 1))), [8, 1, 3], 3)
    resumed = held(create_request("r", token_ids=[4, 5, 6], rope_delta=-1), [7, 0], 2, (12, 13, 14))
    return [Chunk(decode, 4, 5), Chunk(image, 3, 8), Chunk(resumed, 2, 6)]


def test_tokens_of_prompt_and_output_follow_one_another() -> None:
    """Placeholders are 0, because they may lie outside the vocabulary."""
    assert plan_of(*mixed()).token_ids.tolist() == [
        11,
        *[0] * 2,
        6,
        *[0] * 2,
        6,
        12,
        13,
        14,
    ]


def test_positions_are_the_prompts_and_then_index_and_delta() -> None:
    rows = [[11, 3, 4, 5, 6, 7, 2, 2, 3, 4], [11, 8, 9, 5, 11, 12, 2, 2, 3, 4]]
    assert plan_of(*mixed()).positions.tolist() == [rows[0], rows[1], rows[1]]


def test_each_token_goes_to_its_place_in_its_block() -> None:
    assert plan_of(*mixed()).slot_mapping.tolist() == [
        2 * 4,
        8 * 4 + 3,
        4,
        5,
        6,
        7,
        7 * 4 + 2,
        7 * 4 + 3,
        0,
        1,
    ]


def test_lengths_are_new_tokens_and_all_tokens() -> None:
    plan = plan_of(*mixed())
    assert (plan.query_lens.tolist(), plan.context_lens.tolist()) == ([1, 5, 4], [5, 8, 6])


def test_block_tables_are_padded_to_the_longest() -> None:
    assert plan_of(*mixed()).block_tables.tolist() == [[5, 2, 0], [8, 1, 3], [7, 0, 0]]


def test_embeddings_go_to_the_rows_of_their_placeholders() -> None:
    chunks = mixed()
    assert plan_of(*chunks).item_rows.tolist() == [1, 2, 4, 5]
    given = np.concatenate([part for chunk in chunks for part in embeddings_of(chunk)])[:, 0]
    assert given.tolist() == [-1001, -1002, -2000, -2001]


def test_the_last_known_token_of_each_request_is_sampled() -> None:
    assert plan_of(*mixed()).sampled_rows.tolist() == [0, 9]


def test_a_step_of_text_in_the_midst_of_a_prompt_samples_and_embeds_nothing() -> None:
    plan = plan_of(Chunk(held(create_request(num_tokens=8), [0, 1]), 0, 6))
    assert (len(plan.sampled_rows), len(plan.item_rows), plan.num_tokens) == (0, 0, 6)


def test_all_arrays_are_int64() -> None:
    plan = plan_of(*mixed())
    assert {getattr(plan, name).dtype for name in StepPlan.__slots__} == {np.dtype(np.int64)}
