"""The gRPC door: InferenceService over the core, ControlService passed on to the controller, health
and reflection."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from common.errors import Exhausted, InvalidRequest, ServingError, Unavailable
from common.messages import Usage
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.gateway.generation import Began, Core, Ended, GenerationRequest, Piece
from services.gateway.metrics import serving_errors_only
from services.gateway.schema import (
    MAX_TIMEOUT,
    check_images,
    make_sampling,
    make_stopping,
    messages_prompt,
    new_request_id,
)
from services.gateway.slow_readers import READ_SECONDS

INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
CONTROL_SERVICE = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name
FINISH_REASONS = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
}
READINESS_NAMES = ("", "readiness", INFERENCE_SERVICE, CONTROL_SERVICE)
WATCH_SECONDS = 0.5
CONTROLLER_PATIENCE = 5.0
CHANGE_PATIENCE = 10.0
"""The controller itself waits for the member or the launcher."""
SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

# The pings of a client that waits long for a unary answer are not abuse. A port that is taken is an
# error, not shared.
SERVER_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
)

GenerateRequest = inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest


def create_server(
    core: Core, controller: grpc.aio.Channel, max_message_bytes: int = 64 * 2**20
) -> grpc.aio.Server:
    """The caller adds a port and starts it."""
    server = grpc.aio.server(
        options=(*SERVER_OPTIONS, ("grpc.max_receive_message_length", max_message_bytes))
    )
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(core), server)
    control_pb2_grpc.add_ControlServiceServicer_to_server(ControlForwarder(controller), server)
    health_pb2_grpc.add_HealthServicer_to_server(ReadinessServicer(core), server)
    reflection.enable_server_reflection(
        (INFERENCE_SERVICE, CONTROL_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    return server


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, core: Core) -> None:
        self.core = core

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.GenerateResponse:
        response = inference_pb2.GenerateResponse()
        texts: list[str] = []
        async with errors_told(context):
            generation = await self.accept(request, context)
            response.request_id = generation.request_id
            async with self.core.generate(generation) as events:
                async for event in events:
                    match event:
                        case Began(prompt_token_ids=ids):
                            response.prompt_token_ids.extend(ids or ())
                        case Piece():
                            texts.append(event.text)
                            response.token_ids.extend(event.token_ids)
                            response.logprobs.extend(map(logprob_message, event.logprobs))
                        case Ended():
                            response.MergeFrom(inference_pb2.GenerateResponse(**end_fields(event)))
        response.text = "".join(texts)
        return response

    async def GenerateStream(  # type: ignore[override]  # A coroutine that writes: all of a call happens in one task.
        self, request: inference_pb2.GenerateStreamRequest, context: grpc.aio.ServicerContext
    ) -> None:
        async with errors_told(context):
            generation = await self.accept(request, context)
            async with self.core.generate(generation) as events:
                async for event in events:
                    await write_in_time(context, stream_message(event, generation.request_id))

    async def accept(
        self, request: GenerateRequest, context: grpc.aio.ServicerContext
    ) -> GenerationRequest:
        metadata = dict(context.invocation_metadata() or ())
        request_id = new_request_id(request.request_id or metadata.get("x-request-id"))
        structlog.contextvars.bind_contextvars(request_id=request_id)
        await context.send_initial_metadata((("x-request-id", request_id),))
        self.core.check_model(request.model or None)
        return read_generation(
            request, request_id, context.time_remaining(), self.core.max_model_len()
        )


async def write_in_time(context: grpc.aio.ServicerContext, message: Message) -> None:
    try:
        async with asyncio.timeout(READ_SECONDS):
            await context.write(message)
    except TimeoutError:
        raise Exhausted(
            f"the client read nothing for {READ_SECONDS:g} s", stage="gateway"
        ) from None


def read_generation(
    request: GenerateRequest, request_id: str, timeout: float | None, max_model_len: int | None
) -> GenerationRequest:
    images = tuple(image.data for image in request.images)
    check_images(images)
    prompt_kind, prompt = read_prompt(request)
    response = given(request.response)
    return GenerationRequest(
        request_id=request_id,
        prompt_kind=prompt_kind,
        prompt=prompt,
        images=images,
        sampling=make_sampling(
            {**given(request.sampling), "num_logprobs": response.get("num_logprobs")}
        ),
        stopping=make_stopping(
            {**given(request.stopping), "skip_special_tokens": response.get("skip_special_tokens")},
            max_model_len,
        ),
        timeout=None if timeout is None else min(max(timeout, 0.0), MAX_TIMEOUT),
        return_prompt_token_ids=request.response.return_prompt_token_ids,
        **read_guide(request.guide),
    )


def read_guide(params: inference_pb2.GuideParams) -> dict[str, str]:
    kind = params.WhichOneof("guide")
    if kind is None or (kind == "json_object" and not params.json_object):
        return {}
    return {"guide_kind": kind, "guide": "" if kind == "json_object" else getattr(params, kind)}


def read_prompt(request: GenerateRequest) -> tuple[str, bytes]:
    """Text is one user turn, with the images before it."""
    if request.WhichOneof("prompt") == "token_ids":
        if not request.token_ids.ids:
            raise InvalidRequest("token_ids: empty; send at least one token", stage="gateway")
        return "token_ids", np.asarray(request.token_ids.ids, "<i8").tobytes()
    if not request.text and not request.images:
        raise InvalidRequest("prompt: missing; send text, token_ids or an image", stage="gateway")
    if not request.images:
        return "messages", messages_prompt([{"role": "user", "content": request.text}])
    texts = [{"type": "text", "text": request.text}] if request.text else []
    return "messages", messages_prompt(
        [{"role": "user", "content": [{"type": "image"}] * len(request.images) + texts}]
    )


def given(message: Message) -> dict[str, Any]:
    """The fields that were sent."""
    return {
        field.name: list(value) if field.is_repeated else as_written(value)
        for field, value in message.ListFields()
    }


def as_written(value: Any) -> Any:
    """A 32-bit float is the nearest to the number that the client wrote: seven digits give that
    number back."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def stream_message(
    event: Began | Piece | Ended, request_id: str
) -> inference_pb2.GenerateStreamResponse:
    match event:
        case Began(prompt_token_ids=ids):
            return inference_pb2.GenerateStreamResponse(
                begin=inference_pb2.Begin(request_id=request_id, prompt_token_ids=ids or ())
            )
        case Piece():
            logprobs = map(logprob_message, event.logprobs)
            delta = inference_pb2.Delta(
                offset=event.offset, token_ids=event.token_ids, text=event.text, logprobs=logprobs
            )
            return inference_pb2.GenerateStreamResponse(delta=delta)
        case Ended():
            return inference_pb2.GenerateStreamResponse(end=inference_pb2.End(**end_fields(event)))


def end_fields(ended: Ended) -> dict[str, Any]:
    return {
        "finish_reason": FINISH_REASONS[ended.finish_reason],
        "usage": usage_message(ended.usage),
        "timings": inference_pb2.Timings(**ended.timings),
    }


def usage_message(usage: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        image_tokens=usage.image_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def logprob_message(entry: dict[str, Any]) -> inference_pb2.TokenLogprob:
    top = [
        inference_pb2.TopLogprob(**token_fields(candidate)) for candidate in entry["top_logprobs"]
    ]
    return inference_pb2.TokenLogprob(**token_fields(entry), top=top)


def token_fields(entry: dict[str, Any]) -> dict[str, Any]:
    token = entry["token"].encode() if entry.get("bytes") is None else bytes(entry["bytes"])
    return {"token_id": entry["token_id"], "token": token, "logprob": entry["logprob"]}


class ControlForwarder(control_pb2_grpc.ControlServiceServicer):
    """Membership as the controller tells it. Members join there, not here."""

    def __init__(self, controller: grpc.aio.Channel) -> None:
        self.controller = control_pb2_grpc.ControlServiceStub(controller)

    async def ListMembers(
        self, request: control_pb2.ListMembersRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ListMembersResponse:
        return await self._pass_on(
            self.controller.ListMembers, request, CONTROLLER_PATIENCE, context
        )

    async def Drain(
        self, request: control_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.DrainResponse:
        return await self._pass_on(self.controller.Drain, request, CHANGE_PATIENCE, context)

    async def Scale(
        self, request: control_pb2.ScaleRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ScaleResponse:
        return await self._pass_on(self.controller.Scale, request, CHANGE_PATIENCE, context)

    async def _pass_on(
        self, call: Any, request: Any, patience: float, context: grpc.aio.ServicerContext
    ) -> Any:
        try:
            return await call(request, timeout=min(context.time_remaining() or patience, patience))
        except grpc.aio.AioRpcError as error:
            if error.code() in SILENT:
                await abort(
                    context,
                    Unavailable(
                        f"the controller does not answer: {error.details()}", stage="controller"
                    ),
                )
            await context.abort(error.code(), error.details() or "")

    async def Join(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[control_pb2.JoinRequest],
        context: grpc.aio.ServicerContext,
    ) -> None:
        await context.abort(
            grpc.StatusCode.UNIMPLEMENTED, "members join at the controller, not here"
        )


class ReadinessServicer(health_pb2_grpc.HealthServicer):
    """Whether an answer can be given now, looked at anew each time. "liveness" is SERVING as long
    as the process answers."""

    def __init__(self, core: Core) -> None:
        self.core = core

    def status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service == "liveness":
            return health_pb2.HealthCheckResponse.SERVING
        if service not in READINESS_NAMES:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        return (
            health_pb2.HealthCheckResponse.NOT_SERVING
            if self.core.unready_reason()
            else health_pb2.HealthCheckResponse.SERVING
        )

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        status = self.status(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        told = None
        while True:
            status = self.status(request.service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
            told = status
            await asyncio.sleep(WATCH_SECONDS)


@asynccontextmanager
async def errors_told(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    try:
        with serving_errors_only():
            yield
    except ServingError as error:
        await abort(context, error)


async def abort(context: grpc.aio.ServicerContext, error: ServingError) -> None:
    metadata = {"stage": error.stage} if error.stage else {}
    if error.item is not None:
        metadata["image"] = str(error.item)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.code, domain="twinlens", metadata=metadata)
    ]
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(
        code=code_pb2.Code.Value(error.grpc_code), message=error.message, details=packed(details)
    )
    await context.abort_with_status(rpc_status.to_status(status))


def packed(details: Sequence[Message]) -> list[any_pb2.Any]:
    boxes = [any_pb2.Any() for _ in details]
    for box, detail in zip(boxes, details, strict=True):
        box.Pack(detail)
    return boxes
