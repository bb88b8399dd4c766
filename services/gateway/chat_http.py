"""POST /v1/chat/completions."""

from dataclasses import dataclass, replace

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from common.errors import ServingError
from services.gateway import sse
from services.gateway.endpoint import Asked, Endpoint
from services.gateway.generation import Began, Ended, GenerationRequest, Piece
from services.gateway.schema import chat_to_generation, parse_chat
from services.gateway.token_times import TokenTimes

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


@dataclass(frozen=True, slots=True)
class AskedChat(Asked):
    """The request of a chat, and what writes its answer."""

    writer: sse.CompletionWriter


class ChatCompletions(Endpoint[AskedChat]):
    """POST /v1/chat/completions as an ASGI application."""

    times_tokens = False
    """Whether every answer has `token_timestamps`, also those that do not ask for them."""

    def parse(self, body: bytearray, request_id: str, timeout: float | None) -> AskedChat:
        chat = parse_chat(body)
        adapter = self.core.check_model(chat.model)
        generation = chat_to_generation(chat, request_id, timeout, self.core.max_model_len())
        if adapter:
            generation = replace(generation, adapter=adapter)
        has_times = chat.token_timestamps or self.times_tokens
        writer = sse.CompletionWriter(
            request_id,
            adapter or self.core.model_name,
            with_ids=bool(chat.return_token_ids),
            with_logprobs=bool(chat.logprobs),
            with_usage=chat.include_usage,
            with_running_usage=chat.has_running_usage,
            with_timings=bool(chat.timings),
            token_times=[TokenTimes() for _ in range(generation.n)] if has_times else None,
            names_tool=chat.tool_use.is_named,
            names_by_id=bool(chat.return_tokens_as_token_ids),
        )
        return AskedChat([generation], writer, is_streamed=bool(chat.stream))

    async def answer(self, asked: AskedChat, scope: Scope, receive: Receive, send: Send) -> None:
        [generation] = asked.requests
        if asked.is_streamed:
            await self._send_stream(generation, asked.writer, send)
        else:
            await self._send_whole(generation, asked.writer, scope, receive, send)

    async def _send_whole(
        self,
        generation: GenerationRequest,
        writer: sse.CompletionWriter,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        pieces: list[Piece] = []
        ends: list[Ended] = []
        async with self.core.generate(generation) as events:
            async for event in events:
                writer.note(event)
                match event:
                    case Began(choice=0):
                        began = event
                    case Piece():
                        pieces.append(event)
                    case Ended():
                        ends.append(event)
        await JSONResponse(writer.whole(began, pieces, ends))(scope, receive, send)

    async def _send_stream(
        self, generation: GenerationRequest, writer: sse.CompletionWriter, send: Send
    ) -> None:
        """Send the events of an answer.

        Nothing is sent before Began, so an earlier failure is an HTTP error. A later one is an
        event of the stream.
        """
        started = False
        try:
            async with self.core.generate(generation) as events:
                async for event in events:
                    writer.note(event)
                    match event:
                        case Began():
                            if not started:
                                started = True
                                await start_stream(send)
                            await send_body(send, writer.first_chunk(event))
                        case Piece():
                            await send_body(send, writer.piece_chunk(event))
                        case Ended(is_last=False):
                            await send_body(send, writer.last_chunks(event))
                        case Ended():
                            tail = writer.last_chunks(event)
        except ServingError as error:
            if not started:
                raise
            tail = sse.sse_event(sse.error_body(error))
        await send({"type": "http.response.body", "body": tail + sse.DONE})


class TimedChatCompletions(ChatCompletions):
    """The same for tools that need `token_timestamps` and cannot ask for them."""

    times_tokens = True


async def start_stream(send: Send) -> None:
    headers = [(name.encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def send_body(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})
