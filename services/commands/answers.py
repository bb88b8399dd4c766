"""What became of a chat completion, read from its body or from its stream."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from services.commands.event_stream import EventReader

MOST_ERROR_CHARACTERS = 500


@dataclass
class Answer:
    """What became of one request. `error` is empty if it succeeded."""

    text: str = ""
    """The text, with the arguments of tool calls."""
    token_times: list[tuple[float, int]] = field(default_factory=list)
    """For each chunk with tokens, when it came, in seconds after the request was sent, and how many
    tokens it has. Empty if the answer was not streamed. A chunk whose number is not known counts
    as one."""
    finish_reason: str = ""
    """Empty if the answer failed."""
    finish_seconds: float = 0.0
    """The seconds after the request was sent at which the finish reason came in a stream; 0 if it
    did not. The last token may have no text, and then no chunk of its own."""
    usage: dict[str, Any] = field(default_factory=dict)
    """OpenAI's `usage`; empty if the server sent none."""
    timings: dict[str, Any] = field(default_factory=dict)
    """The stage timings of Twinlens; empty from other servers."""
    token_ids: list[int] = field(default_factory=list)
    """The answer's tokens, if the body asked for them with `return_token_ids`."""
    status: int = 0
    """The HTTP status; 0 if there was no answer."""
    error: str = ""
    retry_after: float | None = None
    """The seconds after which the server wants to be asked again."""
    began: float = 0.0
    """The monotonic time of sending."""
    seconds: float = 0.0
    """The time from sending to the end."""
    is_broken: bool = False
    """Whether the connection failed, so that the same request may succeed."""
    has_timed_out: bool = False
    """Whether the answer was not complete in time."""


class Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct):
    """What is read of a call of a tool, or of a part of one."""

    function: Function | None = None


class Message(msgspec.Struct):
    """What is read of a message, or of a part of one. Reasoning may come apart from the text."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None

    @property
    def text(self) -> str:
        """The text, and the arguments of tool calls."""
        functions = [call.function for call in self.tool_calls or () if call.function]
        return (self.content or "") + "".join(call.arguments or "" for call in functions)

    @property
    def has_text(self) -> bool:
        return bool(self.text or self.reasoning_content or self.reasoning or self.tool_calls)


class Choice(msgspec.Struct):
    delta: Message | None = None
    message: Message | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct):
    """What is read of a chat completion, whole or one chunk of a stream."""

    choices: list[Choice] | None = None
    usage: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None
    error: Any = None


completion_decoder = msgspec.json.Decoder(Completion)


async def read_stream(body: AsyncIterator[bytes], answer: Answer) -> None:
    """Read an answer that is streamed as server-sent events."""
    reader = EventReader()
    is_done = False
    async for received in body:
        seconds = time.monotonic() - answer.began
        for event in reader.feed(received):
            is_done |= take_event(event, answer, seconds)
    for event in reader.close():
        is_done |= take_event(event, answer, time.monotonic() - answer.began)
    if answer.error or answer.finish_reason:
        return
    if is_done:
        # Some servers end without a reason. [DONE] says that nothing is missing.
        answer.finish_reason = "stop"
    else:
        answer.error = "the stream ended before the answer did"
        answer.is_broken = True


def take_event(event: bytes, answer: Answer, seconds: float) -> bool:
    """Add an event to the answer. Return whether it says that the stream is complete."""
    if event.strip() == b"[DONE]":
        return True
    try:
        chunk = completion_decoder.decode(event)
    except msgspec.DecodeError as error:
        answer.error = answer.error or f"the stream has an event that cannot be read: {error}"
        return False
    if chunk.error:
        answer.error = answer.error or error_text(event)
    else:
        take_chunk(chunk, answer, seconds)
    return False


def take_chunk(chunk: Completion, answer: Answer, seconds: float) -> None:
    known = answer.usage.get("completion_tokens") or 0
    take_totals(chunk, answer)
    for choice in chunk.choices or ():
        delta = choice.delta or Message()
        ids = choice.token_ids or []
        answer.text += delta.text
        answer.token_ids += ids
        if choice.finish_reason:
            answer.finish_reason = choice.finish_reason
            answer.finish_seconds = seconds
        # Some servers count the tokens so far in each chunk.
        counted = (answer.usage.get("completion_tokens") or 0) - known
        if number := len(ids) or (max(1, counted) if delta.has_text else 0):
            answer.token_times.append((seconds, number))


def take_totals(body: Completion, answer: Answer) -> None:
    """Take usage and timings from a whole answer or from any chunk that has them."""
    answer.usage = body.usage or answer.usage
    answer.timings = body.timings or answer.timings


def read_whole(body: bytes, answer: Answer) -> None:
    """Read an answer that is not streamed."""
    try:
        whole = completion_decoder.decode(body)
    except msgspec.DecodeError:
        whole = Completion()
    if whole.error or not whole.choices or not (message := whole.choices[0].message):
        answer.error = f"this is not a chat completion: {error_text(body)}"
        return
    answer.text = message.text
    answer.token_ids = whole.choices[0].token_ids or []
    answer.finish_reason = whole.choices[0].finish_reason or "stop"
    take_totals(whole, answer)


def error_text(body: bytes) -> str:
    """Return the message of an error body in any of the usual forms, else its beginning."""
    match decode(body):
        case {"error": {"message": str(message)}} | {"error": str(message)}:
            return message
        case {"message": str(message)} | {"detail": str(message)}:
            return message
    return body.decode(errors="replace")[:MOST_ERROR_CHARACTERS].strip()


def decode(body: bytes) -> Any:
    """Return JSON as Python objects; None if it is not JSON."""
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        return None
