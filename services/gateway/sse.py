"""The bodies of chat completions and errors as OpenAI's clients read them, whole or streamed."""

import json
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from common.boxes import Box
from common.errors import ServingError
from common.messages import Usage
from services.gateway.generation import (
    Began,
    Conversion,
    Ended,
    GenerationEvent,
    Piece,
    Result,
)
from services.gateway.prompt_logprobs import prompt_logprobs_body
from services.gateway.token_times import TokenTimes
from services.gateway.tools import Call, join_calls

# Events end with "\n\n" only: a widely used benchmark splits there and loses events that end with
# "\r\n\r\n".
DONE = b"data: [DONE]\n\n"

ERROR_CODES = {
    "InvalidRequest": "invalid_request",
    "UnreadableImage": "unreadable_image",
    "ContextLengthExceeded": "context_length_exceeded",
    "TooLarge": "too_large",
    "UnsupportedType": "unsupported_media_type",
    "TooSlow": "request_timeout",
    "NotFound": "model_not_found",
    "Exhausted": "rate_limit_exceeded",
    "Unavailable": "unavailable",
    "DeadlineExceeded": "deadline_exceeded",
    "Internal": "internal_error",
}
"""The `code` of an error body by the class in common.errors."""


def sse_event(data: dict[str, Any]) -> bytes:
    """Return one server-sent event with the data as JSON."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


def error_type(error: ServingError) -> str:
    """Return OpenAI's name for the class of the error."""
    if error.http_status == 429:
        return "rate_limit_error"
    return "server_error" if error.http_status >= 500 else "invalid_request_error"


def error_body(error: ServingError) -> dict[str, Any]:
    """Return OpenAI's error object, with `stage` and `image` if the error names them."""
    body: dict[str, Any] = {
        "message": error.message,
        "type": error_type(error),
        "param": getattr(error, "param", None),
        "code": ERROR_CODES[error.code],
    }
    if error.stage:
        body["stage"] = error.stage
    if error.item is not None:
        body["image"] = error.item
    return {"error": body}


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "image_tokens": usage.image_tokens,
            "text_tokens": usage.prompt_tokens - usage.image_tokens,
        },
    }


def named_by_id(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return entries of Piece.logprobs whose tokens are named by their ids, in vLLM's form."""
    named = [entry | {"token": f"token_id:{entry['token_id']}"} for entry in entries]
    for entry in named:
        if "top_logprobs" in entry:
            entry["top_logprobs"] = named_by_id(entry["top_logprobs"])
    return named


def logprobs_body(entries: list[dict[str, Any]], with_ids: bool) -> dict[str, Any]:
    """Return OpenAI's `logprobs` object: the entries of Piece.logprobs.

    They keep their token ids, which OpenAI's do not have, only `with_ids`.
    """
    if with_ids:
        return {"content": entries}

    def without_id(entry: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in entry.items() if name != "token_id"}

    return {
        "content": [
            without_id(entry) | {"top_logprobs": [without_id(top) for top in entry["top_logprobs"]]}
            for entry in entries
        ]
    }


def extension(ended: Ended) -> dict[str, Any]:
    """Return what a message has that OpenAI's has not: boxes, if the model's answers mark some."""
    if ended.boxes is None:
        return {}
    image = ended.boxes.image
    return {"twinlens": {"boxes": [box_body(box, image) for box in ended.boxes.boxes]}}


def box_body(box: Box, image: int) -> dict[str, Any]:
    """Return a box in pixels of the image with this index: x1, y1, x2, y2, or four points."""
    is_quad = len(box.corners) == 4
    shape = {"quad": box.corners} if is_quad else {"box": [*box.corners[0], *box.corners[1]]}
    return {"ref": box.ref, "image": image} | shape


def whole_message(pieces: list[Piece]) -> dict[str, Any]:
    """Return the message of an answer. Its content is null if it has calls and no text."""
    text = "".join(piece.text for piece in pieces)
    calls = join_calls(part for piece in pieces for part in piece.tool_calls)
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": text or None, "tool_calls": list(map(call_body, calls))}


def call_body(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def call_deltas(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parts of calls as a stream has them."""
    return [call_delta(part) for part in parts if "id" in part or part["arguments"]]


def call_delta(part: dict[str, Any]) -> dict[str, Any]:
    if "id" not in part:
        return {"index": part["index"], "function": {"arguments": part["arguments"]}}
    function = {"name": part["name"], "arguments": part["arguments"]}
    return {"index": part["index"], "id": part["id"], "type": "function", "function": function}


class RunningUsage:
    """The usage of all answers to one prompt so far."""

    def __init__(self) -> None:
        self.usage = Usage()

    def note(self, event: GenerationEvent) -> None:
        """Count the tokens of an event."""
        match event:
            case Began(usage=prompt) if not self.usage.prompt_tokens:
                self.usage = prompt
            case Piece(token_ids=ids):
                count = self.usage.completion_tokens + len(ids)
                self.usage = msgspec.structs.replace(self.usage, completion_tokens=count)


class CompletionWriter:
    """Writes the bodies of one completion.

    `with_ids`, `with_logprobs`, `with_usage` and `with_timings` say what the client asked for
    besides the text. If it asked for `token_timestamps`, `token_times` collects those of each
    answer. `names_tool` says that it named the tool that the answer calls.
    """

    def __init__(
        self,
        request_id: str,
        model: str,
        *,
        with_ids: bool,
        with_logprobs: bool,
        with_usage: bool,
        with_running_usage: bool = False,
        with_timings: bool = False,
        token_times: list[TokenTimes] | None = None,
        names_tool: bool = False,
        names_by_id: bool = False,
    ) -> None:
        self.head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": model}
        self.with_ids = with_ids
        self.with_logprobs = with_logprobs
        self.with_usage = with_usage
        self.running = RunningUsage() if with_running_usage else None
        self.with_timings = with_timings
        self.token_times = token_times
        self.names_tool = names_tool
        self.names_by_id = names_by_id
        """Whether log-probabilities name tokens by their ids."""

    def note(self, event: GenerationEvent) -> None:
        """Note an event and when it arrived, before it is written."""
        if self.running:
            self.running.note(event)
        if self.token_times and not isinstance(event, Result | Conversion):
            self.token_times[event.choice].note(event)

    def whole(self, began: Began, pieces: list[Piece], ends: list[Ended]) -> dict[str, Any]:
        """Return the body of a completion that is not streamed.

        `pieces` and `ends` are those of all answers, in the order in which they came.
        """
        choices = [
            self._choice([piece for piece in pieces if piece.choice == end.choice], end)
            for end in sorted(ends, key=lambda end: end.choice)
        ]
        body = self.head | {
            "object": "chat.completion",
            "choices": choices,
            "usage": usage_body(ends[-1].usage),
            "timings": ends[-1].timings,
        }
        if self.token_times:
            body |= self.token_times[0].whole()
        return body | self._about_prompt(began)

    def _choice(self, pieces: list[Piece], ended: Ended) -> dict[str, Any]:
        """Return one answer of a completion that is not streamed."""
        logprobs = [entry for piece in pieces for entry in piece.logprobs]
        choice = {
            "index": ended.choice,
            "message": whole_message(pieces) | extension(ended),
            "logprobs": self._logprobs(logprobs),
            "finish_reason": self._finish_reason(ended),
        }
        if self.with_ids:
            choice["token_ids"] = [token for piece in pieces for token in piece.token_ids]
        if self.token_times and ended.choice:
            choice |= self.token_times[ended.choice].whole()
        return choice

    def first_chunk(self, began: Began) -> bytes:
        """Return the first chunk of an answer, which has the role and no text."""
        extra = self._about_prompt(began)
        if self.token_times:
            extra |= self.token_times[began.choice].first()
        return self._chunk(began.choice, {"role": "assistant", "content": ""}, **extra)

    def piece_chunk(self, piece: Piece) -> bytes:
        """Return the chunk of a piece, or nothing if it has nothing that the client asked for.

        Some clients count every chunk without text as a token.
        """
        calls = call_deltas(piece.tool_calls)
        if not (
            piece.text
            or calls
            or (self.with_logprobs and piece.logprobs)
            or (self.with_ids and piece.token_ids)
        ):
            return b""
        delta = {"content": piece.text} if piece.text or not calls else {}
        return self._chunk(
            piece.choice,
            delta | ({"tool_calls": calls} if calls else {}),
            logprobs=self._logprobs(piece.logprobs),
            token_ids=piece.token_ids,
            **self._new_times(piece.choice),
        )

    def last_chunks(self, ended: Ended) -> bytes:
        """Return the chunk with the finish reason of an answer.

        At the end of the last one, a chunk with the usage follows if it is asked for. The timings
        are in the later one.
        """
        extra = self._new_times(ended.choice)
        if self.with_timings and not self.with_usage:
            extra["timings"] = ended.timings
        delta = extension(ended)
        reason = self._finish_reason(ended)
        end = self._chunk(ended.choice, delta, finish_reason=reason, **extra)
        if not self.with_usage or not ended.is_last:
            return end
        totals = {"choices": [], "usage": usage_body(ended.usage), "timings": ended.timings}
        return end + sse_event(self.head | {"object": "chat.completion.chunk"} | totals)

    def _new_times(self, choice: int) -> dict[str, Any]:
        """Return the times of the tokens of an answer that no chunk had before."""
        return self.token_times[choice].next() if self.token_times else {}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        token_ids: list[int] | None = None,
        **extra: Any,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        if self.with_ids and token_ids is not None:
            choice["token_ids"] = token_ids
        usage: dict[str, Any] = {"usage": None} if self.with_usage else {}
        if self.running:
            usage = {"usage": usage_body(self.running.usage)}
        return sse_event(
            self.head | {"object": "chat.completion.chunk", "choices": [choice]} | usage | extra
        )

    def _finish_reason(self, ended: Ended) -> str:
        """Return the reason as OpenAI says it: the call of a named tool is like any other stop."""
        is_named_call = self.names_tool and ended.finish_reason == "tool_calls"
        return "stop" if is_named_call else ended.finish_reason

    def _logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        return logprobs_body(named_by_id(entries) if self.names_by_id else entries, self.with_ids)

    def _about_prompt(self, began: Began) -> dict[str, Any]:
        """Return what the client asked for about the prompt, with vLLM's names."""
        found: dict[str, Any] = {}
        if self.with_ids and not began.choice:
            found["prompt_token_ids"] = began.prompt_token_ids
        if began.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs_body(began.prompt_logprobs)
        return found
