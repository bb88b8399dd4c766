"""An answer as OpenAI's clients read it: whole, or as server-sent events."""

import json
import time
from typing import Any

from common.errors import ServingError
from common.messages import Usage
from services.gateway.generation import Began, Ended, Piece

# "\n\n" and nothing else between events: a widely used benchmark splits there and loses what comes
# with "\r\n".
DONE = b"data: [DONE]\n\n"

ERROR_CODES = {
    "InvalidRequest": "invalid_request",
    "UnreadableImage": "unreadable_image",
    "TooLarge": "too_large",
    "NotFound": "model_not_found",
    "Exhausted": "rate_limit_exceeded",
    "Unavailable": "unavailable",
    "DeadlineExceeded": "deadline_exceeded",
    "Internal": "internal_error",
}


def event(data: dict[str, Any]) -> bytes:
    return (
        b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


def error_body(error: ServingError) -> dict[str, Any]:
    kind = (
        "rate_limit_error"
        if error.http_status == 429
        else "server_error"
        if error.http_status >= 500
        else "invalid_request_error"
    )
    body = {
        "message": error.message,
        "type": kind,
        "param": getattr(error, "param", None),
        "code": ERROR_CODES[error.code],
    }
    where = {"stage": error.stage, "image": error.item}
    return {
        "error": body | {name: value for name, value in where.items() if value not in ("", None)}
    }


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


def logprobs_body(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """OpenAI's entries know no token ids."""

    def public(entry: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in entry.items() if name != "token_id"}

    return {
        "content": [
            public(entry) | {"top_logprobs": [public(top) for top in entry["top_logprobs"]]}
            for entry in entries
        ]
    }


class Answer:
    """One completion's bodies. `with_ids` and `with_logprobs` say what the client asked for beside
    the text."""

    def __init__(
        self, request_id: str, model: str, *, with_ids: bool, with_logprobs: bool, with_usage: bool
    ) -> None:
        self.head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": model}
        self.with_ids = with_ids
        self.with_logprobs = with_logprobs
        self.with_usage = with_usage

    def whole(self, began: Began, pieces: list[Piece], ended: Ended) -> dict[str, Any]:
        logprobs = [entry for piece in pieces for entry in piece.logprobs]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(piece.text for piece in pieces)},
            "logprobs": logprobs_body(logprobs) if self.with_logprobs else None,
            "finish_reason": ended.finish_reason,
        }
        if self.with_ids:
            choice["token_ids"] = [token for piece in pieces for token in piece.token_ids]
        body = self.head | {
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage_body(ended.usage),
            "timings": ended.timings,
        }
        return body | self.prompt_ids(began)

    def first(self, began: Began) -> bytes:
        """The role comes before any text, in a chunk of its own."""
        return self.chunk({"role": "assistant", "content": ""}, **self.prompt_ids(began))

    def piece(self, piece: Piece) -> bytes:
        """Empty where the client would learn nothing: some count every chunk without text as a
        token."""
        if not (
            piece.text
            or (self.with_logprobs and piece.logprobs)
            or (self.with_ids and piece.token_ids)
        ):
            return b""
        logprobs = logprobs_body(piece.logprobs) if self.with_logprobs else None
        return self.chunk({"content": piece.text}, logprobs=logprobs, token_ids=piece.token_ids)

    def last(self, ended: Ended) -> bytes:
        end = self.chunk({}, finish_reason=ended.finish_reason)
        if not self.with_usage:
            return end
        totals = {"choices": [], "usage": usage_body(ended.usage), "timings": ended.timings}
        return end + event(self.head | {"object": "chat.completion.chunk"} | totals)

    def chunk(
        self,
        delta: dict[str, str],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        token_ids: list[int] | None = None,
        **extra: Any,
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        if self.with_ids and token_ids is not None:
            choice["token_ids"] = token_ids
        usage = {"usage": None} if self.with_usage else {}
        return event(
            self.head | {"object": "chat.completion.chunk", "choices": [choice]} | usage | extra
        )

    def prompt_ids(self, began: Began) -> dict[str, Any]:
        return {"prompt_token_ids": began.prompt_token_ids} if self.with_ids else {}
