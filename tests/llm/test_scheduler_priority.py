"""Requests with lower values begin first and are preempted last; equals keep their order."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.llm.embedding_budget import EmbeddingBudget
from services.llm.request import Request
from tests.llm.builders import FakeRunner, create_request, create_scheduler, expected_output, run
from tests.llm.test_scheduler import spans


def request_of(name: str, priority: int, **fields: Any) -> Request:
    request = create_request(name, **fields)
    request.prompt.priority = priority
    return request


def test_the_most_urgent_request_begins_first() -> None:
    given = (("a", 0), ("b", 1), ("c", 0), ("d", -1), ("e", 1))
    requests = [request_of(name, priority, num_tokens=16) for name, priority in given]
    scheduler = create_scheduler(*requests)
    assert [request.prompt.request_id for request in scheduler.waiting] == list("dacbe")
    assert list(spans(scheduler)) == ["d"]


def test_if_not_all_can_go_on_the_most_urgent_does() -> None:
    scheduler = create_scheduler(request_of("a", 1), request_of("b", 0), max_num_batched_tokens=64)
    spans(scheduler)
    scheduler.max_num_seqs = 1
    assert list(spans(scheduler)) == ["b"]


def test_the_least_urgent_request_is_preempted_first_and_resumes_last() -> None:
    names = {"a": 1, "b": 0, "c": 1, "d": 0}
    requests = [
        request_of(name, priority, token_ids=[n + 1] * 8, max_tokens=8)
        for n, (name, priority) in enumerate(names.items())
    ]
    scheduler = create_scheduler(*requests, num_blocks=10, max_num_batched_tokens=64)
    runner = FakeRunner(10)
    spans(scheduler, runner)
    gone = []
    while scheduler.num_preemptions < 2:
        before = list(scheduler.running)
        spans(scheduler, runner)
        gone += [r.prompt.request_id for r in before if r in scheduler.waiting]
    assert gone == ["c", "a"], "the latest of the least urgent, then the other one"
    assert [request.prompt.request_id for request in scheduler.waiting] == ["a", "c"]
    run(scheduler, runner)
    for request in requests:
        assert request.output_token_ids == expected_output(request)


@given(
    st.lists(st.tuples(st.integers(-1, 1), st.integers(1, 20)), min_size=1, max_size=12),
    st.integers(8, 20),
)
def test_whatever_the_priorities_every_request_is_answered(
    given: list[tuple[int, int]], num_blocks: int
) -> None:
    requests = [
        request_of(str(n), priority, num_tokens=num_tokens, max_tokens=6)
        for n, (priority, num_tokens) in enumerate(given)
    ]
    scheduler = create_scheduler(*requests, num_blocks=num_blocks)
    run(scheduler, FakeRunner(num_blocks))
    for request in requests:
        assert request.output_token_ids == expected_output(request)


def test_room_for_embeddings_goes_to_the_most_urgent_request() -> None:
    budget = EmbeddingBudget(10)
    for name, priority in (("a", 0), ("b", 2), ("c", 0), ("d", 1)):
        budget.add((name, 0), 6, "preprocess", priority)
    order = []
    while reserved := budget.take_reserved():
        [(key, _)] = reserved
        order.append(key[0])
        budget.remove(key)
    assert order == ["a", "c", "d", "b"]
