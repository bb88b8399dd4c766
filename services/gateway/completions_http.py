"""POST /v1/completions: prompts as they are, without a chat template."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from common.errors import ServingError
from common.messages import Usage
from services.gateway import sse
from services.gateway.chat_http import send_body, start_stream
from services.gateway.completions_schema import (
    CompletionsRequest,
    parse_completions,
    to_generations,
)
from services.gateway.endpoint import Asked, Endpoint
from services.gateway.generation import (
    Began,
    Core,
    Ended,
    GenerationEvent,
    GenerationRequest,
    Piece,
    conversion_of,
)
from services.gateway.legacy_logprobs import LegacyLogprobs

MAX_AT_ONCE = 32
"""How many prompts of one body are in flight, so that it does not fill the queue."""


@dataclass(frozen=True, slots=True)
class AskedCompletion(Asked):
    """The requests of a completion, and what writes its answer."""

    writer: "TextWriter"
    echoes: bool = field(kw_only=True)
    """Whether the prompts stand before the answers."""


class Completions(Endpoint[AskedCompletion]):
    """POST /v1/completions as an ASGI application."""

    def parse(self, body: bytearray, request_id: str, timeout: float | None) -> AskedCompletion:
        request = parse_completions(body)
        adapter = self.core.check_model(request.model)
        asked = to_generations(request, request_id, timeout, self.core.max_model_len())
        requests = [replace(one, adapter=adapter) for one in asked.requests]
        writer = TextWriter(request_id, adapter or self.core.model_name, request, requests)
        writer.with_usage = asked.chat.include_usage
        writer.has_running_usage = asked.chat.has_running_usage
        writer.with_ids = bool(asked.chat.return_token_ids)
        writer.names_by_id = bool(asked.chat.return_tokens_as_token_ids)
        return AskedCompletion(
            requests, writer, is_streamed=bool(request.stream), echoes=bool(request.echo)
        )

    async def answer(
        self, asked: AskedCompletion, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if asked.echoes:
            asked.writer.prompts = [await text_of(self.core, one) for one in asked.requests]
        if asked.is_streamed:
            await self._send_stream(asked, send)
            return
        async with answers_to(self.core, asked.requests) as events:
            async for index, event in events:
                asked.writer.add(index, event)
        await JSONResponse(asked.writer.whole())(scope, receive, send)

    async def _send_stream(self, asked: AskedCompletion, send: Send) -> None:
        """Send the events of the answers.

        Nothing is sent before the first one begins, so an earlier failure is an HTTP error.
        """
        started = False
        try:
            async with answers_to(self.core, asked.requests) as events:
                async for index, event in events:
                    if not started:
                        started = True
                        await start_stream(send)
                    await send_body(send, asked.writer.add(index, event))
            tail = asked.writer.totals()
        except ServingError as error:
            if not started:
                raise
            tail = sse.sse_event(sse.error_body(error))
        await send({"type": "http.response.body", "body": tail + sse.DONE})


@asynccontextmanager
async def answers_to(
    core: Core, requests: list[GenerationRequest]
) -> AsyncIterator[AsyncIterator[tuple[int, GenerationEvent]]]:
    """Ask for all requests, a few at a time, and return their events with the index of each.

    The deadline holds for all together. Leaving the context aborts what is not answered.

    Raises
    ------
    ServingError
        on iterating, if one of them fails.
    """
    clock = asyncio.get_running_loop().time
    began = clock()
    waiting = iter(enumerate(requests))
    # Bounded, so that a client that does not read holds up the answers.
    queue = asyncio.Queue[tuple[int, GenerationEvent] | BaseException | None](1)

    async def work() -> None:
        for index, request in waiting:
            timeout = core.request_timeout if request.timeout is None else request.timeout
            left = max(0.0, began + timeout - clock())
            async with core.generate(replace(request, timeout=left)) as events:
                async for event in events:
                    await queue.put((index, event))

    async def work_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(MAX_AT_ONCE, len(requests))):
                    group.create_task(work())
            await queue.put(None)
        except* ServingError as errors:
            await queue.put(errors.exceptions[0])

    async def events() -> AsyncIterator[tuple[int, GenerationEvent]]:
        while (found := await queue.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found

    working = asyncio.create_task(work_all())
    try:
        yield events()
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


class Answer:
    """One answer to one prompt, as far as it has come."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.logprobs = LegacyLogprobs()


class TextWriter:
    """Writes the bodies of one completion, whole or streamed."""

    def __init__(
        self,
        request_id: str,
        model: str,
        request: CompletionsRequest,
        requests: list[GenerationRequest],
    ) -> None:
        self.head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self.with_usage = False
        self.has_running_usage = False
        self._running = [sse.RunningUsage() for _ in requests]
        self.with_ids = False
        self.names_by_id = False
        """Whether log-probabilities name tokens by their ids."""
        self._with_logprobs = request.logprobs is not None
        self._drops_answers = request.max_tokens == 0
        self._n = requests[0].n
        self.prompts = [""] * len(requests)
        """The texts that stand before the answers; empty if none do."""
        self._answers = [Answer() for _ in requests for _ in range(self._n)]
        self._usages: list[Usage] = []
        self._timings: dict[str, Any] = {}

    def add(self, prompt_index: int, event: GenerationEvent) -> bytes:
        """Note an event of the answers to a prompt, and return its chunk of a stream."""
        assert isinstance(event, Began | Piece | Ended)
        index = prompt_index * self._n + event.choice
        answer = self._answers[index]
        self._running[prompt_index].note(event)
        match event:
            case Began():
                return self._begin(index, answer, self.prompts[prompt_index], event)
            case Piece() if not self._drops_answers:
                answer.text += event.text
                answer.token_ids += event.token_ids
                logprobs = None
                if self._with_logprobs:
                    logprobs = answer.logprobs.add(self._named(event.logprobs))
                if not (event.text or logprobs or (self.with_ids and event.token_ids)):
                    return b""
                return self._chunk(index, event.text, logprobs, None, event.token_ids)
            case Ended():
                answer.finish_reason = event.finish_reason
                if event.is_last:
                    self._usages.append(event.usage)
                    self._timings = event.timings
                return self._chunk(index, "", None, event.finish_reason, [])
        return b""

    def _begin(self, index: int, answer: Answer, prompt: str, began: Began) -> bytes:
        if not prompt:
            return b""
        answer.text = prompt
        logprobs = None
        if self._with_logprobs:
            logprobs = answer.logprobs.add_prompt(prompt, began.prompt_logprobs or [])
        return self._chunk(index, prompt, logprobs, None, [])

    def _named(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sse.named_by_id(entries) if self.names_by_id else entries

    def whole(self) -> dict[str, Any]:
        """Return the body of a completion that is not streamed."""
        choices = []
        for index, answer in enumerate(self._answers):
            choice = {
                "index": index,
                "text": answer.text,
                "logprobs": answer.logprobs.body() if self._with_logprobs else None,
                "finish_reason": answer.finish_reason,
            }
            if self.with_ids:
                choice["token_ids"] = answer.token_ids
            choices.append(choice)
        body = self.head | {"choices": choices, "usage": self._usage(self._usages)}
        return body | ({"timings": self._timings} if len(self.prompts) == 1 else {})

    def totals(self) -> bytes:
        """Return the chunk of a stream with the usage, if it is asked for."""
        if not self.with_usage:
            return b""
        return sse.sse_event(self.head | {"choices": [], "usage": self._usage(self._usages)})

    def _usage(self, usages: list[Usage]) -> dict[str, Any]:
        """Return the usage of all prompts and their answers together."""
        completion_tokens = sum(usage.completion_tokens for usage in usages)
        return sse.usage_body(
            Usage(
                prompt_tokens=sum(usage.prompt_tokens for usage in usages),
                completion_tokens=0 if self._drops_answers else completion_tokens,
                cached_tokens=sum(usage.cached_tokens for usage in usages),
            )
        )

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        finish_reason: str | None,
        token_ids: list[int],
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        if self.with_ids:
            choice["token_ids"] = token_ids
        usage: dict[str, Any] = {"usage": None} if self.with_usage else {}
        if self.has_running_usage:
            usage = {"usage": self._usage([running.usage for running in self._running])}
        return sse.sse_event(self.head | {"choices": [choice]} | usage)


async def text_of(core: Core, request: GenerationRequest) -> str:
    """Return the text of a prompt. Raises ServingError if its tokens have none."""
    if request.prompt_kind == "text":
        return request.prompt.decode(errors="replace")
    spelled = GenerationRequest(
        request_id=f"{request.request_id}-echo",
        prompt_kind="token_ids",
        prompt=request.prompt,
        timeout=request.timeout,
        task="detokenize",
    )
    async with core.generate(spelled) as events:
        return (await conversion_of(events)).text
