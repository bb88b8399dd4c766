"""A member that is lost with requests in hand: they go on elsewhere, after the tokens their clients have."""

import pytest

from common.errors import Internal, Unavailable
from common.links import Down, Up
from common.messages import Abort, Failed
from services.gateway.core import CONNECTED_STAGES, MAX_ATTEMPTS
from services.gateway.generation import Began, Ended, Piece
from tests.gateway.builders import Gateway, delta, error_of, request, rest, routed


@pytest.mark.parametrize("role", CONNECTED_STAGES)
async def test_a_stage_lost_without_another_fails_its_requests_at_once(role: str) -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as lost:
        gateway.hear(routed())
        gateway.core.hear(Down(f"{role}-1", role, "killed"))
        gateway.hear(delta(0, [10], "a", "stop"))
        error = await error_of(lost)
    assert isinstance(error, Unavailable) and error.stage == role and "killed" in error.message
    assert gateway.aborts() == [("preprocess-1", "r"), ("llm-1", "r")]
    assert gateway.is_idle


@pytest.mark.parametrize("role", CONNECTED_STAGES)
async def test_exactly_the_requests_of_a_lost_stage_go_on_elsewhere(role: str) -> None:
    gateway = Gateway(replicas=2)
    async with gateway.core.generate(request("r1")) as lost, gateway.core.generate(request("r2")) as kept:
        gateway.hear(routed("r1", "llm-1"), routed("r2", "llm-2"))
        gateway.core.hear(Down(f"{role}-1", role, "killed"))
        [(_, anew)] = [(to, submit) for to, submit in gateway.submitted() if submit.attempt == 1]
        assert anew.request_id == "r1" and f"{role}-1" in (anew.avoid, anew.detokenizer.id, "preprocess-1")
        gateway.hear(delta(0, [10], "old", "stop", "r1"), delta(0, [10], "a", "stop", "r2"))
        gateway.hear(routed("r1", "llm-2", attempt=1), delta(0, [20], "new", "stop", "r1", attempt=1))
        assert isinstance((await rest(kept))[-1], Ended)
        assert [event.text for event in await rest(lost) if isinstance(event, Piece)] == ["new"]
    assert gateway.aborts() == [("preprocess-1", "r1"), ("llm-1", "r1")]
    assert gateway.is_idle


async def test_an_answer_goes_on_after_the_tokens_that_the_client_has() -> None:
    gateway = Gateway(replicas=2)
    async with gateway.core.generate(request()) as events:
        gateway.hear(routed("r", "llm-1"), delta(0, [10, 11], "ab"))
        gateway.core.hear(Down("llm-1", "llm", "killed"))
        anew = gateway.submitted()[-1][1]
        assert (anew.attempt, anew.avoid) == (1, "llm-1")
        assert anew.output_token_ids is not None and anew.output_token_ids.numpy().tolist() == [10, 11]
        gateway.hear(delta(2, [99], "of the dead one"), routed("r", "llm-2", attempt=1), delta(2, [12], "c", "stop", attempt=1))
        found = await rest(events)
    assert [type(event) for event in found] == [Began, Piece, Piece, Ended]
    assert "".join(event.text for event in found if isinstance(event, Piece)) == "abc"


async def test_an_image_that_fails_in_a_later_attempt_fails_the_request() -> None:
    """The language group of that attempt has not begun to answer, whatever an earlier one did."""
    gateway = Gateway(replicas=2)
    async with gateway.core.generate(request()) as events:
        gateway.hear(routed("r", "llm-1"), delta(0, [10], "a"))
        gateway.core.hear(Down("llm-1", "llm", "killed"))
        gateway.hear(Failed(request_id="r", attempt=1, code="Internal", message="why", stage="vision", image=2))
        error = await error_of(events)
    assert isinstance(error, Internal) and error.image == 2


async def test_a_request_is_given_up_after_so_many_attempts() -> None:
    gateway = Gateway(replicas=2)
    async with gateway.core.generate(request()) as events:
        for attempt in range(MAX_ATTEMPTS):
            gateway.hear(routed("r", "llm-1", attempt=attempt))
            gateway.core.hear(Down("llm-1", "llm", f"killed {attempt}"))
            gateway.core.hear(Up("llm-1", "llm", "ipc:///llm-1"))
        error = await error_of(events)
    assert isinstance(error, Unavailable) and f"killed {MAX_ATTEMPTS - 1}" in error.message


async def test_a_member_that_comes_back_under_its_id_is_told_what_was_given_up() -> None:
    """Frozen for less than it would notice: its prompts may still lie unread on another connection."""
    gateway = Gateway(replicas=2)
    async with gateway.core.generate(request()) as events:
        gateway.hear(routed("r", "llm-1"), delta(0, [10], "a"))
        gateway.core.hear(Down("llm-1", "llm", "frozen"))
        gateway.links.take()
        gateway.core.hear(Up("llm-1", "llm", "ipc:///llm-1"))
        assert gateway.links.take() == [("llm-1", Abort(request_id="r", attempt=0))]
        gateway.core.hear(Up("llm-1", "llm", "ipc:///llm-1"))
        assert gateway.links.take() == [], "once"
        gateway.hear(routed("r", "llm-2", attempt=1), delta(1, [11], "b", "stop", attempt=1))
        assert isinstance((await rest(events))[-1], Ended)
