"""The body of a response, whole or as events of a stream.

One state machine makes both: a whole response is what the events have built up at the end.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

from common.errors import ServingError
from common.messages import Usage
from services.gateway import sse
from services.gateway.generation import Ended, Piece
from services.gateway.responses.schema import ResponsesRequest

INCOMPLETE = {"length": "max_output_tokens", "repetition": "repetition"}
"""Why a response is incomplete, by the finish reason of its answer. Others complete it."""


ERROR_CODES = {
    "rate_limit_error": "rate_limit_exceeded",
    "server_error": "server_error",
    "invalid_request_error": "invalid_prompt",
}
"""The `code` of a failed response by the type of its error. There are no other codes for texts."""


class ResponseWriter:
    """Builds a response from the events of its answer, and writes the events of its stream."""

    def __init__(self, request_id: str, model: str, request: ResponsesRequest) -> None:
        self._request_id = request_id
        self._with_logprobs = request.wants_logprobs
        self._num_events = 0
        self._open: dict[str, Any] | None = None
        """The item that grows, a message or a call; None if the next piece begins one."""
        self.response = resource(request_id, model, request)

    @property
    def _items(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.response["output"]
        return items

    def begin(self) -> bytes:
        """Return the events before the first piece."""
        return self._snapshot("response.created") + self._snapshot("response.in_progress")

    def piece(self, piece: Piece) -> bytes:
        """Return the events of a piece, perhaps none."""
        text = self._add_text(piece) if piece.text else b""
        return text + b"".join(map(self._add_to_call, piece.tool_calls))

    def end(self, ended: Ended) -> bytes:
        """Return the last events of an answer that has its end."""
        reason = INCOMPLETE.get(ended.finish_reason)
        status = "incomplete" if reason else "completed"
        empty = b"" if self._items else self._begin_message()
        closed = empty + self._close(status)
        if self._items[-1]["type"] == "message":
            self._items[-1] |= sse.extension(ended)
        self.response |= {
            "status": status,
            "completed_at": None if reason else int(time.time()),
            "incomplete_details": {"reason": reason} if reason else None,
            "usage": usage_body(ended.usage),
            "timings": ended.timings,
        }
        return closed + self._snapshot(f"response.{status}")

    def fail(self, error: ServingError) -> bytes:
        """Return the last event of an answer that fails after its begin."""
        body = sse.error_body(error)["error"]
        code = ERROR_CODES[sse.error_type(error)]
        self.response |= {"status": "failed", "error": body | {"code": code}}
        return self._snapshot("response.failed")

    # Messages

    def _begin_message(self) -> bytes:
        item: dict[str, Any] = {
            "type": "message",
            "id": f"msg_{self._request_id}_{len(self._items)}",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        event = self._begin_item(item)
        part: dict[str, Any] = {
            "type": "output_text",
            "text": "",
            "annotations": [],
            "logprobs": [],
        }
        added = self._event("response.content_part.added", self._place(content_index=0), part=part)
        item["content"] = [part]
        return event + added

    def _add_text(self, piece: Piece) -> bytes:
        begun = b""
        if self._open is None or self._open["type"] != "message":
            begun = self._close("completed") + self._begin_message()
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += piece.text
        logprobs = logprobs_body(piece.logprobs) if self._with_logprobs else []
        part["logprobs"] += logprobs
        place = self._place(content_index=0)
        delta = {"delta": piece.text, "logprobs": logprobs}
        return begun + self._event("response.output_text.delta", place, **delta)

    def _end_message(self, item: dict[str, Any]) -> bytes:
        part = item["content"][0]
        place = self._place(content_index=0)
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        text_done = self._event("response.output_text.done", place, **done)
        return text_done + self._event("response.content_part.done", place, part=part)

    # Calls of tools

    def _add_to_call(self, part: dict[str, Any]) -> bytes:
        begun = b""
        if "id" in part:
            call = {
                "type": "function_call",
                "id": f"fc_{self._request_id}_{len(self._items)}",
                "call_id": part["id"],
                "name": part["name"],
                "arguments": "",
                "status": "in_progress",
            }
            begun = self._close("completed") + self._begin_item(call)
        arguments = part.get("arguments", "")
        if arguments:
            assert self._open is not None
            self._open["arguments"] += arguments
            event = "response.function_call_arguments.delta"
            begun += self._event(event, self._place(), delta=arguments)
        is_malformed = part.get("withdrawn", False)
        return begun + self._close("incomplete") if is_malformed else begun

    # Items

    def _begin_item(self, item: dict[str, Any]) -> bytes:
        self._items.append(item)
        self._open = item
        index = {"output_index": len(self._items) - 1}
        return self._event("response.output_item.added", index, item=item)

    def _close(self, status: str) -> bytes:
        """Return the events that end the open item, if there is one."""
        item = self._open
        if item is None:
            return b""
        item["status"] = status
        if item["type"] == "message":
            done = self._end_message(item)
        else:
            event = "response.function_call_arguments.done"
            done = self._event(event, self._place(), arguments=item["arguments"])
        self._open = None
        index = {"output_index": len(self._items) - 1}
        return done + self._event("response.output_item.done", index, item=item)

    def _place(self, **more: Any) -> dict[str, Any]:
        """Return the fields that name the open item in events."""
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._items) - 1} | more

    def _snapshot(self, kind: str) -> bytes:
        return self._event(kind, {}, response=self.response)

    def _event(self, kind: str, place: dict[str, Any], **more: Any) -> bytes:
        number = self._num_events
        self._num_events += 1
        data = {"type": kind, "sequence_number": number} | place | more
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        return f"event: {kind}\ndata: {text}\n\n".encode()


def resource(request_id: str, model: str, request: ResponsesRequest) -> dict[str, Any]:
    """Return a response that has just begun."""
    text = request.text
    format = text.format if text and text.format else None
    tools = [tool.model_dump() for tool in request.tools or []]
    return {
        "id": f"resp_{request_id}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "incomplete_details": None,
        "error": None,
        "model": model,
        "previous_response_id": None,
        "instructions": request.instructions,
        "output": [],
        "tools": tools,
        "tool_choice": request.tool_choice or "auto",
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "truncation": request.truncation or "disabled",
        "text": {
            "format": format.model_dump(by_alias=True, exclude_none=True)
            if format
            else {"type": "text"},
            "verbosity": "medium",
        },
        "temperature": given(request.temperature, 1.0),
        "top_p": given(request.top_p, 1.0),
        "presence_penalty": given(request.presence_penalty, 0.0),
        "frequency_penalty": given(request.frequency_penalty, 0.0),
        "top_logprobs": request.top_logprobs or 0,
        "reasoning": None,
        "usage": None,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "store": False,
        "background": False,
        "service_tier": "default",
        "metadata": request.metadata or {},
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
        "user": request.user,
    }


def given(value: float | None, default: float) -> float:
    return default if value is None else value


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
            "image_tokens": usage.image_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def logprobs_body(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    content = sse.logprobs_body(list(entries), with_ids=False)["content"]
    assert isinstance(content, list)
    return [with_bytes(entry) for entry in content]


def with_bytes(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry whose `bytes` is a list, which a response must have."""
    tops = [with_bytes(top) for top in entry.get("top_logprobs", ())]
    found = entry | {"bytes": entry.get("bytes") or list(entry["token"].encode())}
    return found | ({"top_logprobs": tops} if "top_logprobs" in entry else {})
