"""Answers to connections that never become a request."""

import json
from dataclasses import dataclass
from http import HTTPStatus


@dataclass(frozen=True)
class Refusal:
    """Why a connection is closed."""

    status: HTTPStatus
    message: str

    def response(self) -> bytes:
        """Return the whole HTTP response, with OpenAI's error object as its body."""
        is_busy = self.status == HTTPStatus.TOO_MANY_REQUESTS
        error = {
            "message": self.message,
            "type": "rate_limit_error" if is_busy else "invalid_request_error",
            "param": None,
            "code": self.status.phrase.lower().replace(" ", "_"),
        }
        body = json.dumps({"error": error}).encode()
        head = (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        return head.encode() + body
