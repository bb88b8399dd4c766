"""The gRPC API, through real calls."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from common.errors import Exhausted, Unavailable, UnreadableImage
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.gateway.generation import Began, Piece
from tests.gateway.fake_core import FOREVER, TIMINGS, FakeCore, grpc_server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
INFERENCE = "twinlens.inference.v1.InferenceService"
CONTROL = "twinlens.control.v1.ControlService"


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
async def channel(core: FakeCore) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc_server(core) as target, grpc.aio.insecure_channel(target) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return inference_pb2_grpc.InferenceServiceStub(channel)


def request(**fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**{"text": "hi", **fields})


def stream_request(**fields: Any) -> inference_pb2.GenerateStreamRequest:
    return inference_pb2.GenerateStreamRequest(**{"text": "hi", **fields})


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """Return the details of the error by the names of their types."""
    status = rpc_status.from_call(error)
    found = {}
    for box in status.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo):
            if box.Is(kind.DESCRIPTOR):
                detail = kind()
                box.Unpack(detail)
                found[kind.DESCRIPTOR.name] = MessageToDict(detail)
    return found


async def test_a_whole_answer(stub: Any) -> None:
    options = inference_pb2.ResponseOptions(num_logprobs=1, return_prompt_token_ids=True)
    answer = await stub.Generate(request(request_id="mine", response=options))
    assert (answer.request_id, answer.text, answer.finish_reason) == (
        "mine",
        "Hello",
        inference_pb2.FINISH_REASON_STOP,
    )
    assert (list(answer.token_ids), list(answer.prompt_token_ids)) == ([10, 11, 12], [1, 2, 3])
    assert (answer.usage.prompt_tokens, answer.usage.image_tokens) == (9, 4)
    assert (answer.usage.completion_tokens, answer.usage.cached_tokens) == (3, 2)
    options = {"preserving_proto_field_name": True, "always_print_fields_with_no_presence": True}
    assert MessageToDict(answer.timings, **options) == TIMINGS
    first = answer.logprobs[0]
    assert (len(answer.logprobs), first.token_id, first.token, first.top[0].token) == (
        3,
        10,
        b"Hel",
        b"Hel",
    )


async def test_a_stream_is_one_begin_then_deltas_then_one_end(stub: Any) -> None:
    events = [event async for event in stub.GenerateStream(stream_request())]
    assert [event.WhichOneof("event") for event in events] == [
        "begin",
        "delta",
        "delta",
        "delta",
        "end",
    ]
    assert "".join(event.delta.text for event in events) == "Hello"
    assert [(event.delta.offset, list(event.delta.token_ids)) for event in events[1:4]] == [
        (0, [10]),
        (1, [11]),
        (2, [12]),
    ]
    assert (
        events[-1].end.usage.completion_tokens == 3 and events[-1].end.timings.total_seconds == 2.0
    )


async def test_text_becomes_one_user_turn_with_the_images_first(stub: Any, core: FakeCore) -> None:
    images = [inference_pb2.Image(data=b"one"), inference_pb2.Image(data=b"two")]
    await stub.Generate(request(images=images))
    await stub.Generate(request())
    await stub.Generate(inference_pb2.GenerateRequest(images=images[:1]))
    both, text, image = (json.loads(asked.prompt) for asked in core.requests)
    assert both == [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "hi"}],
        }
    ]
    assert text == [{"role": "user", "content": "hi"}]
    assert image == [{"role": "user", "content": [{"type": "image"}]}]
    assert core.requests[0].images == (b"one", b"two")


async def test_token_ids_are_passed_on_unchanged(stub: Any, core: FakeCore) -> None:
    await stub.Generate(
        inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1, 2**31]))
    )
    [asked] = core.requests
    assert asked.prompt_kind == "token_ids"
    assert asked.prompt == (1).to_bytes(8, "little") + (2**31).to_bytes(8, "little")


async def test_sampling_and_stopping_values_are_passed_on_as_written(
    stub: Any, core: FakeCore
) -> None:
    sampling = inference_pb2.SamplingParams(temperature=0.7, top_p=0.9, top_k=0, seed=2**64 - 1)
    stopping = inference_pb2.StoppingParams(
        max_tokens=9, min_tokens=1, ignore_eos=True, stop=["x"], stop_token_ids=[5]
    )
    options = inference_pb2.ResponseOptions(num_logprobs=0, skip_special_tokens=False)
    await stub.Generate(request(sampling=sampling, stopping=stopping, response=options))
    [asked] = core.requests
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.top_k) == (0.7, 0.9, 0)
    assert (asked.sampling.seed, asked.sampling.min_p, asked.sampling.num_logprobs) == (
        2**63 - 1,
        None,
        0,
    )
    assert (asked.stopping.max_tokens, asked.stopping.min_tokens, asked.stopping.ignore_eos) == (
        9,
        1,
        True,
    )
    assert (
        asked.stopping.stop,
        asked.stopping.stop_token_ids,
        asked.stopping.skip_special_tokens,
    ) == (("x",), (5,), False)


@pytest.mark.parametrize(
    ("fields", "code", "expected"),
    [
        ({"model": "other"}, "NOT_FOUND", "no model 'other' is served"),
        ({"text": ""}, "INVALID_ARGUMENT", "prompt: missing"),
        (
            {"text": None, "token_ids": inference_pb2.TokenIds()},
            "INVALID_ARGUMENT",
            "token_ids: empty",
        ),
        ({"images": [inference_pb2.Image()]}, "INVALID_ARGUMENT", "image 0 is empty"),
        (
            {"images": [inference_pb2.Image(data=b"x")] * 33},
            "INVALID_ARGUMENT",
            "more than 32 images",
        ),
        (
            {"sampling": inference_pb2.SamplingParams(temperature=-1)},
            "INVALID_ARGUMENT",
            "temperature: expected float >= 0.0, got -1.0",
        ),
        (
            {"sampling": inference_pb2.SamplingParams(top_p=float("nan"))},
            "INVALID_ARGUMENT",
            "top_p: expected float >= 0.0, got nan",
        ),
        (
            {"stopping": inference_pb2.StoppingParams(max_tokens=0)},
            "INVALID_ARGUMENT",
            "max_tokens: expected int >= 1, got 0",
        ),
        (
            {"stopping": inference_pb2.StoppingParams(max_tokens=5000)},
            "INVALID_ARGUMENT",
            "This model's maximum context length is 4096 tokens. ",
        ),
        (
            {"response": inference_pb2.ResponseOptions(num_logprobs=21)},
            "INVALID_ARGUMENT",
            "num_logprobs: expected int <= 20, got 21",
        ),
    ],
)
async def test_a_bad_request_is_refused_with_a_code_and_a_message(
    stub: Any, core: FakeCore, fields: dict[str, Any], code: str, expected: str
) -> None:
    for error in (
        await failure(stub.Generate(request(**fields))),
        await failure(anext(aiter(stub.GenerateStream(stream_request(**fields))))),
    ):
        assert error.code().name == code and expected in error.details()
    assert core.requests == []


async def test_an_error_has_reason_stage_image_and_retry_delay_as_details(
    stub: Any, core: FakeCore
) -> None:
    core.script = (UnreadableImage("image 1 is no image", "preprocess", 1),)
    error = await failure(stub.Generate(request()))
    assert (error.code().name, error.details()) == ("INVALID_ARGUMENT", "image 1 is no image")
    info = {
        "reason": "UnreadableImage",
        "domain": "twinlens",
        "metadata": {"stage": "preprocess", "image": "1"},
    }
    assert details(error) == {"ErrorInfo": info}
    core.refusal = Exhausted("full", retry_after=2.5)
    error = await failure(stub.Generate(request()))
    assert error.code().name == "RESOURCE_EXHAUSTED"
    assert details(error)["RetryInfo"] == {"retryDelay": "2.500s"}


@pytest.mark.parametrize(
    ("error", "code"),
    [(Unavailable("llm died", "llm"), "UNAVAILABLE"), (RuntimeError("a secret"), "INTERNAL")],
)
async def test_a_stream_that_fails_ends_with_an_error_status(
    stub: Any, core: FakeCore, error: Exception, code: str
) -> None:
    core.script = (Began(None), Piece(0, [1], "x", []), error)
    texts = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for event in stub.GenerateStream(stream_request()):
            texts.append(event.delta.text)
    assert texts == ["", "x"]
    assert caught.value.code().name == code and "secret" not in caught.value.details()
    assert core.aborted.is_set()


async def test_cancelling_a_call_aborts_its_request(stub: Any, core: FakeCore) -> None:
    core.script = (Began(None), FOREVER)
    async with asyncio.timeout(10):
        call = stub.GenerateStream(stream_request())
        await call.read()
        call.cancel()
        await core.aborted.wait()


async def test_cancelling_before_the_first_token_aborts_too(stub: Any, core: FakeCore) -> None:
    core.script = (FOREVER,)
    async with asyncio.timeout(10):
        call = stub.Generate(request())
        await core.waiting.wait()
        call.cancel()
        await core.aborted.wait()


async def test_a_deadline_reaches_the_core_and_ends_the_request(stub: Any, core: FakeCore) -> None:
    core.script = (FOREVER,)
    error = await failure(stub.Generate(request(), timeout=0.3))
    assert error.code().name == "DEADLINE_EXCEEDED"
    async with asyncio.timeout(10):
        await core.aborted.wait()
    assert core.requests[0].timeout is not None and 0 < core.requests[0].timeout < 0.4


async def test_without_a_deadline_the_gateway_uses_its_default(stub: Any, core: FakeCore) -> None:
    await stub.Generate(request())
    assert core.requests[0].timeout is None


@pytest.mark.parametrize(
    ("field", "metadata", "expected"),
    [("", "meta-1", "meta-1"), ("field-1", "meta-1", "field-1"), ("two words", "meta-1", None)],
)
async def test_the_request_id_is_used_and_echoed(
    stub: Any, core: FakeCore, field: str, metadata: str, expected: str | None
) -> None:
    call = stub.Generate(request(request_id=field), metadata=(("x-request-id", metadata),))
    echoed = dict(await call.initial_metadata())["x-request-id"]
    assert (await call).request_id == core.requests[0].request_id == echoed
    assert echoed == expected or (expected is None and " " not in echoed)


async def test_a_message_beyond_the_limit_is_refused(stub: Any) -> None:
    error = await failure(stub.Generate(request(images=[inference_pb2.Image(data=b"x" * 10**6)])))
    assert error.code().name == "RESOURCE_EXHAUSTED"


async def test_health_follows_the_core(channel: grpc.aio.Channel, core: FakeCore) -> None:
    stub = health_pb2_grpc.HealthStub(channel)

    async def check(service: str) -> int:
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status

    names = ("", "readiness", INFERENCE, CONTROL)
    assert [await check(name) for name in names] == [SERVING] * 4
    core.reason = "no llm is ready"
    assert [await check(name) for name in names] == [NOT_SERVING] * 4
    assert await check("liveness") == SERVING
    assert (await failure(check("other"))).code().name == "NOT_FOUND"


async def test_a_health_watcher_is_notified_of_changes(
    channel: grpc.aio.Channel, core: FakeCore
) -> None:
    async with asyncio.timeout(10):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        core.reason = "no llm is ready"
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()


async def test_reflection_lists_both_services(channel: grpc.aio.Channel) -> None:
    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=INFERENCE)

    answers = [
        answer
        async for answer in reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            ask()
        )
    ]
    assert {INFERENCE, CONTROL, "grpc.health.v1.Health"} <= {
        service.name for service in answers[0].list_services_response.service
    }
    assert b"GenerateStream" in answers[1].file_descriptor_response.file_descriptor_proto[0]


class Controller(control_pb2_grpc.ControlServiceServicer):
    async def ListMembers(self, request: Any, context: Any) -> control_pb2.ListMembersResponse:
        return control_pb2.ListMembersResponse(members=[control_pb2.Member(id="llm-1", role="llm")])

    async def Join(self, request_iterator: Any, context: Any) -> None:
        raise AssertionError("members must not join through the gateway")


async def test_listing_members_is_forwarded_to_the_controller_and_joining_is_refused() -> None:
    controller = grpc.aio.server()
    control_pb2_grpc.add_ControlServiceServicer_to_server(Controller(), controller)
    address = f"127.0.0.1:{controller.add_insecure_port('127.0.0.1:0')}"
    await controller.start()
    async with (
        grpc_server(FakeCore(), address) as target,
        grpc.aio.insecure_channel(target) as channel,
    ):
        stub = control_pb2_grpc.ControlServiceStub(channel)
        assert [
            member.id
            for member in (await stub.ListMembers(control_pb2.ListMembersRequest())).members
        ] == ["llm-1"]
        error = await failure(stub.Join(iter([control_pb2.JoinRequest()])).read())
        assert (error.code().name, "join at the controller" in error.details()) == (
            "UNIMPLEMENTED",
            True,
        )
    await controller.stop(None)


async def test_a_missing_controller_is_reported_as_unavailable(channel: grpc.aio.Channel) -> None:
    error = await failure(
        control_pb2_grpc.ControlServiceStub(channel).ListMembers(control_pb2.ListMembersRequest())
    )
    assert error.code().name == "UNAVAILABLE" and error.details().startswith(
        "the controller does not answer"
    )
