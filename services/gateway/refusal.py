"""Answers to connections that never become a request."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus

from common.logs import get_logger
from services.gateway.limits import (
    HEAD_SECONDS,
    MAX_CHUNK_EXTENSION_BYTES,
    MAX_CHUNKS,
    MAX_HEAD_BYTES,
    MAX_PIPELINED,
)


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


MALFORMED = Refusal(HTTPStatus.BAD_REQUEST, "this is not a valid HTTP request")
HTTP2 = Refusal(
    HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "this port speaks HTTP/1.1, not HTTP/2 from the start"
)
LONG_HEAD = Refusal(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    f"the request line and headers, or the trailers, have more than {MAX_HEAD_BYTES} bytes",
)
LONG_EXTENSIONS = Refusal(
    HTTPStatus.BAD_REQUEST,
    f"the chunk extensions have more than {MAX_CHUNK_EXTENSION_BYTES} bytes",
)
MANY_CHUNKS = Refusal(
    HTTPStatus.BAD_REQUEST, f"the body has more than {MAX_CHUNKS} chunks; send larger ones"
)
MANY_PIPELINED = Refusal(
    HTTPStatus.BAD_REQUEST, f"more than {MAX_PIPELINED} requests wait on this connection"
)
SLOW_HEAD = Refusal(
    HTTPStatus.REQUEST_TIMEOUT, f"the headers were not complete after {HEAD_SECONDS:g} seconds"
)
