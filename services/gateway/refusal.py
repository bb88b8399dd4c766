"""Answers to connections that never become a request."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus

from common.logs import get_logger


@dataclass(frozen=True)
class Refusal:
    """Why a connection is closed."""

    status: HTTPStatus
    message: str

    def log(self, request_id: str, client: str) -> None:
        """Write the log line of a request that never reaches the application."""
        get_logger().info(
            "refused",
            request_id=request_id,
            status=self.status.value,
            reason=self.message,
            client=client,
        )

    def response(self, headers: Iterable[tuple[str, str]] = ()) -> bytes:
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
            "connection: close\r\n"
        )
        head += "".join(f"{name}: {value}\r\n" for name, value in headers) + "\r\n"
        return head.encode() + body
