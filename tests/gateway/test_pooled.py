"""Requests that end with a Pooled: labels and embeddings, and labels as the text of an answer."""

import json
from typing import Any

import numpy as np
import pytest

from common.errors import InvalidRequest, ServingError
from common.events import Received
from common.membership import READY
from common.messages import NO_PEER, Pooled, Sampling, Stopping, Usage
from common.wire import Tensor
from proto.twinlens.control.v1 import control_pb2
from services.gateway.generation import Began, Ended, Piece, Result
from tests.gateway.builders import Gateway, error_of, failed, request, rest, routed

LABELS = ["no", "yes", "two"]


def pooled(values: Any = (0.1, 0.7, 0.2), labels: Any = LABELS, attempt: int = 0) -> Pooled:
    return Pooled(
        request_id="r",
        attempt=attempt,
        values=Tensor.of(np.array(values, np.float32)),
        labels=None if labels is None else Tensor.of_text(json.dumps(labels)),
        num_prompt_tokens=9,
        num_image_tokens=4,
        timings=Tensor.of_text(json.dumps({"prefill_seconds": 0.5})),
    )


def gateway_of(*tasks: str) -> Gateway:
    """A gateway whose model does these tasks, without vision and without detokenizers."""
    gateway = Gateway(replicas=0)
    gateway.core.on_members(
        [
            control_pb2.Member(
                id="preprocess-1",
                role="preprocess",
                state=READY,
                tasks=tasks,
                stages=["preprocess", "llm"],
            ),
            control_pb2.Member(id="llm-1", role="llm", state=READY),
        ]
    )
    gateway.regain("preprocess")
    gateway.regain("llm")
    return gateway


def answer(gateway: Gateway, *messages: Pooled) -> None:
    gateway.on_event(routed())
    for message in messages:
        gateway.on_event(message, peer_id="llm-1")


def test_no_stage_is_missed_that_the_model_does_not_need() -> None:
    assert gateway_of("classify").core.unready_reason() == ""


async def test_the_probabilities_and_labels_end_a_classification() -> None:
    gateway = gateway_of("classify")
    async with gateway.core.generate(request(task="classify")) as events:
        [(_, submit)] = gateway.submitted()
        assert submit.task == "classify" and submit.detokenizer == NO_PEER
        answer(gateway, pooled())
        began, result = await rest(events)
    assert isinstance(began, Began) and isinstance(result, Result)
    assert result.labels == LABELS
    np.testing.assert_allclose(result.values, [0.1, 0.7, 0.2])
    assert result.usage == Usage(prompt_tokens=9, image_tokens=4)
    assert result.timings["prefill_seconds"] == 0.5 and result.timings["total_seconds"] > 0
    assert gateway.is_idle and gateway.aborts() == []


async def test_an_embedding_ends_its_request() -> None:
    gateway = gateway_of("embed")
    async with gateway.core.generate(request(task="embed")) as events:
        answer(gateway, pooled([0.6, 0.8], None))
        _, result = await rest(events)
    assert isinstance(result, Result) and result.labels == []


async def test_the_text_of_a_classifier_is_its_best_label() -> None:
    gateway = gateway_of("classify")
    async with gateway.core.generate(request()) as events:
        assert gateway.submitted()[0][1].task == "classify"
        answer(gateway, pooled())
        _, piece, ended = await rest(events)
    assert piece == Piece(0, [], "yes", [])
    assert isinstance(ended, Ended) and ended.finish_reason == "stop"


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": Sampling(num_logprobs=2)},
        {"sampling": Sampling(frequency_penalty=1)},
        {"stopping": Stopping(stop=("x",))},
        {"stopping": Stopping(min_tokens=2)},
        {"guide_kind": "regex", "guide": "a"},
        {"return_prompt_token_ids": True},
    ],
)
async def test_what_a_label_cannot_have_is_refused(fields: dict[str, Any]) -> None:
    gateway = gateway_of("classify")
    with pytest.raises(InvalidRequest, match=r"one of its labels.*/v1/classify"):
        async with gateway.core.generate(request(**fields)):
            pass
    assert gateway.is_idle and not gateway.submitted()


@pytest.mark.parametrize(
    ("tasks", "task", "door"),
    [
        (["generate"], "classify", "/v1/chat/completions"),
        (["generate"], "embed", "/v1/chat/completions"),
        (["embed"], "generate", "/v1/embeddings"),
        (["embed"], "classify", "/v1/embeddings"),
        (["classify"], "embed", "/v1/classify"),
    ],
)
async def test_another_task_is_refused_with_the_way_to_ask(
    tasks: list[str], task: str, door: str
) -> None:
    gateway = gateway_of(*tasks)
    gateway.regain("detokenizer")
    with pytest.raises(InvalidRequest, match=door):
        async with gateway.core.generate(request(task=task)):
            pass


async def test_no_stage_is_blamed_that_the_request_does_not_pass() -> None:
    gateway = gateway_of("classify")
    asked = request(task="classify", images=(b"x",), timeout=0)
    async with gateway.core.generate(asked) as events:
        gateway.on_event(routed())
        assert (await error_of(events)).stage == "preprocess"


async def test_an_early_result_waits_for_its_route() -> None:
    gateway = gateway_of("classify")
    async with gateway.core.generate(request(task="classify")) as events:
        gateway.on_event(pooled(), peer_id="llm-1")
        gateway.on_event(routed())
        assert isinstance((await rest(events))[-1], Result)


async def test_a_result_of_another_member_is_ignored() -> None:
    gateway = gateway_of("classify")
    async with gateway.core.generate(request(task="classify")):
        gateway.on_event(routed())
        for sender, role in [("preprocess-1", "preprocess"), ("llm-2", "llm")]:
            message = pooled()
            message.request_id = gateway.id_of("r")
            gateway.core.on_event(Received(sender, role, message))
        assert not gateway.is_idle


async def test_a_request_that_is_lost_is_asked_again() -> None:
    gateway = gateway_of("classify")
    gateway.regain("llm", 2)
    async with gateway.core.generate(request(task="classify")) as events:
        gateway.on_event(routed())
        gateway.lose("llm")
        assert len(gateway.submitted()) == 2
        gateway.on_event(routed(llm="llm-2", attempt=1))
        gateway.on_event(pooled(attempt=1), peer_id="llm-2")
        assert isinstance((await rest(events))[-1], Result)


@pytest.mark.parametrize(
    "message",
    [
        pooled([]),
        pooled([[1.0]]),
        pooled([0.5, float("nan"), 0.5]),
        pooled([0.5, 0.5]),
        pooled(labels=None),
        pooled(labels={"a": 1}),
        pooled(labels=[1, 2, 3]),
    ],
)
async def test_a_malformed_result_fails_its_request(message: Pooled) -> None:
    gateway = gateway_of("classify")
    async with gateway.core.generate(request(task="classify")) as events:
        answer(gateway, message)
        error = await error_of(events)
    assert error.code == "Internal" and error.stage == "llm" and gateway.is_idle


async def test_a_failure_ends_a_classification() -> None:
    gateway = gateway_of("classify")
    async with gateway.core.generate(request(task="classify")) as events:
        gateway.on_event(routed(), failed("InvalidRequest", "preprocess"))
        error: ServingError = await error_of(events)
    assert error.code == "InvalidRequest"
