"""Which requests a step computes, how far, and who gives way where memory is short."""

from services.llm.lora_registry import Resident
from services.llm.request import Request
from services.llm.scheduler import Scheduler
from tests.llm.builders import (
    BLOCK_SIZE,
    FakeRunner,
    assert_blocks_are_owned,
    create_request,
    create_scheduler,
    expected_output,
    give_embeddings,
    run,
    run_step,
)

Spans = dict[str, tuple[int, int]]


def spans(scheduler: Scheduler, runner: FakeRunner | None = None) -> Spans:
    """What the next step computes: (begin, end) by request."""
    chunks = run_step(scheduler, runner or FakeRunner(scheduler.pool.num_blocks))
    return {chunk.request.prompt.request_id: (chunk.begin, chunk.end) for chunk in chunks}


def decoding(*names: str, num_tokens: int = 4, **scheduler: int) -> tuple[Scheduler, list[Request]]:
    """Requests whose prompts are computed already."""
    requests = [
        create_request(name, token_ids=[i + 1] * num_tokens, max_tokens=12)
        for i, name in enumerate(names)
    ]
    made = create_scheduler(*requests, **scheduler)
    while any(not request.output_token_ids for request in requests):
        spans(made)
    return made, requests


def image_first(name: str, num_tokens: int = 8) -> Request:
    """Nothing of it can be computed before its image is there."""
    return create_request(name, num_tokens, images=((0, 4, 1),), has_embeddings=False)


def stalls(name: str, num_tokens: int = 8, offset: int = 4) -> Request:
    return create_request(name, num_tokens, images=((offset, 2, 1),), has_embeddings=False)


# Chunks


def test_a_prompt_is_computed_in_chunks_of_the_budget_and_then_a_token_a_step() -> None:
    scheduler = create_scheduler(
        create_request(num_tokens=20, max_tokens=3), max_num_batched_tokens=8
    )
    runner = FakeRunner()
    steps = [spans(scheduler, runner)["r"] for _ in range(5)]
    assert steps == [(0, 8), (8, 16), (16, 20), (20, 21), (21, 22)]
    assert spans(scheduler, runner) == {}


def test_prompts_share_a_step() -> None:
    scheduler = create_scheduler(
        create_request("a", 5), create_request("b", 5), create_request("c", 20)
    )
    assert spans(scheduler) == {"a": (0, 5), "b": (0, 5), "c": (0, 6)}


def test_decodes_go_before_an_older_prompt() -> None:
    scheduler, _ = decoding("a", "b")
    scheduler.add(create_request("long", 40, token_ids=[9] * 40))
    assert spans(scheduler) == {"a": (4, 5), "b": (4, 5), "long": (0, 14)}
    scheduler.running.sort(key=lambda r: r.prompt.request_id != "long")
    assert spans(scheduler) == {"a": (5, 6), "b": (5, 6), "long": (14, 28)}


def test_a_long_prompt_holds_no_decode_up() -> None:
    scheduler, (request, *_) = decoding("a")
    scheduler.add(create_request("long", token_ids=[9] * 100))
    for expected in range(2, 10):
        spans(scheduler)
        assert len(request.output_token_ids) == expected


def test_requests_begin_in_the_order_in_which_they_came() -> None:
    requests = [create_request(str(i), token_ids=[i + 1] * 10, max_tokens=1) for i in range(6)]
    begun = [
        c.request.prompt.request_id
        for step in run(create_scheduler(*requests), FakeRunner())
        for c in step
        if c.begin == 0
    ]
    assert begun == list("012345")


def test_no_step_has_more_requests_than_allowed() -> None:
    requests = [create_request(str(i), 2) for i in range(5)]
    scheduler = create_scheduler(*requests, max_num_seqs=2)
    runner = FakeRunner()
    assert list(spans(scheduler, runner)) == ["0", "1"]
    assert max(map(len, run(scheduler, runner))) == 2
    assert [r.output_token_ids for r in requests] == [expected_output(r) for r in requests]


# Images


def test_the_prompt_is_computed_up_to_an_image_and_goes_on_when_it_comes() -> None:
    request = stalls("r", offset=5)
    scheduler = create_scheduler(request)
    runner = FakeRunner()
    assert [spans(scheduler, runner), spans(scheduler, runner)] == [{"r": (0, 5)}, {}]
    give_embeddings(request, 0)
    assert spans(scheduler, runner) == {"r": (5, 8)}


def test_images_that_come_in_the_wrong_order_are_computed_in_the_right_one() -> None:
    request = create_request(num_tokens=16, images=((2, 4, 1), (8, 4, 2)), has_embeddings=False)
    scheduler = create_scheduler(request)
    runner = FakeRunner()
    assert spans(scheduler, runner) == {"r": (0, 2)}
    give_embeddings(request, 1)
    assert spans(scheduler, runner) == {}
    give_embeddings(request, 0)
    run(scheduler, runner)
    assert request.output_token_ids == expected_output(request)


def test_an_image_may_be_cut_by_a_chunk() -> None:
    request = create_request(num_tokens=16, images=((3, 10, 1),))
    run(create_scheduler(request, max_num_batched_tokens=5), FakeRunner())
    assert request.output_token_ids == expected_output(request)


def test_a_request_whose_image_is_missing_is_passed_and_goes_first_when_it_comes() -> None:
    late = image_first("late")
    scheduler = create_scheduler(late, create_request("b", 8), max_num_batched_tokens=8)
    runner = FakeRunner()
    assert spans(scheduler, runner) == {"b": (0, 8)}
    give_embeddings(late, 0)
    scheduler.add(create_request("c", 8))
    assert list(spans(scheduler, runner)) == ["b", "late"]


def test_requests_that_wait_for_images_keep_no_other_out() -> None:
    scheduler = create_scheduler(stalls("a"), stalls("b"), max_num_seqs=2, prefix_caching=False)
    assert list(spans(scheduler)) == ["a", "b"]
    scheduler.add(create_request("c", token_ids=[9] * 8))
    assert list(spans(scheduler)) == ["c"]


def test_a_step_has_no_more_requests_than_allowed_when_all_images_come_at_once() -> None:
    late = [stalls(str(i)) for i in range(5)]
    scheduler = create_scheduler(*late, max_num_seqs=2)
    runner = FakeRunner()
    run(scheduler, runner)
    for request in late:
        give_embeddings(request, 0)
    assert max(map(len, run(scheduler, runner))) == 2
    assert [r.output_token_ids for r in late] == [expected_output(r) for r in late]


# Memory


def test_a_request_begins_when_its_whole_prompt_has_room() -> None:
    a, b = (
        create_request(name, token_ids=[i] * 20, max_tokens=2) for i, name in enumerate("ab", 1)
    )
    scheduler = create_scheduler(a, b, num_blocks=9)
    runner = FakeRunner()
    assert list(spans(scheduler, runner)) == ["a"]
    assert list(spans(scheduler, runner)) == ["a"]
    run(scheduler, runner)
    assert scheduler.num_preemptions == 0
    assert b.output_token_ids == expected_output(b)


def test_a_small_request_does_not_pass_one_that_waits_for_memory() -> None:
    scheduler = create_scheduler(num_blocks=8)
    scheduler.add(create_request("a", token_ids=[1] * 16))
    spans(scheduler)
    scheduler.add(create_request("large", token_ids=[2] * 20))
    scheduler.add(create_request("small", token_ids=[3] * 4))
    assert list(spans(scheduler)) == ["a"]


def test_a_decode_takes_blocks_from_the_latest_comer() -> None:
    scheduler, (a, b) = decoding("a", "b", num_tokens=8, num_blocks=6, max_num_batched_tokens=32)
    while not scheduler.num_preemptions:
        assert list(spans(scheduler)) == ["a", "b"] or scheduler.num_preemptions
    assert scheduler.running == [a] and list(scheduler.waiting) == [b]
    assert (b.num_computed_tokens, len(b.block_table)) == (0, 0)


def test_the_latest_comer_gives_itself_up_where_it_needs_the_block() -> None:
    a = create_request("a", token_ids=[1] * 9)
    b = create_request("b", token_ids=[2] * 7)
    scheduler = create_scheduler(a, b, num_blocks=5)
    runner = FakeRunner()
    assert [list(spans(scheduler, runner)) for _ in range(3)] == [["a", "b"], ["a", "b"], ["a"]]
    assert scheduler.running == [a] and list(scheduler.waiting) == [b]


def test_one_that_was_preempted_takes_no_block_from_others() -> None:
    requests = [
        create_request(name, token_ids=[i] * n)
        for i, (name, n) in enumerate({"a": 4, "b": 2, "c": 2}.items(), 1)
    ]
    scheduler = create_scheduler(*requests, num_blocks=3)
    runner = FakeRunner()
    assert [list(spans(scheduler, runner)) for _ in range(2)] == [["a", "b", "c"], ["a", "b"]]
    assert scheduler.num_preemptions == 1


def test_a_preempted_request_computes_its_prompt_and_its_output_again_and_goes_on() -> None:
    a, b = (
        create_request(name, token_ids=[i] * 8, max_tokens=12) for i, name in enumerate("ab", 1)
    )
    scheduler = create_scheduler(a, b, num_blocks=6, prefix_caching=False)
    steps = run(scheduler, FakeRunner())
    resumed = next(c for step in steps[1:] for c in step if c.request is b and c.begin == 0)
    assert resumed.end > 8, "it resumes with its output"
    assert scheduler.num_preemptions == 1
    assert [a.output_token_ids, b.output_token_ids] == [expected_output(a), expected_output(b)]


def test_a_preempted_request_resumes_before_later_ones_begin() -> None:
    a, b = (
        create_request(name, token_ids=[i] * 8, max_tokens=12) for i, name in enumerate("ab", 1)
    )
    scheduler = create_scheduler(a, b, num_blocks=6, prefix_caching=False)
    scheduler.add(create_request("c", token_ids=[3] * 8, max_tokens=1))
    begun = [
        c.request.prompt.request_id
        for step in run(scheduler, FakeRunner())
        for c in step
        if c.begin == 0
    ]
    assert begun == ["a", "b", "b", "c"]


def test_a_request_that_waits_for_an_image_gives_its_blocks_to_one_that_decodes() -> None:
    late = stalls("late", 12)
    text = create_request("text", token_ids=[9] * 8, max_tokens=12)
    scheduler = create_scheduler(late, text, num_blocks=5, prefix_caching=False)
    runner = FakeRunner()
    steps = run(scheduler, runner)
    assert text.output_token_ids == expected_output(text)
    assert sum(c.request is text and c.begin == 0 for step in steps for c in step) == 1, (
        "it was not preempted"
    )
    give_embeddings(late, 0)
    run(scheduler, runner)
    assert late.output_token_ids == expected_output(late)


def test_requests_that_wait_for_images_give_their_blocks_to_one_that_does_not() -> None:
    """They fill the pool, the device would idle, and their images may be long in coming."""
    late = [stalls(name, 16) for name in "ab"]
    scheduler = create_scheduler(*late, num_blocks=8)
    runner = FakeRunner()
    run(scheduler, runner)
    scheduler.add(text := create_request("text", token_ids=[9] * 10))
    run(scheduler, runner)
    assert text.output_token_ids == expected_output(text)
    for request in late:
        give_embeddings(request, 0)
    run(scheduler, runner)
    assert [r.output_token_ids for r in late] == [expected_output(r) for r in late]


def test_a_request_that_would_wait_for_its_image_takes_no_others_blocks() -> None:
    late = [stalls(name, 16) for name in "abc"]
    scheduler = create_scheduler(*late, num_blocks=8)
    assert len(run(scheduler, FakeRunner())) == 1
    assert scheduler.num_preemptions == 0


def test_a_request_may_need_exactly_the_whole_pool() -> None:
    requests = [create_request(str(i), token_ids=[i + 1] * 9, max_tokens=7) for i in range(3)]
    run(create_scheduler(*requests, num_blocks=4), FakeRunner(4))
    assert [r.output_token_ids for r in requests] == [expected_output(r) for r in requests]


# Ends


def test_a_request_that_ends_frees_its_blocks_in_whatever_state_it_is() -> None:
    waiting = create_request("w", 20)
    stalled = stalls("s")
    prefilling = create_request("p", 20)
    ready = create_request("d", 4)
    scheduler = create_scheduler(stalled, ready, prefilling, num_blocks=14)
    spans(scheduler)
    scheduler.add(waiting)
    preempted = create_request("x", token_ids=[9] * 4)
    scheduler.add(preempted)
    assert {r.num_computed_tokens for r in (stalled, ready, prefilling)} == {4, 8}
    for request in (ready, stalled, waiting, preempted, prefilling):
        scheduler.finish(request)
        assert_blocks_are_owned(scheduler)
    assert scheduler.pool.num_free == 14 and not scheduler.running and not scheduler.waiting


def test_a_preempted_request_can_end() -> None:
    scheduler, (_, b) = decoding("a", "b", num_tokens=8, num_blocks=6, max_num_batched_tokens=32)
    while not scheduler.num_preemptions:
        spans(scheduler)
    scheduler.finish(b)
    assert not scheduler.waiting
    assert_blocks_are_owned(scheduler)


def test_nothing_is_scheduled_where_there_is_nothing() -> None:
    assert create_scheduler().schedule() == []


def test_a_request_holds_only_the_blocks_of_the_tokens_that_are_known() -> None:
    scheduler, (request,) = decoding("a", num_tokens=4)
    assert len(request.block_table) == 1
    spans(scheduler)
    assert len(request.block_table) == 2 == -(-request.num_tokens // BLOCK_SIZE)


def test_a_request_that_must_be_whole_waits_for_a_step_with_room_for_all_of_it() -> None:
    other = create_request("other", num_tokens=12)
    whole = create_request("whole", num_tokens=10, whole=True)
    scheduler = create_scheduler(other, whole, max_num_batched_tokens=16)
    assert spans(scheduler) == {"other": (0, 12)}
    assert spans(scheduler) == {"other": (12, 13), "whole": (0, 10)}


def test_a_request_that_must_be_whole_waits_for_all_of_its_items_and_holds_up_nobody() -> None:
    images = ((0, 2, 1), (6, 2, 2))
    whole = create_request("whole", 10, images=images, whole=True, has_embeddings=False)
    scheduler = create_scheduler(whole, create_request("other", num_tokens=3))
    assert spans(scheduler) == {"other": (0, 3)}
    give_embeddings(whole, 0)
    assert spans(scheduler) == {"other": (3, 4)}
    give_embeddings(whole, 1)
    assert spans(scheduler)["whole"] == (0, 10)


def test_a_request_that_must_be_whole_shares_no_blocks() -> None:
    ids = [7] * 9
    scheduler = create_scheduler(create_request("a", token_ids=ids, whole=True))
    spans(scheduler)
    again = create_request("b", token_ids=ids)
    scheduler.add(again)
    spans(scheduler)
    assert again.num_cached_tokens == 0, "nobody finds what a whole request computed"
    scheduler.add(last := create_request("c", token_ids=ids, whole=True))
    spans(scheduler)
    assert last.num_cached_tokens == 0, "and it reuses nothing of the others"


def test_a_preempted_request_that_must_be_whole_is_computed_whole_again() -> None:
    whole = create_request("whole", token_ids=[9] * 7, max_tokens=9, whole=True)
    scheduler = create_scheduler(whole, num_blocks=4)
    spans(scheduler)
    scheduler._preempt(whole)
    assert spans(scheduler) == {"whole": (0, 8)}


def test_a_plan_carries_the_rope_parameter_and_the_adapter_of_each_sequence() -> None:
    scheduler = create_scheduler(
        create_request("a", num_tokens=3, rope_parameter=7),
        create_request("b", num_tokens=3, resident=Resident(2, "a", "/a", b"identity")),
    )
    plan = scheduler.plan(scheduler.schedule())
    assert (plan.rope_parameters.tolist(), plan.adapters.tolist()) == ([7, 0], [0, 2])
