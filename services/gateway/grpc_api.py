"""The gRPC API: inference, the control plane of the controller, health and reflection."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import grpc
import structlog
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from common.errors import Exhausted, ServingError, Unavailable
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.gateway.generation import Began, Core, Ended, GenerationRequest, Piece
from services.gateway.grpc_messages import (
    GenerateRequest,
    end_fields,
    error_status,
    stream_response,
    to_generation,
    token_logprob,
)
from services.gateway.metrics import serving_errors_only
from services.gateway.schema import new_request_id
from services.gateway.slow_readers import READ_SECONDS

INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
CONTROL_SERVICE = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name
READINESS_NAMES = ("", "readiness", INFERENCE_SERVICE, CONTROL_SERVICE)
"""Names under which a health check asks for readiness."""
WATCH_SECONDS = 0.5
"""How often readiness is checked for a client that watches it."""
LIST_TIMEOUT = 5.0
"""Seconds that the controller may take to list the members."""
CHANGE_TIMEOUT = 10.0
"""Seconds that the controller may take for a change. It waits for a member or the launcher."""
NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
"""Codes of a call that the controller did not answer."""

# A client that waits long for a unary answer may ping as often as it likes. A port that is taken is
# an error, not shared.
SERVER_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
)

A = TypeVar("A", bound=Message)


def create_server(
    core: Core, controller: grpc.aio.Channel, max_message_bytes: int = 64 * 2**20
) -> grpc.aio.Server:
    """Return a server with all services. The caller adds a port and starts it."""
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
    """Generate and GenerateStream, answered by the core."""

    def __init__(self, core: Core) -> None:
        self.core = core

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.GenerateResponse:
        response = inference_pb2.GenerateResponse()
        texts: list[str] = []
        async with abort_on_error(context):
            generation = await self._read(request, context)
            response.request_id = generation.request_id
            async with self.core.generate(generation) as events:
                async for event in events:
                    match event:
                        case Began(prompt_token_ids=ids):
                            response.prompt_token_ids.extend(ids or ())
                        case Piece():
                            texts.append(event.text)
                            response.token_ids.extend(event.token_ids)
                            response.logprobs.extend(map(token_logprob, event.logprobs))
                        case Ended():
                            response.MergeFrom(inference_pb2.GenerateResponse(**end_fields(event)))
        response.text = "".join(texts)
        return response

    # A coroutine that writes, and not a generator: then one task does everything for the call.
    async def GenerateStream(  # type: ignore[override]
        self, request: inference_pb2.GenerateStreamRequest, context: grpc.aio.ServicerContext
    ) -> None:
        async with abort_on_error(context):
            generation = await self._read(request, context)
            async with self.core.generate(generation) as events:
                async for event in events:
                    await write_in_time(context, stream_response(event, generation.request_id))

    async def _read(
        self, request: GenerateRequest, context: grpc.aio.ServicerContext
    ) -> GenerationRequest:
        """Return the request as the core takes it, and send its id to the client as metadata."""
        metadata = dict(context.invocation_metadata() or ())
        request_id = new_request_id(request.request_id or metadata.get("x-request-id"))
        structlog.contextvars.bind_contextvars(request_id=request_id)
        await context.send_initial_metadata((("x-request-id", request_id),))
        self.core.check_model(request.model or None)
        timeout = context.time_remaining()
        return to_generation(request, request_id, timeout, self.core.max_model_len())


async def write_in_time(context: grpc.aio.ServicerContext, message: Message) -> None:
    """Write a message, or raise Exhausted if the client does not read for READ_SECONDS."""
    try:
        async with asyncio.timeout(READ_SECONDS):
            await context.write(message)
    except TimeoutError:
        reason = f"the client read nothing for {READ_SECONDS:g} s"
        raise Exhausted(reason, stage="gateway") from None


class ControlForwarder(control_pb2_grpc.ControlServiceServicer):
    """Passes calls on to the controller, except Join, which members call there themselves."""

    def __init__(self, controller: grpc.aio.Channel) -> None:
        self.controller = control_pb2_grpc.ControlServiceStub(controller)

    async def ListMembers(
        self, request: control_pb2.ListMembersRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ListMembersResponse:
        return await forward(self.controller.ListMembers, request, LIST_TIMEOUT, context)

    async def Drain(
        self, request: control_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.DrainResponse:
        return await forward(self.controller.Drain, request, CHANGE_TIMEOUT, context)

    async def Scale(
        self, request: control_pb2.ScaleRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ScaleResponse:
        return await forward(self.controller.Scale, request, CHANGE_TIMEOUT, context)

    async def Join(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[control_pb2.JoinRequest],
        context: grpc.aio.ServicerContext,
    ) -> None:
        await context.abort(
            grpc.StatusCode.UNIMPLEMENTED, "members join at the controller, not at the gateway"
        )


async def forward(
    call: Callable[..., Awaitable[A]],
    request: Message,
    timeout: float,
    context: grpc.aio.ServicerContext,
) -> A:
    """Return the controller's answer, or abort the client's call with the controller's error."""
    try:
        return await call(request, timeout=min(context.time_remaining() or timeout, timeout))
    except grpc.aio.AioRpcError as error:
        if error.code() in NO_ANSWER:
            reason = f"the controller does not answer: {error.details()}"
            await abort(context, Unavailable(reason, stage="controller"))
        await context.abort(error.code(), error.details() or "")
        raise


class ReadinessServicer(health_pb2_grpc.HealthServicer):
    """Reports whether requests can be answered at present, which each call checks again.

    The service "liveness" is SERVING while the process answers.
    """

    def __init__(self, core: Core) -> None:
        self.core = core

    def status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service == "liveness":
            return health_pb2.HealthCheckResponse.SERVING
        if service not in READINESS_NAMES:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if self.core.unready_reason():
            return health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse.SERVING

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
        reported = None
        while True:
            status = self.status(request.service)
            if status != reported:
                await context.write(health_pb2.HealthCheckResponse(status=status))
            reported = status
            await asyncio.sleep(WATCH_SECONDS)


@asynccontextmanager
async def abort_on_error(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """Abort the call with the status of the error that the block raises."""
    try:
        with serving_errors_only():
            yield
    except ServingError as error:
        await abort(context, error)


async def abort(context: grpc.aio.ServicerContext, error: ServingError) -> None:
    await context.abort_with_status(rpc_status.to_status(error_status(error)))
