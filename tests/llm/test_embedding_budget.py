"""Room for embeddings: given to whole requests in their order, so that none waits for another that
waits for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import RequestKey
from compute.torch_tensors import to_wire
from services.llm.embedding_budget import EmbeddingBudget, embedding_tokens
from tests.llm.builders import create_prompt
from tests.llm.test_engine import create_engine, images, outputs_of


def key(n: int) -> RequestKey:
    return f"r{n}", 0


def reserved(budget: EmbeddingBudget) -> list[int]:
    return [int(request_id[1:]) for (request_id, _), _ in budget.take_reserved()]


def test_room_is_given_for_all_images_of_a_request_or_for_none_and_its_owner_is_named() -> None:
    budget = EmbeddingBudget(10)
    budget.add(key(0), 6, "preprocess-1")
    budget.add(key(1), 6, "preprocess-2")
    assert budget.take_reserved() == [(key(0), "preprocess-1")] and budget.num_free == 4
    assert budget.take_reserved() == []
    budget.remove(key(0))
    assert budget.take_reserved() == [(key(1), "preprocess-2")]


def test_a_small_request_does_not_overtake_a_large_one_that_waits() -> None:
    budget = EmbeddingBudget(10)
    for n, size in enumerate((6, 8, 1)):
        budget.add(key(n), size, "p")
    assert reserved(budget) == [0]
    budget.remove(key(0))
    assert reserved(budget) == [1, 2]


def test_a_request_that_ends_while_it_waits_keeps_nobody_waiting() -> None:
    budget = EmbeddingBudget(10)
    for n, size in enumerate((6, 8, 4)):
        budget.add(key(n), size, "p")
    assert reserved(budget) == [0]
    budget.remove(key(1))
    assert reserved(budget) == [2] and budget.num_free == 0


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_every_request_gets_its_turn_and_the_bound_holds(sizes: list[int], random: object) -> None:
    budget = EmbeddingBudget(20)
    waiting = set(range(len(sizes)))
    held = list[int]()
    for n, size in enumerate(sizes):
        budget.add(key(n), size, "p")
    while waiting or held:
        held += reserved(budget)
        waiting -= set(held)
        assert held and sum(sizes[n] for n in held) == 20 - budget.num_free <= 20
        n = held.pop(random.randrange(len(held)))  # type: ignore[attr-defined]
        budget.remove(key(n))
    assert budget.num_free == 20


def test_requests_of_many_images_that_all_want_more_than_there_is_end_one_after_the_other() -> None:
    """Each brings its images only when it was told that there is room, one image of each request in
    turn: as vision replicas do."""
    engine = create_engine(max_num_seqs=8)
    engine.budget = EmbeddingBudget(25)  # one request of 20 image tokens, not two
    for n in range(6):
        four = tuple((1 + 6 * image, 5, 10 * n + image) for image in range(4))
        engine.add(create_prompt(f"r{n}", num_tokens=26, max_tokens=2, images=four), "preprocess")
    sendable: dict[RequestKey, list[int]] = {}
    ended: list[str] = []
    for _ in range(200):
        sendable |= {
            k: [0, 1, 2, 3] for k, owner in engine.budget.take_reserved() if owner == "preprocess"
        }
        for k, left in sendable.items():
            if left:
                image = left.pop(0)
                key = (*k, image)
                mm_hash = engine.requests[k].mm_hash(image) or ""
                assert engine.add_embeddings(key, mm_hash, to_wire(images(image)), {}) == ""
        ended += [
            output.request.prompt.request_id
            for output in outputs_of(engine)
            if output.finish_reason
        ]
        assert (
            sum(e.shape[0] for r in engine.requests.values() for e in r.embeddings.values()) <= 25
        )
    assert ended == [f"r{n}" for n in range(6)]
    assert engine.budget.num_free == 25 and not engine.requests


def test_an_aborted_request_gives_its_room_back() -> None:
    engine = create_engine()
    engine.budget = EmbeddingBudget(5)
    for n in range(2):
        engine.add(create_prompt(f"r{n}", images=((1, 5, n),)), "preprocess")
    assert reserved(engine.budget) == [0]
    engine.abort([key(0)])
    assert reserved(engine.budget) == [1]


def test_a_request_without_images_asks_for_no_room() -> None:
    engine = create_engine()
    engine.add(create_prompt(), "preprocess")
    assert engine.budget.take_reserved() == []


def test_the_budget_is_bounded_by_memory_but_holds_any_one_request() -> None:
    assert embedding_tokens(1000, 500, 4) == 2000
    assert embedding_tokens(10**15, 500, 4) < 10**13
    assert embedding_tokens(10**15, 500, 10**15) == 500


def test_no_more_room_than_the_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.cgroup.container_memory", lambda root: [8000])
    assert embedding_tokens(10**15, 500, 1) == 1000
