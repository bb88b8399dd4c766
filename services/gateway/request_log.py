"""The log line of a request that is refused, that fails, or that its client gives up: one for each.

An API server opens `one_line` around a request. Whoever sees why the request fails notes it there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import structlog

from common.errors import ServingError
from common.logs import get_logger

CLIENT_GONE = 499
"""The status of a request whose client hung up. It is nginx's, since HTTP has none."""
HUNG_UP = "the client hung up"


def log_abort(request_id: str, reason: str) -> None:
    """Write the line of a request that was answered whole, but not read."""
    get_logger().info("aborted", request_id=request_id, status=CLIENT_GONE, reason=reason)


class RequestEnd:
    """Why a request has no answer, or no whole one; nothing is known while all goes well."""

    def __init__(self, request_id: str = "") -> None:
        self.request_id = request_id
        self._status = 0
        self._is_left_out = False
        self._reason = ""
        self._fields: dict[str, str] = {}
        self._trace: dict[str, str] = {}

    def trace(self, trace_id: str) -> None:
        """Note the trace that has the request; its id may be empty."""
        self._trace = {"trace_id": trace_id} if trace_id else {}

    def leave_out(self) -> None:
        """Write no line: the request asks whether others would be refused."""
        self._is_left_out = True

    def fail(self, error: ServingError) -> None:
        """Note the error that ends the request. The first one counts."""
        self.refuse(error.http_status, error.message, code=error.code, stage=error.stage)

    def give_up(self, reason: str = HUNG_UP) -> None:
        """Note that the client is gone, unless the request has failed."""
        self.refuse(CLIENT_GONE, reason)

    def refuse(self, status: int, reason: str, **fields: str) -> None:
        """Note that the request is answered with this HTTP status and reason."""
        if not self._status:
            self._status = status
            self._reason = reason
            self._fields = fields

    def write(self) -> None:
        """Write the line, if there is something to say."""
        if not self._status or self._is_left_out:
            return
        log = get_logger()
        fields = self._trace | self._fields
        if self._status == CLIENT_GONE:
            log.info("aborted", status=self._status, reason=self._reason, **fields)
        elif self._status < 500:
            log.info("refused", status=self._status, reason=self._reason, **fields)
        else:
            log.warning("failed", status=self._status, reason=self._reason, **fields)


_end = ContextVar[RequestEnd | None]("request_end", default=None)


@contextmanager
def one_line(request_id: str) -> Iterator[RequestEnd]:
    """Write the line of a request after the block. Tasks that the block starts share its end."""
    end = RequestEnd(request_id)
    token = _end.set(end)
    with structlog.contextvars.bound_contextvars(request_id=request_id):
        try:
            yield end
        finally:
            end.write()
            _end.reset(token)


def current_end() -> RequestEnd:
    """Return the end of the request that the caller works on; one of its own if there is none."""
    return _end.get() or RequestEnd()
