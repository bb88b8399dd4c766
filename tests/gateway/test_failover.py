"""The loss of a member: its requests continue on other members after the tokens already delivered,
or wait for a new member."""

from collections.abc import AsyncIterator

import pytest

from common.errors import DeadlineExceeded, Internal, Unavailable
from common.messages import Abort, Failed, HandedOver
from services.gateway.failover import MAX_LOSSES
from services.gateway.generation import Began, Ended, GenerationEvent, Piece
from services.gateway.peers import CONNECTED_STAGES
from tests.gateway.builders import Gateway, delta, error_of, failed, request, rest, routed


async def text_of(events: AsyncIterator[GenerationEvent]) -> str:
    """Return the text of an answer that must succeed."""
    found = await rest(events)
    assert isinstance(found[0], Began) and isinstance(found[-1], Ended)
    return "".join(event.text for event in found if isinstance(event, Piece))


@pytest.mark.parametrize("role", CONNECTED_STAGES)
async def test_exactly_the_requests_of_a_lost_member_are_retried_on_other_members(
    role: str,
) -> None:
    gateway = Gateway(replicas=2)
    async with (
        gateway.core.generate(request("r1")) as lost,
        gateway.core.generate(request("r2")) as kept,
    ):
        gateway.on_event(routed("r1", "llm-1"), routed("r2", "llm-2"))
        gateway.lose(role)
        [(preprocess, retry)] = [
            (to, submit) for to, submit in gateway.submitted() if submit.attempt == 1
        ]
        assert retry.request_id == gateway.id_of("r1")
        assert preprocess != f"{role}-1" and retry.detokenizer.id != f"{role}-1"
        assert retry.avoid == ("llm-1" if role == "llm" else "")
        gateway.on_event(delta(0, [10], "old", "stop", "r1"), delta(0, [10], "a", "stop", "r2"))
        gateway.on_event(
            routed("r1", "llm-2", attempt=1), delta(0, [20], "new", "stop", "r1", attempt=1)
        )
        assert (await text_of(kept), await text_of(lost)) == ("a", "new")
    assert gateway.aborts() == [("preprocess-1", "r1"), ("llm-1", "r1")]
    assert gateway.is_idle


async def test_a_retry_continues_after_the_tokens_that_the_client_has() -> None:
    gateway = Gateway(replicas=2)
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed("r", "llm-1"), delta(0, [10, 11], "ab"))
        gateway.lose("llm")
        retry = gateway.submitted()[-1][1]
        assert (retry.attempt, retry.avoid) == (1, "llm-1")
        assert retry.output_token_ids is not None and retry.output_token_ids.numpy().tolist() == [
            10,
            11,
        ]
        gateway.on_event(
            delta(2, [99], "from the dead group"),
            routed("r", "llm-2", attempt=1),
            delta(2, [12], "c", "stop", attempt=1),
        )
        assert await text_of(events) == "abc"


@pytest.mark.parametrize("role", CONNECTED_STAGES)
async def test_a_request_waits_for_the_restart_of_the_only_member_of_a_role(role: str) -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed())
        gateway.lose(role)
        gateway.on_event(delta(0, [66], "from the dead group", "stop"))
        gateway.regain("vision")
        assert len(gateway.submitted()) == 1 and gateway.core.load() == (0, 1)
        gateway.regain(role, 7)
        (_, first), (preprocess, retry) = gateway.submitted()
        assert (first.attempt, retry.attempt) == (0, 1)
        assert role not in ("preprocess", "detokenizer") or f"{role}-7" in (
            preprocess,
            retry.detokenizer.id,
        )
        gateway.on_event(routed("r", "llm-7", attempt=1), delta(0, [10], "a", "stop", attempt=1))
        assert await text_of(events) == "a"
    assert gateway.is_idle


async def test_an_answer_survives_the_loss_of_one_language_group_after_the_other() -> None:
    gateway = Gateway(replicas=2)
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed("r", "llm-1"), delta(0, [10], "a"))
        gateway.lose("llm", 1)
        gateway.on_event(routed("r", "llm-2", attempt=1), delta(1, [11], "b", attempt=1))
        gateway.lose("llm", 2)
        assert [submit.attempt for _, submit in gateway.submitted()] == [0, 1]
        gateway.regain("llm", 3)
        gateway.on_event(routed("r", "llm-3", attempt=2))
        gateway.lose("llm", 3)  # before its first token
        gateway.regain("llm", 4)
        retry = gateway.submitted()[-1][1]
        assert (
            retry.attempt == 3
            and retry.output_token_ids is not None
            and retry.output_token_ids.numpy().tolist() == [10, 11]
        )
        gateway.on_event(routed("r", "llm-4", attempt=3), delta(2, [12], "c", "stop", attempt=3))
        assert await text_of(events) == "abc"


async def test_a_language_group_that_died_before_routed_counts_as_a_loss() -> None:
    gateway = Gateway(replicas=2)
    async with gateway.core.generate(request()):
        gateway.lose("llm", 1)
        gateway.on_event(routed("r", "llm-1"))
        assert len(gateway.submitted()) == 1
        gateway.lose("llm", 1)  # A connection that could not be made ends this way.
        assert gateway.submitted()[-1][1].attempt == 1


async def test_a_waiting_request_fails_when_its_patience_ends() -> None:
    gateway = Gateway(patience=0.01)
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed())
        gateway.lose("llm")
        error = await error_of(events)
    assert isinstance(error, Unavailable) and (error.stage, error.retry_after) == ("llm", 1.0)
    assert "killed" in error.message and "within 0.01 s" in error.message
    gateway.regain("llm", 2)
    assert len(gateway.submitted()) == 1 and gateway.is_idle


async def test_a_waiting_request_fails_at_its_deadline() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request(timeout=0.01)) as events:
        gateway.lose("llm")
        gateway.lose("preprocess")
        error = await error_of(events)
    assert isinstance(error, DeadlineExceeded) and error.stage == "gateway"
    assert gateway.is_idle


async def test_a_waiting_request_whose_client_leaves_is_forgotten() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()):
        gateway.lose("preprocess")
    gateway.regain("preprocess", 2)
    assert len(gateway.submitted()) == 1 and gateway.is_idle


async def test_a_new_request_waits_for_a_stage_that_restarts() -> None:
    gateway = Gateway()
    gateway.lose("llm")
    async with gateway.core.generate(request()) as events:
        assert gateway.submitted() == []
        gateway.regain("llm", 2)
        gateway.on_event(routed("r", "llm-2"), delta(0, [10], "a", "stop"))
        assert await text_of(events) == "a"
    assert gateway.is_idle


async def test_a_new_request_is_refused_if_a_stage_has_been_missing_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway = Gateway()
    monkeypatch.setattr("services.gateway.admission.OUTAGE_SECONDS", -1.0)
    gateway.lose("llm")
    with pytest.raises(Unavailable, match="no llm is connected") as refused:
        async with gateway.core.generate(request()):
            pass
    assert refused.value.retry_after and gateway.is_idle


async def test_a_request_that_no_blame_explains_fails_after_too_many_losses() -> None:
    gateway = Gateway(replicas=2)
    async with gateway.core.generate(request()) as events:
        for attempt in range(MAX_LOSSES):
            assert gateway.submitted()[-1][1].attempt == attempt
            gateway.on_event(
                routed("r", "llm-1", attempt=attempt),
                delta(attempt, [attempt], "a", attempt=attempt),
            )
            gateway.lose("llm")
            gateway.regain("llm")
        assert isinstance(await error_of(events), Unavailable)
    assert gateway.is_idle


async def test_a_request_is_retried_if_a_stage_cannot_reach_another() -> None:
    """Preprocess may not know the restarted group yet, and a group may have lost a detokenizer to
    which the gateway is still connected."""
    gateway = Gateway(replicas=2, retry_seconds=0.0)
    async with gateway.core.generate(request()) as events:
        for attempt in range(MAX_LOSSES + 1):
            assert gateway.submitted()[-1][1].attempt == attempt
            gateway.on_event(failed("Unavailable", "llm", attempt=attempt))
            gateway.regain("vision")  # A new member of any role makes the gateway retry at once.
        number = MAX_LOSSES + 1
        gateway.on_event(routed("r", "llm-1", attempt=number), delta(0, [10], "a", attempt=number))
        gateway.on_event(failed("Unavailable", "llm", attempt=number))
        gateway.regain("vision")
        retry = gateway.submitted()[-1][1]
        assert (retry.attempt, retry.avoid) == (number + 1, "llm-1")
        gateway.on_event(
            routed("r", "llm-2", attempt=number + 1),
            delta(1, [11], "b", "stop", attempt=number + 1),
        )
        assert await text_of(events) == "ab"
    assert gateway.is_idle


async def test_a_request_fails_if_a_stage_cannot_reach_another_for_long() -> None:
    gateway = Gateway(retry_seconds=0.0, patience=0.01)
    async with gateway.core.generate(request()) as events:
        gateway.on_event(failed("Unavailable", "llm"))
        error = await error_of(events)
    assert (
        isinstance(error, Unavailable)
        and "why" in error.message
        and "within 0.01 s" in error.message
    )


async def test_an_image_that_no_replica_could_encode_fails_the_request() -> None:
    gateway = Gateway(replicas=2)
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed(), failed("Unavailable", "vision", 1))
        error = await error_of(events)
    assert isinstance(error, Unavailable) and (error.stage, error.item) == ("vision", 1)


async def test_an_image_that_fails_in_a_later_attempt_fails_the_request() -> None:
    """The language group of this attempt has not sent a token, though an earlier one has."""
    gateway = Gateway(replicas=2)
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed("r", "llm-1"), delta(0, [10], "a"))
        gateway.lose("llm")
        gateway.on_event(
            Failed(
                request_id="r", attempt=1, code="Internal", message="why", stage="vision", item=2
            )
        )
        error = await error_of(events)
    assert isinstance(error, Internal) and error.item == 2


async def test_losing_preprocess_after_the_handover_does_not_interrupt_the_answer() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request(images=(b"png",))) as events:
        gateway.on_event(routed(), HandedOver(request_id="r", attempt=0))
        gateway.lose("preprocess")
        gateway.on_event(delta(0, [10], "a", "stop"))
        assert await text_of(events) == "a"


async def test_a_member_that_comes_back_gets_the_aborts_that_it_missed() -> None:
    """A member may freeze so shortly that it does not notice its expired lease. Prompts of aborted
    requests may then still be unread on its connection to preprocess."""
    gateway = Gateway(replicas=2)
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed("r", "llm-1"), delta(0, [10], "a"))
        id = gateway.id_of("r")
        gateway.lose("llm", reason="frozen")
        gateway.links.take()
        gateway.regain("llm")
        assert gateway.links.take() == [("llm-1", Abort(request_id=id, attempt=0))]
        gateway.regain("llm")
        assert gateway.links.take() == [], "once"
        gateway.on_event(routed(id, "llm-2", attempt=1), delta(1, [11], "b", "stop", id, attempt=1))
        assert await text_of(events) == "ab"
