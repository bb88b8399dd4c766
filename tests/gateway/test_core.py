"""The gateway's core: admission, one end for every request, and aborts in every stage."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from common.errors import (
    DeadlineExceeded,
    Exhausted,
    Internal,
    NotFound,
    Unavailable,
    UnreadableImage,
)
from common.events import PeerDown
from common.membership import DEAD, READY
from common.messages import Abort, Converted, Peer
from common.wire import Tensor
from proto.twinlens.control.v1 import control_pb2
from services.gateway.generation import Began, Conversion, Ended, GenerationEvent, Piece
from services.gateway.peers import CONNECTED_STAGES
from tests.gateway.builders import USAGE, Gateway, delta, error_of, failed, request, rest, routed


async def test_preprocess_gets_the_whole_request() -> None:
    gateway = Gateway()
    async with gateway.core.generate(
        request(images=(b"png",), timeout=5, return_prompt_token_ids=True)
    ):
        [(receiver, submit)] = gateway.submitted()
    assert receiver == "preprocess-1"
    assert submit.request_id.startswith("r~")
    assert (submit.attempt, submit.return_prompt_token_ids) == (0, True)
    assert 4 < submit.timeout <= 5
    assert (submit.prompt.bytes(), [item.data.bytes() for item in submit.items]) == (
        b"[]",
        [b"png"],
    )
    assert submit.detokenizer == Peer("detokenizer-1", "ipc:///detokenizer-1")


async def test_token_ids_travel_as_int64() -> None:
    gateway = Gateway()
    async with gateway.core.generate(
        request(prompt_kind="token_ids", prompt=np.array([5, 2**40], "<i8").tobytes())
    ):
        [(_, submit)] = gateway.submitted()
    assert submit.prompt.numpy().tolist() == [5, 2**40]
    assert 59 < submit.timeout <= 60, "the gateway's default, because the client sets none"


def converted(ids: Tensor, attempt: int = 0) -> Converted:
    return Converted(request_id="r", attempt=attempt, token_ids=ids)


async def test_preprocess_itself_answers_what_needs_no_model() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request(task="tokenize", prompt_kind="text")) as events:
        [(_, submit)] = gateway.submitted()
        assert (submit.task, submit.detokenizer) == ("tokenize", Peer("", ""))
        gateway.on_event(converted(Tensor.of_int64([5, 6])), peer_id="llm-1")
        assert not gateway.is_idle, "only preprocess may answer"
        gateway.on_event(converted(Tensor.of_int64([5, 6])))
        assert await rest(events) == [Conversion([5, 6], None, "")]
    assert gateway.is_idle and gateway.aborts() == []


async def test_a_conversion_is_asked_for_again_if_preprocess_is_lost() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request(task="tokenize", prompt_kind="text")) as events:
        gateway.lose("preprocess")
        gateway.regain("preprocess", 2)
        gateway.on_event(converted(Tensor.of_int64([5]), attempt=1))
        assert await rest(events) == [Conversion([5], None, "")]


async def test_a_malformed_conversion_fails_its_request() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request(task="tokenize", prompt_kind="text")) as events:
        gateway.on_event(converted(Tensor.of_text("a")))
        assert isinstance(await error_of(events), Internal)


async def test_an_answer_is_began_then_pieces_then_ended() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed(ids=[1, 2]), delta(0, [10], "He"), delta(1, [11, 12], "y", "stop"))
        began, first, second, ended = await rest(events)
    assert began == Began([1, 2])
    assert (first, second) == (Piece(0, [10], "He", []), Piece(1, [11, 12], "y", []))
    assert isinstance(ended, Ended) and (ended.finish_reason, ended.usage) == ("stop", USAGE)
    assert ended.timings["decode_seconds"] == 0.5
    assert 0 < ended.timings["time_to_first_token_seconds"] <= ended.timings["total_seconds"]
    assert gateway.is_idle and gateway.aborts() == []


async def test_a_piece_has_the_logprobs_of_its_tokens() -> None:
    gateway = Gateway()
    token = {"token": "a", "logprob": -0.5, "bytes": [97], "token_id": 10}
    entry = token | {"top_logprobs": [token]}
    message = delta(0, [10], "a")
    message.logprobs = Tensor.of_text(json.dumps([entry]))
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed(), message)
        assert [await anext(events), await anext(events)] == [
            Began(None),
            Piece(0, [10], "a", [entry]),
        ]


async def test_deltas_that_arrive_before_routed_are_kept_until_it_arrives() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        gateway.on_event(delta(0, [10], "a"), delta(1, [11], "b", "stop"), routed(ids=[1]))
        began, *pieces, ended = await rest(events)
    assert (began, [type(piece) for piece in pieces], type(ended)) == (
        Began([1]),
        [Piece, Piece],
        Ended,
    )
    assert gateway.is_idle


async def test_a_missing_token_fails_and_aborts_the_request() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        gateway.on_event(
            routed(), delta(0, [10], "a"), delta(2, [12], "c"), delta(3, [13], "d", "stop")
        )
        assert [await anext(events), await anext(events)] == [Began(None), Piece(0, [10], "a", [])]
        assert isinstance(await error_of(events), Internal)
    assert gateway.aborts() == [("preprocess-1", "r"), ("llm-1", "r")]
    assert gateway.is_idle


async def test_a_failed_message_is_raised_as_its_error_with_stage_and_item() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        gateway.on_event(failed("UnreadableImage", "preprocess", 2), failed("Internal"))
        error = await error_of(events)
    assert isinstance(error, UnreadableImage) and (error.message, error.stage, error.item) == (
        "why",
        "preprocess",
        2,
    )
    assert gateway.aborts() == [("preprocess-1", "r")]
    assert gateway.is_idle


@pytest.mark.parametrize("absent", CONNECTED_STAGES)
async def test_a_request_is_refused_if_a_stage_has_never_been_connected(absent: str) -> None:
    gateway = Gateway(replicas=0)
    for role in CONNECTED_STAGES:
        if role != absent:
            gateway.regain(role)
    with pytest.raises(Unavailable, match=f"no {absent} is connected") as caught:
        async with gateway.core.generate(request()):
            pass
    assert caught.value.retry_after and gateway.links.sent == [] and gateway.is_idle


async def test_only_requests_without_a_token_count_as_waiting() -> None:
    gateway = Gateway(max_waiting=1)
    async with gateway.core.generate(request("r")):
        with pytest.raises(Exhausted) as caught:
            async with gateway.core.generate(request("r2")):
                pass
        assert caught.value.retry_after
        gateway.on_event(routed(), delta(0, [10], "a"))
        async with gateway.core.generate(request("r3")):
            assert [submit.request_id.partition("~")[0] for _, submit in gateway.submitted()] == [
                "r",
                "r3",
            ]


async def test_two_requests_with_the_same_client_id_do_not_mix() -> None:
    gateway = Gateway()
    async with (
        gateway.core.generate(request()) as first,
        gateway.core.generate(request()) as second,
    ):
        ids = [submit.request_id for _, submit in gateway.submitted()]
        assert len(set(ids)) == 2
        for id, text in zip(ids, "ab", strict=True):
            gateway.on_event(routed(id), delta(0, [10], text, "stop", id))
        for events, text in ((first, "a"), (second, "b")):
            assert [event.text for event in await rest(events) if isinstance(event, Piece)] == [
                text
            ]


async def test_a_reused_client_id_gets_a_new_id_in_the_stages() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()):
        gateway.on_event(routed(), delta(0, [10], "a", "stop"))
        # The client of the first request still reads its last bytes.
        async with gateway.core.generate(request()):
            old, new = [submit.request_id for _, submit in gateway.submitted()]
            assert old != new
            gateway.on_event(delta(1, [11], "late", request_id=old))
            assert gateway.core.load() == (0, 1)
    assert gateway.aborts() == [("preprocess-1", "r")]


async def test_losing_preprocess_after_the_first_token_does_not_interrupt_the_answer() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed(), delta(0, [10], "a"))
        gateway.core.on_event(PeerDown("preprocess-1", "preprocess", "killed"))
        gateway.on_event(delta(1, [11], "b", "stop"))
        assert isinstance((await rest(events))[-1], Ended)


async def test_a_request_whose_client_leaves_is_aborted_once_in_every_stage() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed(), delta(0, [10], "a"))
        await anext(events)
    gateway.on_event(delta(1, [11], "b", "stop"), failed())
    assert gateway.aborts() == [("preprocess-1", "r"), ("llm-1", "r")]
    assert gateway.is_idle


async def test_a_language_group_that_is_routed_after_the_end_gets_an_abort() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()):
        pass
    id = gateway.id_of("r")
    gateway.links.take()
    gateway.on_event(routed(id, llm="llm-2"))
    assert gateway.links.sent == [("llm-2", Abort(request_id=id, attempt=0))]
    assert gateway.links.connected == [(Peer("llm-2", "ipc:///llm-2"), "llm")]


async def test_messages_of_another_attempt_are_dropped() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        gateway.on_event(
            routed(), delta(0, [66], "no", "stop", attempt=7), delta(0, [10], "a", "stop")
        )
        assert [event.text for event in await rest(events) if isinstance(event, Piece)] == ["a"]


async def test_a_request_ends_at_its_deadline_and_is_aborted() -> None:
    gateway = Gateway()
    with pytest.raises(DeadlineExceeded, match=r"0\.01"):
        async with gateway.core.generate(request(timeout=0.01)) as events:
            gateway.on_event(routed())
            await rest(events)
    assert gateway.aborts() == [("preprocess-1", "r"), ("llm-1", "r")]
    assert gateway.is_idle


async def test_a_request_that_cannot_be_sent_leaves_no_record() -> None:
    gateway = Gateway()

    def refuse(*_: Any) -> None:
        raise AssertionError("129 frames")

    gateway.links.send = refuse  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="129 frames"):
        async with gateway.core.generate(request()):
            pass
    assert gateway.is_idle


async def test_stopping_waits_for_requests_in_flight_and_refuses_new_ones() -> None:
    gateway = Gateway()

    async def answer(events: AsyncIterator[GenerationEvent]) -> None:
        with pytest.raises(Unavailable, match="stopping"):
            async with gateway.core.generate(request("new")):
                pass
        gateway.on_event(routed(), delta(0, [10], "a", "stop"))
        assert isinstance((await rest(events))[-1], Ended)

    async with gateway.core.generate(request()) as events:
        await asyncio.gather(gateway.core.stop(grace=60), answer(events))
    assert gateway.is_idle and gateway.aborts() == []


async def test_stopping_fails_the_requests_that_outlive_the_grace() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed())
        await gateway.core.stop(grace=0)
        assert isinstance(await error_of(events), Unavailable)
    assert gateway.is_idle and gateway.aborts() == [("preprocess-1", "r"), ("llm-1", "r")]


async def test_a_request_goes_to_a_ready_replica_that_holds_the_fewest_requests() -> None:
    gateway = Gateway(replicas=2)
    async with gateway.core.generate(request("r1")), gateway.core.generate(request("r2")):
        gateway.on_event(routed("r2"))  # preprocess has finished with it, the detokenizer has not
        async with gateway.core.generate(request("r3")), gateway.core.generate(request("r4")):
            holders = [
                (receiver, submit.detokenizer.id) for receiver, submit in gateway.submitted()
            ]
    assert [holder for holder, _ in holders] == [
        "preprocess-1",
        "preprocess-2",
        "preprocess-2",
        "preprocess-1",
    ]
    assert sorted(detokenizer for _, detokenizer in holders) == 2 * ["detokenizer-1"] + 2 * [
        "detokenizer-2"
    ]
    gateway.core.on_members([control_pb2.Member(id="preprocess-2", role="preprocess", state=READY)])
    for n in range(2):
        async with gateway.core.generate(request(f"ready {n}")):
            assert gateway.submitted()[-1][0] == "preprocess-2"


def test_the_gateway_is_ready_if_each_role_has_a_ready_connected_member() -> None:
    gateway = Gateway()
    members = [
        control_pb2.Member(id=f"{role}-1", role=role, state=READY, max_model_len=64)
        for role in (*CONNECTED_STAGES, "vision")
    ]
    assert (
        gateway.core.unready_reason()
        == "no preprocess and no vision and no llm and no detokenizer is ready"
    )
    assert gateway.core.max_model_len() is None
    gateway.core.on_members(members)
    assert gateway.core.unready_reason() == "" and gateway.core.max_model_len() == 64
    gateway.core.on_event(PeerDown("llm-1", "llm", "gone"))
    assert gateway.core.unready_reason() == "no llm is ready"
    members[-1].state = DEAD
    gateway.core.on_members(members)
    assert gateway.core.unready_reason() == "no vision and no llm is ready"


def test_an_unknown_model_is_not_found_and_a_missing_one_means_the_served_model() -> None:
    core = Gateway().core
    core.check_model(None)
    core.check_model("tiny")
    with pytest.raises(NotFound, match="'tiny'"):
        core.check_model("large")


async def test_an_image_that_fails_after_the_first_token_does_not_end_the_answer() -> None:
    """The prefix cache had the image's keys and values, so the answer did not wait for it."""
    gateway = Gateway()
    async with gateway.core.generate(request()) as events:
        gateway.on_event(
            routed(),
            delta(0, [1], "a"),
            failed(stage="vision", image=0),
            delta(1, [2], "b", "stop"),
        )
        assert [type(event) for event in [event async for event in events]] == [
            Began,
            Piece,
            Piece,
            Ended,
        ]


async def test_a_deadline_that_cannot_be_met_is_refused_with_a_retry_after() -> None:
    gateway = Gateway(max_waiting=100)
    for n in range(3):
        gateway.core._admission.pace.on_served(10.0 * n, num_waiting=1)
    async with gateway.core.generate(request("a")), gateway.core.generate(request("b")):
        with pytest.raises(Exhausted, match="about 20 s") as refused:
            async with gateway.core.generate(request("c", timeout=15.0)):
                pass
        assert refused.value.retry_after == pytest.approx(5.0)
        async with gateway.core.generate(request("d", timeout=25.0)):
            pass
