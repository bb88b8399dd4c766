"""The gRPC API: inference, the control plane of the controller, health and reflection."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_status import rpc_status

from common.errors import Exhausted, ServingError, Unavailable, shorten
from common.grpc_server import (
    MAX_ERROR_CHARS,
    Context,
    Server,
    Services,
    parsed,
    serving_errors_only,
)
from common.logs import get_logger
from common.tracing import read_traceparent
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from proto.twinlens.inference.v1 import inference_pb2
from services.gateway.adapters import check_adapter
from services.gateway.body_budget import BodyBudget
from services.gateway.fair_share import FairShare
from services.gateway.generation import (
    Began,
    Core,
    Ended,
    GenerationEvent,
    GenerationRequest,
    Piece,
    conversion_of,
    last_of,
)
from services.gateway.grpc_messages import (
    InferenceRequest,
    classify_response,
    embed_response,
    error_status,
    stream_response,
    to_request,
    tokenize_response,
    whole_response,
)
from services.gateway.grpc_reads import Reads, client_name
from services.gateway.grpc_wire import TooManyFields, split_media
from services.gateway.limits import MAX_ADMITTED_IMAGE_BYTES, SMALL_BODY_BYTES
from services.gateway.readiness import ReadinessServicer
from services.gateway.request_log import current_end, one_line
from services.gateway.schema import new_request_id
from services.gateway.slow_readers import READ_SECONDS
from services.gateway.turns import Turns

INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
CONTROL_SERVICE = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name
READINESS_NAMES = ("", "readiness", INFERENCE_SERVICE, CONTROL_SERVICE)
"""Names under which a health check asks for readiness."""
LIST_TIMEOUT = 5.0
"""Seconds that the controller may take to list the members."""
CHANGE_TIMEOUT = 10.0
"""Seconds that the controller may take for a change. It waits for a member or the launcher."""
# A client that waits long for a unary answer may ping as often as it likes.
SERVER_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
QUICK_FIELDS = 1000
"""A request of up to this many fields is looked at on the event loop, in about a millisecond."""
MAX_REFLECTIONS = 100
"""The most open streams of reflection."""
CONTROLLER_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
}
"""Codes of the controller whose texts are for the client."""

A = TypeVar("A", bound=Message)
R = TypeVar("R", bound=InferenceRequest)
T = TypeVar("T")


def create_server(
    core: Core,
    controller: grpc.aio.Channel,
    max_message_bytes: int = 64 * 2**20,
    budget: BodyBudget | None = None,
    admitted_images: BodyBudget | None = None,
) -> grpc.aio.Server:
    """Return a server with all services. The caller adds a port and starts it.

    The budgets are shared with the other API: for messages before admission, and for the images of
    admitted requests.
    """
    server = Server(*SERVER_OPTIONS, ("grpc.max_receive_message_length", max_message_bytes))
    reads = Reads(budget or BodyBudget(), max_message_bytes)
    inference = InferenceServicer(
        core, reads, admitted_images or BodyBudget(MAX_ADMITTED_IMAGE_BYTES)
    )
    server.add_registered_method_handlers(INFERENCE_SERVICE, inference.handlers())
    services = Services(server, reads.receive_small)
    control_pb2_grpc.add_ControlServiceServicer_to_server(ControlForwarder(controller), services)
    readiness = ReadinessServicer(core, READINESS_NAMES)
    health_pb2_grpc.add_HealthServicer_to_server(readiness, services)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(Reflection(), services)
    return server


class InferenceServicer:
    """The methods of the inference service, answered by the core."""

    def __init__(self, core: Core, reads: Reads, admitted_images: BodyBudget) -> None:
        self.core = core
        self.reads = reads
        self.admitted_images = admitted_images
        self.turns = Turns("grpc-messages")

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """Return the methods by name, for a server. They get no message before they ask for it."""
        return {
            "Generate": grpc.stream_unary_rpc_method_handler(
                self.Generate, None, inference_pb2.GenerateResponse.SerializeToString
            ),
            "GenerateStream": grpc.stream_stream_rpc_method_handler(
                self.GenerateStream, None, inference_pb2.GenerateStreamResponse.SerializeToString
            ),
            "Classify": grpc.stream_unary_rpc_method_handler(
                self.Classify, None, inference_pb2.ClassifyResponse.SerializeToString
            ),
            "Embed": grpc.stream_unary_rpc_method_handler(
                self.Embed, None, inference_pb2.EmbedResponse.SerializeToString
            ),
            "Tokenize": grpc.stream_unary_rpc_method_handler(
                self.Tokenize, None, inference_pb2.TokenizeResponse.SerializeToString
            ),
            "Detokenize": grpc.stream_unary_rpc_method_handler(
                self.Detokenize, None, inference_pb2.DetokenizeResponse.SerializeToString
            ),
            "LoadAdapter": grpc.stream_unary_rpc_method_handler(
                self.LoadAdapter, None, inference_pb2.LoadAdapterResponse.SerializeToString
            ),
            "UnloadAdapter": grpc.stream_unary_rpc_method_handler(
                self.UnloadAdapter, None, inference_pb2.UnloadAdapterResponse.SerializeToString
            ),
        }

    async def Generate(self, _messages: Any, context: Context) -> inference_pb2.GenerateResponse:
        pieces: list[Piece] = []
        ends: list[Ended] = []
        async with (
            abort_on_error(context),
            self._admitted(inference_pb2.GenerateRequest, context) as (request, events),
        ):
            async for event in events:
                match event:
                    case Began(choice=0):
                        began = event
                    case Piece():
                        pieces.append(event)
                    case Ended():
                        ends.append(event)
            return whole_response(request.request_id, began, pieces, ends)
        raise AssertionError("an error ends the call")

    # A coroutine that writes, and not a generator: then one task does everything for the call.
    async def GenerateStream(self, _messages: Any, context: Context) -> None:
        async with (
            abort_on_error(context),
            self._admitted(inference_pb2.GenerateStreamRequest, context) as (request, events),
        ):
            async for event in events:
                if response := stream_response(event, request.request_id):
                    await write_in_time(context, response)

    async def Classify(self, _messages: Any, context: Context) -> inference_pb2.ClassifyResponse:
        async with (
            abort_on_error(context),
            self._admitted(inference_pb2.ClassifyRequest, context) as (request, events),
        ):
            top_k = request.top_k if request.HasField("top_k") else None
            return classify_response(await last_of(events), request.request_id, top_k)
        raise AssertionError("an error ends the call")

    async def Embed(self, _messages: Any, context: Context) -> inference_pb2.EmbedResponse:
        async with (
            abort_on_error(context),
            self._admitted(inference_pb2.EmbedRequest, context) as (request, events),
        ):
            return embed_response(await last_of(events), request.request_id)
        raise AssertionError("an error ends the call")

    async def Tokenize(self, _messages: Any, context: Context) -> inference_pb2.TokenizeResponse:
        async with (
            abort_on_error(context),
            self._admitted(inference_pb2.TokenizeRequest, context) as (request, events),
        ):
            found = await conversion_of(events)
            return tokenize_response(found, request.request_id, self.core.max_model_len())
        raise AssertionError("an error ends the call")

    async def Detokenize(
        self, _messages: Any, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        async with (
            abort_on_error(context),
            self._admitted(inference_pb2.DetokenizeRequest, context) as (request, events),
        ):
            found = await conversion_of(events)
            return inference_pb2.DetokenizeResponse(request_id=request.request_id, text=found.text)
        raise AssertionError("an error ends the call")

    async def LoadAdapter(
        self, _messages: Any, context: Context
    ) -> inference_pb2.LoadAdapterResponse:
        async with abort_on_error(context):
            with await self.reads.receive(context) as data:
                asked = parsed(data or b"", inference_pb2.LoadAdapterRequest.FromString)
            check_adapter(self.core.model_name, asked.name, asked.path)
            await self.core.adapters.load(asked.name, asked.path, asked.replace)
        return inference_pb2.LoadAdapterResponse()

    async def UnloadAdapter(
        self, _messages: Any, context: Context
    ) -> inference_pb2.UnloadAdapterResponse:
        async with abort_on_error(context):
            with await self.reads.receive(context) as data:
                asked = parsed(data or b"", inference_pb2.UnloadAdapterRequest.FromString)
            await self.core.adapters.unload(asked.name)
        return inference_pb2.UnloadAdapterResponse()

    @asynccontextmanager
    async def _admitted(
        self, kind: type[R], context: Context
    ) -> AsyncIterator[tuple[R, AsyncIterator[GenerationEvent]]]:
        """Receive the request, and return it without its images, with its id, and its events once
        it is admitted."""
        client = client_name(context.peer())
        async with AsyncExitStack() as stack:
            # The bytes of a request are counted until it is admitted, and its images to the end.
            with await self.reads.receive(context) as data:
                request, generation = await self._read(data or b"", kind, context)
                num_image_bytes = sum(map(len, generation.images))
                stack.enter_context(self.admitted_images.reserve(client, num_image_bytes))
                events = await stack.enter_async_context(self.core.generate(generation))
            request.request_id = generation.request_id
            del generation, data
            yield request, events

    async def _read(
        self, data: bytes, kind: type[R], context: Context
    ) -> tuple[R, GenerationRequest]:
        """Return the request without its images, and as the core takes it.

        Its id is sent to the client as metadata.
        """
        max_model_len = self.core.max_model_len()
        try:
            split = split_media(data, max_model_len, QUICK_FIELDS)
        except TooManyFields:
            again = partial(split_media, data, max_model_len)
            split = await self._work(context, is_large=True, function=again)
        is_large = len(split.request) > SMALL_BODY_BYTES
        request = await self._work(context, is_large, partial(message_of, kind, split.request))
        metadata = dict(context.invocation_metadata() or ())
        request_id = current_end().request_id
        if request.request_id:
            request_id = new_request_id(request.request_id)
            structlog.contextvars.bind_contextvars(request_id=request_id)
        await context.send_initial_metadata((("x-request-id", request_id),))
        adapter = self.core.check_model(request.model or None)
        timeout = context.time_remaining()
        convert = partial(to_request, request, split.media, request_id, timeout, max_model_len)
        generation = await self._work(context, is_large, convert)
        if adapter:
            generation = replace(generation, adapter=adapter)
        if traceparent := read_traceparent(metadata.get("traceparent")):
            generation = replace(generation, traceparent=traceparent)
        return request, generation

    async def _work(self, context: Context, is_large: bool, function: Callable[[], T]) -> T:
        """Return what the function returns, which does something with a request.

        What takes long runs off the event loop, and clients take turns.
        """
        if is_large:
            return await self.turns.run(client_name(context.peer()), function)
        return function()


def message_of(kind: type[R], data: bytes) -> R:
    """Return the bytes as a message of this kind, or raise InvalidRequest."""
    request = parsed(data, kind.FromString)
    assert isinstance(request, kind)
    return request


async def write_in_time(context: Context, message: Message) -> None:
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
        self, request: control_pb2.ListMembersRequest, context: Context
    ) -> control_pb2.ListMembersResponse:
        return await forward(self.controller.ListMembers, request, LIST_TIMEOUT, context)

    async def Drain(
        self, request: control_pb2.DrainRequest, context: Context
    ) -> control_pb2.DrainResponse:
        return await forward(self.controller.Drain, request, CHANGE_TIMEOUT, context)

    async def Scale(
        self, request: control_pb2.ScaleRequest, context: Context
    ) -> control_pb2.ScaleResponse:
        return await forward(self.controller.Scale, request, CHANGE_TIMEOUT, context)

    async def Join(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[control_pb2.JoinRequest],
        context: Context,
    ) -> None:
        await context.abort(
            grpc.StatusCode.UNIMPLEMENTED, "members join at the controller, not at the gateway"
        )


async def forward(
    call: Callable[..., Awaitable[A]], request: Message, timeout: float, context: Context
) -> A:
    """Return the controller's answer, or abort the client's call with the controller's error.

    Texts of a library, which may have internal addresses, go into the log only.
    """
    try:
        return await call(request, timeout=min(context.time_remaining() or timeout, timeout))
    except grpc.aio.AioRpcError as error:
        if error.code() in CONTROLLER_CODES:
            await context.abort(error.code(), shorten(error.details() or "", MAX_ERROR_CHARS))
        get_logger().warning(
            "the controller failed", code=error.code().name, reason=error.details()
        )
        await abort(context, Unavailable("the controller does not answer", stage="controller"))
        raise


class Reflection(reflection.aio.ReflectionServicer):
    """Describes the services to clients that have no stubs."""

    def __init__(self) -> None:
        super().__init__(
            (INFERENCE_SERVICE, CONTROL_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        )
        self._share = FairShare(MAX_REFLECTIONS, "too many streams of reflection: try again")

    async def ServerReflectionInfo(
        self, request_iterator: AsyncIterator[Message], context: Context
    ) -> AsyncIterator[Message]:
        client = client_name(context.peer())
        self._share.take(client)
        try:
            async for answer in super().ServerReflectionInfo(request_iterator, context):
                yield answer
        finally:
            self._share.put_back(client)


@asynccontextmanager
async def abort_on_error(context: Context) -> AsyncIterator[None]:
    """Abort the call with the status of the error that the block raises, and log why it ended."""
    metadata = dict(context.invocation_metadata() or ())
    with one_line(new_request_id(metadata.get("x-request-id"))) as end:
        try:
            with serving_errors_only():
                yield
        except ServingError as error:
            end.fail(error)
            await abort(context, error)
        except asyncio.CancelledError:
            end.give_up()
            raise


async def abort(context: Context, error: ServingError) -> None:
    await context.abort_with_status(rpc_status.to_status(error_status(error)))
