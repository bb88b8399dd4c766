"""The methods Classify and Embed, through real calls."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest

from common.errors import Unavailable
from common.messages import Usage
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.gateway.generation import Began, Result
from tests.gateway.fake_core import TIMINGS, FakeCore, grpc_server

RESULT = Result(
    np.array([0.25, 0.625, 0.125], np.float32),
    ["no", "yes", "two"],
    Usage(prompt_tokens=9),
    TIMINGS,
)
IMAGE = inference_pb2.Image(data=b"picture")


@pytest.fixture
def core() -> FakeCore:
    return FakeCore(Began(None), RESULT)


@pytest.fixture
async def stub(core: FakeCore) -> AsyncIterator[Any]:
    async with grpc_server(core) as target, grpc.aio.insecure_channel(target) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def classify_request(**fields: Any) -> inference_pb2.ClassifyRequest:
    return inference_pb2.ClassifyRequest(**{"text": "Red?", "images": [IMAGE]} | fields)


async def test_all_labels_come_the_most_likely_first(stub: Any, core: FakeCore) -> None:
    answer = await stub.Classify(classify_request(request_id="mine"), timeout=50)
    assert answer.request_id == "mine" and answer.num_classes == 3
    assert [(label.label, label.index, label.probability) for label in answer.labels] == [
        ("yes", 1, 0.625),
        ("no", 0, 0.25),
        ("two", 2, 0.125),
    ]
    assert answer.usage.prompt_tokens == 9 and answer.timings.total_seconds == 2
    [request] = core.requests
    assert request.task == "classify" and [bytes(image) for image in request.images] == [b"picture"]
    assert request.timeout is not None and request.timeout < 60  # gRPC rounds it


async def test_the_best_labels_are_enough_if_the_client_says_so(stub: Any) -> None:
    answer = await stub.Classify(classify_request(top_k=2))
    assert [label.label for label in answer.labels] == ["yes", "no"] and answer.num_classes == 3


async def test_an_embedding(stub: Any, core: FakeCore) -> None:
    answer = await stub.Embed(inference_pb2.EmbedRequest(text="a dog"))
    assert list(answer.values) == [0.25, 0.625, 0.125] and answer.request_id
    assert core.requests[0].task == "embed"
    await stub.Embed(inference_pb2.EmbedRequest(images=[IMAGE]))
    assert core.requests[1].prompt == b'[{"role":"user","content":[{"type":"image"}]}]'
    await stub.Embed(inference_pb2.EmbedRequest(token_ids=inference_pb2.TokenIds(ids=[5, 6])))
    assert core.requests[2].prompt_kind == "token_ids"


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("Classify", classify_request(top_k=0), grpc.StatusCode.INVALID_ARGUMENT),
        ("Classify", classify_request(model="other"), grpc.StatusCode.NOT_FOUND),
        ("Embed", inference_pb2.EmbedRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (
            "Embed",
            inference_pb2.EmbedRequest(images=[inference_pb2.Image()]),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ],
)
async def test_a_wrong_request_is_refused(
    stub: Any, method: str, request_: Any, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(stub, method)(request_)
    assert caught.value.code() == code


async def test_an_error_of_the_core_ends_the_call_with_its_status(
    stub: Any, core: FakeCore
) -> None:
    core.refusal = Unavailable("no llm is connected", stage="gateway", retry_after=1)
    for call in (
        stub.Classify(classify_request()),
        stub.Embed(inference_pb2.EmbedRequest(text="a")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
