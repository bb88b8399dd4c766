"""gRPC servers that bear whatever a client sends. The gateway and the controller each have one.

A method gets its message as bytes, and asks for it. So nothing that a client sends is unpacked, or
kept beyond the window of its stream, before the service wants it. On the wire, a method with one
message and one with a stream of messages look the same.
"""

import asyncio
import inspect
import logging
import resource
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc._cython import cygrpc
from grpc.aio import _server

from common.errors import Internal, InvalidRequest, ServingError, shorten
from common.logs import get_logger

MAX_ERROR_CHARS = 1000
"""The longest text of an error."""
MAX_CONNECTIONS = 1000
STREAM_WINDOW_BYTES = 64 * 1024
"""How many bytes of a message a client may send before the service asks for the message."""

BOUNDS = (
    ("grpc.max_concurrent_streams", 100),
    ("grpc.http2.lookahead_bytes", STREAM_WINDOW_BYTES),
    ("grpc.http2.bdp_probe", 0),  # it makes the window grow to megabytes
    ("grpc.compression_enabled_algorithms_bitset", 1),  # a small message may unpack to gigabytes
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not shared
)
"""What bounds a connection: its streams, what is buffered for each, and how long it may idle."""

Context: TypeAlias = grpc.aio.ServicerContext
M = TypeVar("M", bound=Message)
Receive = Callable[[Context], Awaitable[bytes | None]]
"""Returns the next message of a call, or None after the last one."""


class UnknownMethods:
    """Finds no method for any path."""

    def resolve_handler(self, _details: Any) -> None:
        return None


class Calls(cygrpc.AioServer):  # type: ignore[misc]
    """grpcio's server, which answers calls of unknown methods without reading their path.

    grpcio decodes the path in the loop that accepts calls, and a path that is not UTF-8 ends the
    loop and so the server. The known methods are registered, and never take that way.
    """

    _answering: set[asyncio.Task[None]] = set()
    """The tasks that answer, because the event loop keeps no reference to them."""

    async def _request_call(self) -> Any:
        while True:
            state = await super()._request_call()
            loop = asyncio.get_running_loop()
            answer = cygrpc._handle_rpc("unknown", UnknownMethods(), (), state, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(answer, state, loop, "unknown"))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)


class Server(_server.Server):  # type: ignore[misc]
    """A gRPC server whose connections are bounded. Services are added through `Services`."""

    def __init__(self, *options: tuple[str, int]) -> None:
        most = ("grpc.max_allowed_incoming_connections", max_connections())
        self._loop = asyncio.get_running_loop()
        self._server = Calls(self._loop, None, (), (), (*BOUNDS, most, *options), None)
        logging.getLogger("grpc._cython.cygrpc").addFilter(without_traceback)


def max_connections() -> int:
    """Return the most connections of a server, which leave descriptors for everything else."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if descriptors < 0 else min(MAX_CONNECTIONS, max(1, descriptors // 4))


def without_traceback(record: logging.LogRecord) -> bool:
    """Drop the traceback of what grpcio logs: such a line is about a client, not about a bug."""
    record.exc_info = None
    return True


class Services:
    """Takes the place of a server for generated code, which adds the methods of a service to it.

    Each method gets its messages through `receive` and checked, and answers errors with a code and
    a plain text. A method with one message is a coroutine function.
    """

    def __init__(self, server: grpc.aio.Server, receive: Receive) -> None:
        self._server = server
        self._receive = receive

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Do nothing: generated code also calls the other function."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]
    ) -> None:
        checked = {name: self._checked(handler) for name, handler in handlers.items()}
        implemented = {name: handler for name, handler in checked.items() if handler}
        self._server.add_registered_method_handlers(service, implemented)

    def _checked(self, handler: Any) -> grpc.RpcMethodHandler | None:
        """Return the handler with what this class adds, or None if the service has none.

        The methods that a service does not implement are the only ones that are not asynchronous.
        """
        method = handler.stream_stream or handler.unary_stream or handler.unary_unary
        if not (inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)):
            return None
        parse = handler.request_deserializer
        serialize = handler.response_serializer
        add = self._with_stream if handler.request_streaming else self._with_one
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(add(method, parse), None, serialize)
        return grpc.stream_unary_rpc_method_handler(add(method, parse), None, serialize)

    def _with_one(self, method: Any, parse: Callable[[bytes], Message]) -> Any:
        async def call(_messages: Any, context: Context) -> Any:
            try:
                with serving_errors_only():
                    return await method(parsed(await self._receive(context), parse), context)
            except ServingError as error:
                await abort(context, error)

        return call

    def _with_stream(self, method: Any, parse: Callable[[bytes], Message]) -> Any:
        async def messages(context: Context) -> AsyncIterator[Message]:
            while (data := await self._receive(context)) is not None:
                yield parsed(data, parse)

        async def call(_messages: Any, context: Context) -> None:
            try:
                with serving_errors_only():
                    if inspect.iscoroutinefunction(method):
                        return await method(messages(context), context)
                    async for answer in method(messages(context), context):
                        await context.write(answer)
            except ServingError as error:
                await abort(context, error)

        return call


def parsed(data: bytes | None, parse: Callable[[bytes], M]) -> M:
    """Return the message, or raise InvalidRequest if the bytes are not one."""
    if data is None:
        raise InvalidRequest("the call has no message: send one")
    try:
        return parse(data)
    except DecodeError:
        raise InvalidRequest("the bytes sent are not a message of this method") from None


def bounded(data: bytes | None, max_bytes: int) -> bytes | None:
    """Return the message, or raise InvalidRequest if it is larger than `max_bytes`."""
    if data is not None and len(data) > max_bytes:
        raise InvalidRequest(f"the message has more than {max_bytes} bytes; send a smaller one")
    return data


async def next_message(context: Context) -> bytes | None:
    """Return the next message of the call as bytes, or None after the last one."""
    data = await context.read()
    return None if data is grpc.aio.EOF else data


@contextmanager
def serving_errors_only() -> Iterator[None]:
    """Log any other error, which is a bug, and raise Internal in its place.

    grpcio's own errors pass: they end a call whose client is gone, or that was refused.
    """
    try:
        yield
    except (ServingError, grpc.aio.BaseError):
        raise
    except Exception as error:
        get_logger().exception("unexpected error")
        raise Internal("unexpected error; see the log of the server") from error


async def abort(context: Context, error: ServingError) -> None:
    """End the call with the error's code and text, and write its line into the log."""
    metadata = dict(context.invocation_metadata() or ())
    log = get_logger().info if error.http_status < 500 else get_logger().warning
    log(
        "refused",
        request_id=metadata.get("x-request-id") or uuid.uuid4().hex,
        status=error.http_status,
        code=error.code,
        reason=error.message,
    )
    await context.abort(grpc.StatusCode[error.grpc_code], shorten(error.message, MAX_ERROR_CHARS))
