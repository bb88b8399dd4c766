"""Several answers to one prompt: it is computed once, its blocks are shared, and each answer goes
on by itself, whatever becomes of the others."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from common.events import PeerDown, Received
from common.messages import Failed, Prompt, Sibling, Start
from tests.golden import CASES_WITH_ITEMS, GoldenCase
from tests.llm.builders import BLOCK_SIZE, create_prompt, create_request, expected_output
from tests.llm.test_engine import (
    IMAGE,
    POISON,
    add_golden,
    answer,
    assert_nothing_is_held,
    create_engine,
    golden_engine,
    images,
    outputs_of,
    send_embeddings,
    send_golden,
)
from tests.llm.test_worker import abort, answers, work

ALL = ("r", "s1", "s2")
NUM_TOKENS = 10
"""Two full blocks and a half."""


def prompt_of(siblings: Sequence[str] = ALL[1:], **fields: Any) -> Prompt:
    prompt = create_prompt(**{"num_tokens": NUM_TOKENS} | fields)
    seed = prompt.sampling.seed
    prompt.siblings = tuple(Sibling(id, seed + i) for i, id in enumerate(siblings, 1))
    return prompt


def wanted(**fields: Any) -> list[int]:
    return expected_output(create_request(**{"num_tokens": NUM_TOKENS} | fields))


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_greedy_answers_are_equal_and_the_prompt_is_computed_once(prefix_caching: bool) -> None:
    engine = create_engine(prefix_caching=prefix_caching)
    engine.add(prompt_of())
    outputs = outputs_of(engine)
    for id in ALL:
        assert answer(outputs, id) == (wanted(), "length")
    runner = engine.execute.__self__  # type: ignore[attr-defined]
    num_computed = sum(plan.num_tokens for plan in runner.plans)
    assert num_computed == NUM_TOKENS + len(ALL) * 3, "no token of the prompt twice"
    assert_nothing_is_held(engine)


def test_each_answer_has_its_own_seed() -> None:
    free = {"temperature": 1.0, "seed": 7}
    engine = create_engine()
    engine.add(prompt_of(sampling=free, max_tokens=6))
    outputs = outputs_of(engine)
    for index, id in enumerate(ALL):
        alone = create_engine()
        alone.add(prompt_of((), sampling=free | {"seed": 7 + index}, max_tokens=6))
        assert answer(outputs, id) == answer(outputs_of(alone))


def test_siblings_use_the_items_of_the_first_one() -> None:
    engine = create_engine()
    engine.add(prompt_of(images=IMAGE))
    assert outputs_of(engine) == [] and engine.load == (1, 2)
    assert send_embeddings(engine, images()) == ""
    outputs = outputs_of(engine)
    for id in ALL:
        assert answer(outputs, id) == (wanted(images=IMAGE), "length")
    assert_nothing_is_held(engine)
    assert engine.budget.num_free == engine.budget.num_tokens


def test_items_are_kept_until_the_last_answer_has_ended() -> None:
    engine = create_engine()
    engine.add(prompt_of(images=IMAGE))
    engine.budget.take_reserved()
    send_embeddings(engine, images())
    outputs = engine.step() or []
    engine.abort([("r", 0)])
    engine.abort([("s1", 0)])
    assert engine.budget.num_free == engine.budget.num_tokens - 5
    outputs += outputs_of(engine)
    assert answer(outputs, "s2")[0] == wanted(images=IMAGE)
    assert engine.budget.num_free == engine.budget.num_tokens


@pytest.mark.parametrize("gone", [*itertools.combinations(ALL, 1), *itertools.combinations(ALL, 2)])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_answers_go_on_without_those_that_were_aborted(
    gone: tuple[str, ...], num_steps: int
) -> None:
    engine = create_engine()
    engine.add(prompt_of())
    outputs = [output for _ in range(num_steps) for output in engine.step() or []]
    engine.abort([(id, 0) for id in gone])
    outputs += outputs_of(engine)
    for id in set(ALL) - set(gone):
        assert answer(outputs, id) == (wanted(), "length")
    assert engine.take_orphans() == []
    assert_nothing_is_held(engine)


def test_the_first_answer_may_end_at_once() -> None:
    engine = create_engine(prefix_caching=False)
    engine.add(prompt_of(max_tokens=1))
    outputs = outputs_of(engine)
    assert [answer(outputs, id) for id in ALL] == [(wanted(max_tokens=1), "length")] * 3
    assert_nothing_is_held(engine)


def test_a_prompt_that_must_be_whole_is_shared() -> None:
    engine = create_engine()
    engine.add(prompt_of(whole=True))
    outputs = outputs_of(engine)
    assert [answer(outputs, id)[0] for id in ALL] == [wanted()] * 3
    assert_nothing_is_held(engine)


def test_without_room_siblings_wait_and_take_their_turns() -> None:
    """16 blocks hold the prompt once, and the answers of some."""
    engine = create_engine(prefix_caching=False)
    others = [f"s{n}" for n in range(15)]
    engine.add(prompt_of(others, max_tokens=40))
    outputs = outputs_of(engine)
    assert engine.scheduler.num_preemptions > 0
    for id in ("r", *others):
        assert answer(outputs, id) == (wanted(max_tokens=40), "length")
    assert_nothing_is_held(engine)


def test_many_groups_at_once_all_end() -> None:
    engine = create_engine(prefix_caching=False)
    for group in range(5):
        engine.add(prompt_of([f"{group}.{n}" for n in range(7)], request_id=str(group)))
    outputs = outputs_of(engine)
    assert len({output.request.prompt.request_id for output in outputs}) == 40
    for group, n in itertools.product(range(5), range(7)):
        assert answer(outputs, f"{group}.{n}") == (wanted(), "length")
    assert_nothing_is_held(engine)


def test_those_that_waited_for_an_aborted_first_one_are_reported() -> None:
    engine = create_engine()
    engine.add(prompt_of(images=IMAGE))
    engine.abort([("r", 0)])
    assert [request.key for request in engine.take_orphans()] == [("s1", 0), ("s2", 0)]
    assert engine.take_orphans() == []
    assert_nothing_is_held(engine)
    assert engine.budget.num_free == engine.budget.num_tokens


def test_an_abort_of_all_before_the_prompt_leaves_nothing() -> None:
    engine = create_engine()
    for id in ALL:
        engine.abort_of("gateway", (id, 0))
    assert not engine.add(prompt_of(), "preprocess")
    assert_nothing_is_held(engine)


def test_an_abort_of_one_before_the_prompt_leaves_the_others() -> None:
    engine = create_engine()
    engine.abort_of("gateway", ("s1", 0))
    engine.add(prompt_of(), "preprocess")
    outputs = outputs_of(engine)
    assert [answer(outputs, id)[0] for id in ALL] == [wanted(), [], wanted()]
    assert_nothing_is_held(engine)


def test_what_is_not_finite_fails_all_answers() -> None:
    engine = create_engine()
    engine.add(prompt_of(token_ids=[1, 2, 3, 4, 5, POISON]))
    outputs = outputs_of(engine)
    assert [bool(output.error) for output in outputs] == [True] * 3
    assert_nothing_is_held(engine)


def test_siblings_of_a_request_that_is_apart_run_with_the_others_afterwards() -> None:
    engine = create_engine()
    engine.add(prompt_of(apart=True))
    engine.add(create_prompt("other"))
    assert engine.step() is None
    engine.scheduler.turn.note(("r", 0), "gateway")
    first = engine.step()
    assert first and [output.request.prompt.request_id for output in first] == [*ALL]
    again = engine.step()
    assert again and [output.request.prompt.request_id for output in again] == ["r"]
    engine.scheduler.clear(("r", 0), "gateway")
    outputs = [*first, *again, *outputs_of(engine)]
    assert [answer(outputs, id)[0] for id in ALL] == [wanted()] * 3
    assert_nothing_is_held(engine)


def test_usage_and_times_of_a_sibling_are_those_of_the_prompt() -> None:
    engine = create_engine()
    engine.add(create_prompt("before", num_tokens=BLOCK_SIZE + 1))
    outputs_of(engine)
    engine.add(prompt_of())
    requests = {output.request for output in outputs_of(engine)}
    assert [request.num_cached_tokens for request in requests] == [BLOCK_SIZE] * 3
    assert len({request.first_scheduled for request in requests}) == 1
    assert engine.scheduler.num_queried_tokens == BLOCK_SIZE + 1 + NUM_TOKENS, "the prompt once"


@pytest.mark.parametrize("name", CASES_WITH_ITEMS)
def test_siblings_give_the_references_answer(name: str) -> None:
    """The real model: the last block of the prompt is copied in its cache."""
    case = GoldenCase(name)
    engine = golden_engine(case, num_blocks=96)
    add_golden(engine, case, "r", tuple(Sibling(id, 0) for id in ALL[1:]))
    send_golden(engine, case, "r")
    outputs = outputs_of(engine)
    for id in ALL:
        assert answer(outputs, id) == (case.expected["greedy_ids"], "length")


# What the worker reports


def received(prompt: Prompt, peer_id: str = "preprocess") -> Any:
    return Received(peer_id, "preprocess", prompt)


def test_each_answer_has_a_start_and_tokens() -> None:
    sent = work([received(prompt_of(max_tokens=2))])
    for id in ALL:
        start, *tokens = answers(sent, id)
        assert isinstance(start, Start) and start.usage.prompt_tokens == NUM_TOKENS
        assert [each.token_ids.numpy().tolist() for each in tokens] == [
            [token] for token in wanted(max_tokens=2)
        ]


def test_gateways_retry_those_that_waited_for_an_aborted_one() -> None:
    sent = work([received(prompt_of(images=IMAGE))], [abort("r")])
    failed = [(to, m.request_id, m.code) for to, m in sent if isinstance(m, Failed)]
    assert failed == [("gateway", "s1", "Unavailable"), ("gateway", "s2", "Unavailable")]


def test_an_abort_of_all_is_not_answered() -> None:
    sent = work([received(prompt_of(images=IMAGE))], [PeerDown("preprocess", "preprocess", "gone")])
    assert not [message for _, message in sent if isinstance(message, Failed)]


@pytest.mark.parametrize("siblings", [("s1", "s1"), ("r",)])
def test_two_answers_of_one_name_are_refused(siblings: tuple[str, ...]) -> None:
    [(to, failed)] = work([received(prompt_of(siblings))])
    assert to == "gateway" and "the same request id" in failed.message


def test_a_sibling_that_is_here_already_is_ignored() -> None:
    sent = work([received(create_prompt("s2")), received(prompt_of())])
    assert {message.request_id for _, message in sent} == {"s2"}


def test_the_answers_of_a_lost_detokenizer_are_all_reported() -> None:
    gone = PeerDown("detokenizer", "detokenizer", "gone")
    sent = work([received(prompt_of(images=IMAGE))], [gone])
    failed = {m.request_id for _, m in sent if isinstance(m, Failed) and m.stage == "detokenizer"}
    assert failed == set(ALL)
