"""A request that ends members fails alone, after few of them; its neighbours are all answered."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from common.apart import MAX_DEATHS
from common.errors import Internal
from common.messages import Abort, Alone, Cleared, Noted, Submit
from services.gateway.blame import PASSED_TOKENS
from services.gateway.failover import MAX_LOSSES
from services.gateway.generation import Ended, GenerationEvent
from tests.gateway.builders import Gateway, delta, error_of, failed, request, rest, routed

INNOCENTS = [f"innocent{n}" for n in range(10)]


class Requests:
    """Requests of a gateway that has one member of each stage."""

    def __init__(self) -> None:
        self.gateway = Gateway(max_waiting=100)
        self.answers: dict[str, AsyncIterator[GenerationEvent]] = {}
        self._stack = AsyncExitStack()
        self._num_lost = 0

    async def __aenter__(self) -> "Requests":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def ask(self, *names: str) -> None:
        for name in names:
            generation = self.gateway.core.generate(request(name))
            self.answers[name] = await self._stack.enter_async_context(generation)

    def submit(self, name: str) -> Submit:
        """Return the latest Submit of a request."""
        id = self.gateway.id_of(name)
        return [m for _, m in self.gateway.submitted() if m.request_id == id][-1]

    def apart(self, field: str) -> set[str]:
        return {name for name in self.answers if getattr(self.submit(name), field)}

    def route(self, *names: str) -> None:
        self.route_to(f"llm-{1 + self._num_lost}", *names)

    def route_to(self, llm: str, *names: str) -> None:
        for name in names:
            self.gateway.on_event(routed(name, llm, attempt=self.submit(name).attempt))

    def tokens(self, name: str, begin: int, count: int, end: bool = False) -> None:
        ids = range(begin, begin + count)
        attempt = self.submit(name).attempt
        self.gateway.on_event(delta(begin, ids, "", "stop" if end else "", name, attempt))

    def alone(self, role: str, name: str, peer_id: str = "") -> list[Any]:
        """Let a member report that the request is alone there; return what it is answered."""
        submit = self.submit(name)
        message = Alone(request_id=submit.request_id, attempt=submit.attempt)
        peer_id = peer_id or f"{role}-{1 + self._num_lost}"
        sent = len(self.gateway.links.to(peer_id))
        self.gateway.on_event(message, peer_id=peer_id)
        return self.gateway.links.to(peer_id)[sent:]

    def die(self, role: str) -> None:
        """Lose the members of a role, and get another one."""
        self._num_lost += 1
        self.gateway.regain(role, 1 + self._num_lost)
        self.gateway.lose(role, self._num_lost)

    async def assert_answered(self, *names: str) -> None:
        for name in names:
            self.route(name)
            self.tokens(name, 0, 1, end=True)
            assert isinstance((await rest(self.answers[name]))[-1], Ended)


@pytest.mark.parametrize(
    ("role", "field"), [("preprocess", "apart"), ("llm", "apart_in_llm")], ids=["preprocess", "llm"]
)
async def test_of_ten_innocents_next_to_a_poison_all_are_answered(role: str, field: str) -> None:
    """The poison ends every process that works on it, as soon as the work begins."""
    async with Requests() as requests:
        await requests.ask(*INNOCENTS[:5], "poison", *INNOCENTS[5:])
        deaths = 0
        while deaths < MAX_DEATHS:
            if role == "llm":
                requests.route(*requests.answers)
            if deaths:
                assert requests.apart(field) == set(requests.answers)
                assert [type(m) for m in requests.alone(role, "poison")] == [Noted]
            requests.die(role)
            deaths += 1
        error = await error_of(requests.answers.pop("poison"))
        assert isinstance(error, Internal) and error.stage == role
        assert "this request alone" in error.message
        await requests.assert_answered(*INNOCENTS)


async def test_a_poison_of_detokenizers_fails_alone_and_the_answers_next_to_it_go_on() -> None:
    async with Requests() as requests:
        await requests.ask(*INNOCENTS, "poison")
        for deaths in range(1, MAX_DEATHS + 1):
            requests.route_to("llm-1", *requests.answers)
            if deaths == MAX_DEATHS:
                assert requests.apart("apart_in_llm") == set(requests.answers)
                requests.alone("llm", "poison", peer_id="llm-1")
            requests.die("detokenizer")
        assert isinstance(await error_of(requests.answers.pop("poison")), Internal)
        for name in INNOCENTS:
            requests.route_to("llm-1", name)
            requests.tokens(name, 0, 1, end=True)
            assert isinstance((await rest(requests.answers[name]))[-1], Ended)


@pytest.mark.parametrize("role", ["preprocess", "llm"])
async def test_a_request_that_waits_for_its_turn_is_not_blamed(role: str) -> None:
    """Whatever ends the members, it was not among the work."""
    async with Requests() as requests:
        await requests.ask("r")
        for _ in range(MAX_LOSSES - 1):
            if role == "llm":
                requests.route("r")
            requests.die(role)
        await requests.assert_answered("r")


async def test_requests_in_preparation_are_suspects_of_the_death_of_preprocess() -> None:
    async with Requests() as requests:
        await requests.ask("prepared", "in preparation")
        requests.route("prepared")
        requests.die("preprocess")
        assert requests.apart("apart") == {"in preparation"}
        assert requests.apart("apart_in_llm") == set()


async def test_a_request_is_no_suspect_any_more_once_it_has_passed_preprocess() -> None:
    async with Requests() as requests:
        await requests.ask("r")
        requests.die("preprocess")
        requests.alone("preprocess", "r")
        id = requests.gateway.id_of("r")
        before = len(requests.gateway.links.sent)
        requests.gateway.on_event(routed(id, "llm-2", attempt=1))
        [(receiver, message)] = requests.gateway.links.sent[before:]
        assert receiver == "preprocess-2" and isinstance(message, Cleared)
        requests.die("llm")
        assert requests.apart("apart") == set() and requests.apart("apart_in_llm") == {"r"}


async def test_all_answers_in_progress_go_on_at_once_together() -> None:
    """A group is lost for other reasons, too. Only what it had just begun is retried apart."""
    async with Requests() as requests:
        await requests.ask("a", "b", "new")
        requests.route("a", "b", "new")
        requests.tokens("a", 0, 1)
        requests.tokens("b", 0, 100)
        requests.die("llm")
        assert requests.apart("apart_in_llm") == {"new"}
        requests.route("a", "b")
        requests.tokens("a", 1, PASSED_TOKENS)
        requests.tokens("b", 100, PASSED_TOKENS)
        requests.die("llm")
        assert requests.apart("apart_in_llm") == {"new"}


async def test_an_answer_that_loses_two_groups_at_one_place_is_a_suspect() -> None:
    async with Requests() as requests:
        await requests.ask("stuck", "goes on")
        for n in range(MAX_DEATHS):
            requests.route("stuck", "goes on")
            requests.tokens("goes on", 20 * n, 20)
            requests.tokens("stuck", 3 * n, 3)
            if n:
                assert requests.apart("apart_in_llm") == ({"stuck"} if n > 1 else set())
            if n > 1:
                requests.alone("llm", "stuck")
            requests.die("llm")
        assert isinstance(await error_of(requests.answers.pop("stuck")), Internal)
        assert requests.apart("apart_in_llm") == set()


@pytest.mark.parametrize("is_end", [True, False], ids=["ended", "passed"])
async def test_a_request_is_cleared_at_its_group_after_a_few_tokens_or_at_its_end(
    is_end: bool,
) -> None:
    async with Requests() as requests:
        await requests.ask("r")
        requests.route("r")
        requests.die("llm")
        requests.alone("llm", "r")  # It may come before Routed, over another connection.
        requests.route("r")
        requests.tokens("r", 0, 1)
        before = len(requests.gateway.links.sent)
        requests.tokens("r", 1, 1 if is_end else PASSED_TOKENS - 1, is_end)
        [(receiver, message)] = requests.gateway.links.sent[before:]
        assert receiver == "llm-2" and isinstance(message, Cleared)


async def test_a_loss_that_preprocess_reports_first_is_blamed_all_the_same() -> None:
    """Preprocess may notice that the group is gone before the gateway does."""
    async with Requests() as requests:
        await requests.ask("r")
        for n in range(MAX_DEATHS):
            requests.route("r")
            if n:
                requests.alone("llm", "r")
            attempt = requests.submit("r").attempt
            report = failed("Unavailable", "llm", attempt=attempt)
            requests.gateway.on_event(report)
            requests.die("llm")
            if n < MAX_DEATHS - 1:
                assert requests.apart("apart_in_llm") == {"r"}
        assert isinstance(await error_of(requests.answers["r"]), Internal)


async def test_a_request_that_has_ended_does_not_keep_its_turn() -> None:
    async with Requests() as requests:
        await requests.ask("r")
        requests.route("r")
        late = Alone(request_id="gone~1", attempt=0)
        requests.gateway.on_event(late, peer_id="llm-1")
        assert requests.gateway.links.to("llm-1") == [Abort(request_id="gone~1", attempt=0)]
