"""Several answers to one request: one prompt and one usage, and each answer is retried alone."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from common.apart import MAX_DEATHS
from common.errors import DeadlineExceeded, Internal, InvalidRequest
from common.messages import Abort, Alone, HandedOver, Sampling, Submit, Usage
from services.gateway.generation import Began, Ended, GenerationEvent, Piece
from services.gateway.parameters import MAX_SEED
from tests.gateway.builders import USAGE, Gateway, delta, error_of, request, rest, routed


class Asked:
    """A gateway and a request for several answers."""

    def __init__(self, n: int = 2, **options: Any) -> None:
        self.gateway = Gateway(**options)
        self.generation = self.gateway.core.generate(request(n=n, sampling=Sampling(seed=5)))

    async def __aenter__(self) -> AsyncIterator[GenerationEvent]:
        return await self.generation.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        await self.generation.__aexit__(*error)

    @property
    def submits(self) -> list[Submit]:
        return [submit for _, submit in self.gateway.submitted()]

    def id(self, choice: int) -> str:
        first = self.submits[0].request_id
        return f"{first}.{choice}" if choice else first

    def token(self, choice: int, offset: int, end: bool = False, attempt: int = 0) -> None:
        """Let the next token of an answer arrive, which names its answer and its place."""
        ids = [10 * choice + offset]
        reason = "stop" if end else ""
        self.gateway.on_event(delta(offset, ids, f"{ids[0]} ", reason, self.id(choice), attempt))


async def test_the_events_of_all_answers_come_by_their_index() -> None:
    asked = Asked(replicas=2)
    async with asked as events:
        [submit] = asked.submits
        assert [(s.request_id, s.seed) for s in submit.siblings] == [(asked.id(1), 6)]
        asked.gateway.on_event(routed(ids=[1, 2, 3]))
        for choice, offset, end in ((0, 0, False), (1, 0, True), (0, 1, True)):
            asked.token(choice, offset, end)
        begun, zero, other, one, end_of_one, last, end_of_zero = await rest(events)
    assert [begun, other] == [
        Began([1, 2, 3]),
        Began([1, 2, 3], {"decode_seconds": 0.5}, choice=1, usage=USAGE),
    ]
    assert [zero, one, last] == [
        Piece(0, [0], "0 ", []),
        Piece(0, [10], "10 ", [], choice=1),
        Piece(1, [1], "1 ", []),
    ]
    assert isinstance(end_of_one, Ended) and isinstance(end_of_zero, Ended)
    assert (end_of_one.choice, end_of_one.is_last, end_of_one.usage) == (1, False, USAGE)
    assert (end_of_zero.choice, end_of_zero.is_last) == (0, True)
    assert end_of_zero.usage == Usage(prompt_tokens=9, completion_tokens=6), "the prompt once"
    assert asked.gateway.is_idle and asked.gateway.aborts() == []


async def test_tokens_that_overtake_the_route_are_kept_for_their_answer() -> None:
    asked = Asked()
    async with asked as events:
        asked.token(1, 0, end=True)
        asked.token(0, 0, end=True)
        asked.gateway.on_event(routed(), routed(asked.id(1)))
        kinds = [(type(event), getattr(event, "choice", 0)) for event in await rest(events)]
    assert kinds == [
        (Began, 0), (Piece, 0), (Ended, 0), (Began, 1), (Piece, 1), (Ended, 1),
    ]  # fmt: skip


async def test_seeds_start_again_after_the_greatest() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request(n=3, sampling=Sampling(seed=MAX_SEED))):
        [(_, submit)] = gateway.submitted()
    assert [sibling.seed for sibling in submit.siblings] == [0, 1]


async def test_answers_wait_for_the_first_one_to_begin() -> None:
    """Only after a failover may another one be quicker."""
    asked = Asked(replicas=2)
    async with asked as events:
        asked.gateway.on_event(routed())
        asked.gateway.lose("llm")
        for choice in (1, 0):
            asked.gateway.on_event(routed(asked.id(choice), "llm-2", attempt=1))
            asked.token(choice, 0, end=True, attempt=1)
        found = await rest(events)
    assert [getattr(event, "choice", 0) for event in found] == [0, 1, 1, 1, 0, 0]
    assert isinstance(found[0], Began)


async def test_each_answer_of_a_lost_group_goes_on_after_its_own_tokens() -> None:
    asked = Asked(replicas=2)
    async with asked as events:
        asked.gateway.on_event(routed())
        for choice, offset, end in ((0, 0, True), (1, 0, False), (1, 1, False)):
            asked.token(choice, offset, end)
        asked.gateway.lose("llm")
        _, again = asked.submits
        assert (again.request_id, again.attempt, again.siblings) == (asked.id(1), 1, ())
        assert again.output_token_ids and again.output_token_ids.numpy().tolist() == [10, 11]
        assert again.sampling.seed == 6
        asked.gateway.on_event(routed(asked.id(1), "llm-2", attempt=1))
        asked.token(1, 2, end=True, attempt=1)
        texts = [event.text for event in await rest(events) if isinstance(event, Piece)]
    assert texts == ["0 ", "10 ", "11 ", "12 "]


async def test_a_preprocess_that_dies_with_the_prompt_loses_one_attempt() -> None:
    asked = Asked(n=3, replicas=2)
    async with asked as events:
        asked.gateway.lose("preprocess")
        _, again = asked.submits
        assert (again.attempt, len(again.siblings)) == (1, 2)
        asked.gateway.on_event(routed(attempt=1))
        for choice in range(3):
            asked.token(choice, 0, end=True, attempt=1)
        assert len(await rest(events)) == 9


async def test_answers_whose_items_arrived_do_not_need_preprocess() -> None:
    asked = Asked(n=2)
    async with asked:
        asked.gateway.on_event(routed())
        for choice in range(2):
            asked.gateway.on_event(HandedOver(request_id=asked.id(choice), attempt=0))
        asked.gateway.lose("preprocess")
        assert len(asked.submits) == 1


@pytest.mark.parametrize("role", ["preprocess", "llm"])
async def test_a_poison_ends_no_more_members_than_with_one_answer(role: str) -> None:
    asked = Asked(n=8, replicas=20)
    async with asked as events:
        for number in range(1, MAX_DEATHS + 1):
            submit = asked.submits[-1]
            if role == "llm":
                ids = {"attempt": submit.attempt, "llm": f"llm-{number}"}
                asked.gateway.on_event(routed(submit.request_id, **ids))
            member = f"{role}-{number}"
            if number > 1:
                assert submit.apart_in_llm if role == "llm" else submit.apart
                alone = Alone(request_id=submit.request_id, attempt=submit.attempt)
                asked.gateway.on_event(alone, peer_id=member)
            asked.gateway.lose(role, number)
        assert isinstance(await error_of(events), Internal)
    assert asked.gateway.is_idle


async def test_a_client_that_leaves_aborts_all_answers() -> None:
    asked = Asked(n=3)
    async with asked as events:
        asked.gateway.on_event(routed())
        asked.token(0, 0, end=True)
        await anext(events)
    assert asked.gateway.is_idle
    assert sorted(asked.gateway.links.to("llm-1"), key=lambda abort: abort.request_id) == [
        Abort(request_id=asked.id(choice), attempt=0) for choice in (1, 2)
    ]


async def test_a_client_that_leaves_early_aborts_what_is_routed_late() -> None:
    asked = Asked(n=3)
    async with asked:
        pass
    assert asked.gateway.links.to("preprocess-1")[1:] == [Abort(request_id=asked.id(0), attempt=0)]
    asked.gateway.on_event(*(routed(asked.id(choice)) for choice in range(3)))
    assert asked.gateway.links.to("llm-1") == [
        Abort(request_id=asked.id(choice), attempt=0) for choice in range(3)
    ]


async def test_the_failure_of_an_answer_ends_the_others() -> None:
    asked = Asked(n=3)
    async with asked as events:
        asked.gateway.on_event(routed())
        asked.token(1, 5)
        assert "expected token 0" in (await error_of(events)).message
        assert asked.gateway.is_idle
        assert len(asked.gateway.links.to("llm-1")) == 3


async def test_the_deadline_ends_all_answers() -> None:
    asked = Asked(n=3, request_timeout=0.01)
    async with asked as events:
        assert isinstance(await error_of(events), DeadlineExceeded)
    assert asked.gateway.is_idle


async def test_each_answer_counts_as_a_request_that_waits() -> None:
    asked = Asked(n=3)
    async with asked:
        assert asked.gateway.core.load() == (0, 3)
        asked.gateway.on_event(routed())
        asked.token(0, 0)
        assert asked.gateway.core.load() == (1, 2)


async def test_a_label_is_no_text_to_make_several_of() -> None:
    gateway = Gateway()
    gateway.core.peers.tasks = ("classify",)
    with pytest.raises(InvalidRequest, match="several answers"):
        async with gateway.core.generate(request(n=2)):
            pass
