"""A computed prefix is taken over, never the whole prompt, and only where the tokens' keys and
values would be the same."""

from typing import Any

import pytest

from services.llm.lora_registry import Resident
from services.llm.request import Request
from services.llm.scheduler import Scheduler
from tests.llm.builders import (
    FakeRunner,
    create_request,
    create_scheduler,
    expected_output,
    give_embeddings,
    run,
    run_step,
)

IMAGE = ((4, 8, 1),)


def follow(*requests: Request, **fields: Any) -> tuple[Scheduler, FakeRunner]:
    """One after the other, each with the right answer."""
    scheduler = create_scheduler(**fields)
    runner = FakeRunner(fields.get("num_blocks", 64))
    for request in requests:
        scheduler.add(request)
        run(scheduler, runner)
        assert request.output_token_ids == expected_output(request)
    return scheduler, runner


def cached(first: Request, second: Request, **fields: Any) -> int | None:
    """Tokens that the second took over from the first."""
    follow(first, second, **fields)
    return second.num_cached_tokens


def test_the_same_prompt_is_computed_but_for_its_last_block() -> None:
    assert cached(create_request(num_tokens=18), create_request(num_tokens=18)) == 16


def test_at_least_the_last_token_is_computed() -> None:
    assert cached(create_request(num_tokens=16), create_request(num_tokens=16)) == 12


def test_a_prompt_of_one_token_takes_nothing_over() -> None:
    assert cached(create_request(num_tokens=1), create_request(num_tokens=1)) == 0


def test_only_full_blocks_are_taken_over() -> None:
    assert cached(create_request(num_tokens=7, max_tokens=1), create_request(num_tokens=12)) == 4


def test_only_what_is_equal_from_the_start_is_taken_over() -> None:
    assert (
        cached(create_request(token_ids=[1] * 12), create_request(token_ids=[1] * 6 + [2] * 6)) == 4
    )
    assert (
        cached(create_request(token_ids=[1] * 12), create_request(token_ids=[2] * 4 + [1] * 8)) == 0
    )


def test_an_answer_is_taken_over_with_its_prompt() -> None:
    first = create_request(num_tokens=10, max_tokens=7, rope_delta=0)
    answer = expected_output(first)
    assert cached(first, create_request(token_ids=[*range(1, 11), *answer, 30])) == 16


def test_a_second_question_about_an_image_computes_only_the_question() -> None:
    question = [*range(1, 15), 40, 41]
    assert (
        cached(
            create_request(num_tokens=16, images=IMAGE),
            create_request(token_ids=question, images=IMAGE),
        )
        == 12
    )


def test_another_image_is_not_taken_for_the_first() -> None:
    assert (
        cached(
            create_request(num_tokens=16, images=IMAGE),
            create_request(num_tokens=16, images=((4, 8, 2),)),
        )
        == 4
    )


def test_another_salt_takes_nothing_over() -> None:
    assert (
        cached(create_request(num_tokens=16, salt=b"a"), create_request(num_tokens=16, salt=b"b"))
        == 0
    )


def test_without_the_cache_all_is_computed() -> None:
    assert (
        cached(create_request(num_tokens=16), create_request(num_tokens=16), prefix_caching=False)
        == 0
    )


def test_what_is_taken_over_is_shared_while_the_first_still_runs() -> None:
    first = create_request("a", 12, max_tokens=6)
    second = create_request("b", 12, max_tokens=6)
    scheduler = create_scheduler(first)
    runner = FakeRunner()
    run_step(scheduler, runner)
    scheduler.add(second)
    run_step(scheduler, runner)
    assert (
        second.block_table[:2] == first.block_table[:2]
        and second.block_table[2] != first.block_table[2]
    )
    scheduler.finish(first)
    run(scheduler, runner)
    assert second.output_token_ids == expected_output(second)


def test_a_block_is_found_only_when_it_is_computed() -> None:
    first = create_request("a", 16)
    second = create_request("b", 16)
    scheduler = create_scheduler(first, second, max_num_batched_tokens=18)
    run(scheduler, FakeRunner())
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 0)
    assert first.output_token_ids == second.output_token_ids == expected_output(first)


def test_an_image_that_the_cache_covers_is_not_waited_for() -> None:
    second = create_request(num_tokens=16, images=IMAGE, has_embeddings=False)
    assert cached(create_request(num_tokens=16, images=IMAGE), second) == 12


def test_a_prompt_that_begins_with_a_missing_image_goes_on_after_the_cached_part() -> None:
    images = ((0, 8, 1), (10, 3, 2))
    second = create_request(
        token_ids=[*range(1, 10), 40, *range(11, 17)], images=images, has_embeddings=False
    )
    scheduler, runner = follow(create_request(num_tokens=16, images=images))
    scheduler.add(second)
    assert [(c.begin, c.end) for c in run_step(scheduler, runner)] == [(8, 10)]
    give_embeddings(second, 1)
    run(scheduler, runner)
    assert second.output_token_ids == expected_output(second)


def test_an_image_that_the_cache_covers_in_part_is_waited_for() -> None:
    images = ((2, 9, 1),)
    scheduler, runner = follow(create_request(num_tokens=16, images=images))
    second = create_request(token_ids=[*range(1, 12), 40, 41], images=images, has_embeddings=False)
    scheduler.add(second)
    assert run_step(scheduler, runner) == []
    give_embeddings(second, 0)
    run(scheduler, runner)
    assert (second.num_cached_tokens, second.output_token_ids) == (8, expected_output(second))


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    a, b = (
        create_request(name, token_ids=[i] * 8, max_tokens=12) for i, name in enumerate("ab", 1)
    )
    scheduler = create_scheduler(a, b, num_blocks=6)
    runner = FakeRunner()
    while not scheduler.num_preemptions:
        run_step(scheduler, runner)
    scheduler.finish(a)
    (chunk,) = run_step(scheduler, runner)
    assert chunk.request is b and chunk.begin >= 8
    assert b.num_cached_tokens == 0, "usage tells of the first schedule"
    run(scheduler, runner)
    assert b.output_token_ids == expected_output(b)


def test_a_preempted_request_whose_uncomputed_image_was_forgotten_waits_for_it() -> None:
    second = create_request(
        "second", num_tokens=16, max_tokens=5, images=IMAGE, has_embeddings=False
    )
    scheduler, runner = follow(create_request(num_tokens=16, images=IMAGE), num_blocks=6)
    scheduler.add(second)
    run_step(scheduler, runner)
    scheduler._preempt(second)
    scheduler.add(other := create_request("other", token_ids=[9] * 20))
    scheduler.waiting.rotate(1)
    run(scheduler, runner)
    assert other.output_token_ids and len(second.output_token_ids) == 1
    give_embeddings(second, 0)
    run(scheduler, runner)
    assert second.output_token_ids == expected_output(second)


def test_cached_blocks_are_handed_out_when_memory_is_needed() -> None:
    requests = [create_request(token_ids=[i + 1] * 16) for i in range(5)]
    scheduler, _ = follow(*requests, num_blocks=5)
    assert scheduler.pool.num_free == 5


def test_blocks_that_a_request_takes_over_are_not_counted_as_room_for_it() -> None:
    """Its prefix is cached and free: taking it over uses up what seems to be free."""
    first = create_request("a", num_tokens=12, max_tokens=1)
    scheduler, runner = follow(first, num_blocks=6)
    scheduler.add(other := create_request("other", token_ids=[9] * 8, max_tokens=4))
    run_step(scheduler, runner)
    scheduler.add(again := create_request("again", num_tokens=14, max_tokens=2))
    run(scheduler, runner)
    assert [other.output_token_ids, again.output_token_ids] == [
        expected_output(other),
        expected_output(again),
    ]


@pytest.mark.parametrize("distrusted", [False, True])
def test_what_was_computed_for_a_bad_request_is_taken_over_by_none(distrusted: bool) -> None:
    first = create_request("a", num_tokens=16)
    second = create_request("b", num_tokens=16)
    scheduler = create_scheduler(first)
    runner = FakeRunner()
    run_step(scheduler, runner)
    if distrusted:
        scheduler.forget_cached_blocks(first)
    scheduler.finish(first)
    scheduler.add(second)
    run(scheduler, runner)
    assert second.num_cached_tokens == (0 if distrusted else 12)


def test_what_one_adapter_computed_is_not_taken_over_by_another() -> None:
    first, other, renewed = (
        Resident(number, "a", "/a", identity)
        for number, identity in ((1, b"first"), (2, b"second"), (3, b"first"))
    )
    assert cached(create_request(num_tokens=18, resident=first), create_request(num_tokens=18)) == 0
    assert cached(create_request(num_tokens=18), create_request(num_tokens=18, resident=first)) == 0
    same = [create_request(num_tokens=18, resident=resident) for resident in (first, other)]
    assert cached(*same) == 0, "another content under the same name"
    same = [create_request(num_tokens=18, resident=resident) for resident in (first, renewed)]
    assert cached(*same) == 16, "the same content, loaded again"
