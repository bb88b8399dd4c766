"""A request that may be what ends the group is computed in steps of its own."""

import pytest

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


def names(scheduler: Scheduler, runner: FakeRunner) -> list[str]:
    """The requests of the next step."""
    return [chunk.request.prompt.request_id for chunk in run_step(scheduler, runner)]


def suspect(name: str = "suspect", num_tokens: int = 8, first: int = 30, **fields: int) -> Request:
    ids = [first + i % 10 for i in range(num_tokens)]
    return create_request(name, token_ids=ids, apart=True, **fields)


def note(scheduler: Scheduler) -> None:
    assert scheduler.turn.holder is not None
    scheduler.turn.note(scheduler.turn.holder, "gateway")


def clear(scheduler: Scheduler) -> None:
    assert scheduler.turn.holder is not None
    scheduler.clear(scheduler.turn.holder, "gateway")


def test_nothing_is_computed_until_the_gateway_knows_who_is_alone() -> None:
    """If the first step ends the process, nothing that it sends can be relied on any more."""
    other = create_request("other", max_tokens=6)
    alone = suspect(max_tokens=6)
    scheduler = create_scheduler(other)
    runner = FakeRunner()
    assert names(scheduler, runner) == ["other"]
    scheduler.add(alone)
    assert names(scheduler, runner) == names(scheduler, runner) == []
    assert scheduler.turn.announcement() == ("gateway", alone.key)
    note(scheduler)
    assert [names(scheduler, runner) for _ in range(3)] == [["suspect"]] * 3
    clear(scheduler)
    assert sorted(names(scheduler, runner)) == ["other", "suspect"]
    run(scheduler, runner)
    assert [r.output_token_ids for r in (other, alone)] == [
        expected_output(r) for r in (other, alone)
    ]


def test_the_others_wait_until_the_gateway_has_seen_the_end() -> None:
    """Otherwise a death of theirs could overtake the last token, and be blamed on the request."""
    scheduler = create_scheduler(suspect(max_tokens=1), create_request("other"))
    runner = FakeRunner()
    assert names(scheduler, runner) == []
    note(scheduler)
    assert names(scheduler, runner) == ["suspect"]
    assert names(scheduler, runner) == []
    clear(scheduler)
    assert names(scheduler, runner) == ["other"]


def test_suspects_take_turns() -> None:
    scheduler = create_scheduler(suspect("a", max_tokens=2), suspect("b", first=40, max_tokens=2))
    runner = FakeRunner()
    order = []
    while scheduler.running or scheduler.waiting:
        assert names(scheduler, runner) == []
        note(scheduler)
        order += names(scheduler, runner) + names(scheduler, runner)
        clear(scheduler)
    assert order == ["a", "a", "b", "b"]


def test_a_suspect_that_waits_for_an_item_holds_up_nobody() -> None:
    waits = create_request("waits", images=((4, 2, 1),), has_embeddings=False, apart=True)
    scheduler = create_scheduler(waits, create_request("other", token_ids=[9] * 8, max_tokens=3))
    runner = FakeRunner()
    assert [names(scheduler, runner) for _ in range(2)] == [["other"]] * 2
    give_embeddings(waits, 0)
    assert names(scheduler, runner) == []
    note(scheduler)
    assert names(scheduler, runner) == ["waits"]


def test_a_suspect_waits_for_room_and_is_not_overtaken() -> None:
    first = create_request("first", token_ids=[9] * 8, max_tokens=3)
    alone = suspect(num_tokens=16)
    scheduler = create_scheduler(first, num_blocks=5)
    runner = FakeRunner(5)
    assert names(scheduler, runner) == ["first"]
    scheduler.add(alone)
    scheduler.add(create_request("later", token_ids=[8] * 2))
    assert [names(scheduler, runner) for _ in range(2)] == [["first"]] * 2
    assert names(scheduler, runner) == []
    note(scheduler)
    assert names(scheduler, runner) == ["suspect"]


def test_room_is_made_for_a_suspect_while_all_others_wait_for_items() -> None:
    stalled = create_request("stalled", 14, images=((8, 4, 1),), has_embeddings=False)
    scheduler = create_scheduler(stalled, num_blocks=5)
    runner = FakeRunner(5)
    assert names(scheduler, runner) == ["stalled"]
    scheduler.add(suspect(num_tokens=16))
    assert names(scheduler, runner) == []
    note(scheduler)
    assert names(scheduler, runner) == ["suspect"]


def test_the_request_that_is_alone_keeps_its_blocks() -> None:
    """The others free none until it is cleared, so it would wait for ever."""
    other = create_request("other", token_ids=[9] * 8, max_tokens=12)
    scheduler = create_scheduler(other, num_blocks=6)
    runner = FakeRunner(6)
    names(scheduler, runner)
    alone = suspect(num_tokens=12, max_tokens=10)
    scheduler.add(alone)
    assert names(scheduler, runner) == []
    note(scheduler)
    while len(alone.output_token_ids) < 10:
        assert names(scheduler, runner) == ["suspect"]
    assert scheduler.num_preemptions == 1
    clear(scheduler)
    run(scheduler, runner)
    assert other.output_token_ids == expected_output(other)


@pytest.mark.parametrize("budget", [4, 16])
def test_a_long_suspect_is_computed_in_chunks(budget: int) -> None:
    scheduler = create_scheduler(suspect(num_tokens=16), max_num_batched_tokens=budget)
    runner = FakeRunner()
    names(scheduler, runner)
    note(scheduler)
    assert [names(scheduler, runner) for _ in range(16 // budget)] == [["suspect"]] * (16 // budget)
    assert scheduler.running[0].num_computed_tokens == 16
