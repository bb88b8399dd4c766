"""The health port: /healthz and /readyz for an orchestrator's probes, /metrics for Prometheus."""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.client import LineTooLong
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, BinaryIO

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from common.logs import get_logger
from common.membership import READY, state_name
from common.process import CannotStart
from proto.twinlens.control.v1 import control_pb2

REQUEST_SECONDS = 5.0
"""How long a client may be silent."""
CONNECTION_SECONDS = 15.0
"""How long a connection may last."""
MAX_CONNECTIONS = 32
"""Connections at a time. A further one takes the place of the oldest one: a probe takes
milliseconds, so the oldest connection is not a probe."""
MAX_HEAD_BYTES = 16 * 1024
"""Request line and headers of one request."""
EMFILE_SECONDS = 0.5
"""The pause after a connection could not be accepted for want of descriptors."""
TEXT = "text/plain; charset=utf-8"


class Health:
    """The answers of the health port about one member."""

    def __init__(
        self,
        member: control_pb2.Member,
        load: Callable[[], tuple[int, int]],
        hung: Callable[[], bool] = lambda: False,
        registry: CollectorRegistry | None = None,
    ) -> None:
        """Answer about `member`, whose entry its owner keeps up to date.

        `load` returns (in_flight, queued). The metrics of the member are added to `registry`.
        """
        self._member = member
        self._hung = hung
        self._registry = registry or CollectorRegistry()
        self._registry.register(MemberCollector(member, load, hung))
        ProcessCollector(registry=self._registry)

    def answer(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Return status, content type and body."""
        match path.partition("?")[0]:
            case "/healthz":
                return reply("hung: its work makes no progress" if self._hung() else "")
            case "/readyz":
                return reply(self._not_ready())
            case "/metrics":
                return HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(self._registry)
            case _:
                return HTTPStatus.NOT_FOUND, TEXT, b"there are /healthz, /readyz and /metrics\n"

    def _not_ready(self) -> str:
        state = self._member.state
        if state == READY:
            return ""
        name = state_name(state)
        return f"{name}: {self._member.detail}" if self._member.detail else name


def reply(fault: str) -> tuple[HTTPStatus, str, bytes]:
    """Return the answer of a probe; an empty `fault` is good."""
    status = HTTPStatus.SERVICE_UNAVAILABLE if fault else HTTPStatus.OK
    return status, TEXT, f"{fault or 'ok'}\n".encode()


class MemberCollector(Collector):
    """The metrics of the member itself, read at each scrape."""

    def __init__(
        self,
        member: control_pb2.Member,
        load: Callable[[], tuple[int, int]],
        hung: Callable[[], bool],
    ) -> None:
        self._member = member
        self._load = load
        self._hung = hung

    def collect(self) -> Iterator[GaugeMetricFamily]:
        in_flight, queued = self._load()
        figures = {
            "ready": ("Whether the member takes work.", self._member.state == READY),
            "hung": ("Whether its work makes no progress.", self._hung()),
            "in_flight": ("Units (requests, items, answers) in progress.", in_flight),
            "queued": ("Units accepted and not yet begun.", queued),
            "expected_delay_seconds": (
                "gateway: time until the requests that wait have a first token; preprocess: what "
                "the items that wait there add to the delay of vision; vision: time until another "
                "item would begin; llm: time until the requests that wait have begun.",
                self._member.expected_delay,
            ),
            "credits": (
                "vision, llm: units of work that the member would accept now.",
                self._member.credits,
            ),
        }
        labels = {"role": self._member.role, "id": self._member.id, "group": self._member.group}
        for name, (text, value) in figures.items():
            family = GaugeMetricFamily(f"twinlens_member_{name}", text, labels=list(labels))
            family.add_metric(list(labels.values()), float(value))
            yield family


class HealthServer(ThreadingHTTPServer):
    """An HTTP server with threads of its own, so that a busy service answers at once.

    It listens on every interface, because probes come from outside.
    """

    daemon_threads = True

    def __init__(self, port: int, health: Health, watch: Callable[[], None] = lambda: None) -> None:
        self.health = health
        self._watch = watch
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, float] = {}
        """When each open connection began."""
        self.address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        try:
            super().__init__(("", port), Handler)
        except OSError as e:
            raise CannotStart(
                f"cannot listen on port {port} ({e.strerror}): free it or choose another "
                "--health-port"
            ) from e
        threading.Thread(target=self.serve_forever, name="health", daemon=True).start()

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # HTTPServer's own method asks the DNS for our name, which takes long if there is no DNS.
        TCPServer.server_bind(self)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            # The connection stays in the queue, so without a pause this would be tried all the
            # time.
            time.sleep(EMFILE_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer on a new thread. If there are too many, the oldest connection ends."""
        with self._lock:
            if len(self._connections) >= MAX_CONNECTIONS:
                oldest = next(iter(self._connections))
                del self._connections[oldest]
                end_connection(oldest)
            self._connections[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End the connections that last too long. This is called twice a second."""
        self._watch()
        now = time.monotonic()
        with self._lock:
            for connection, began in self._connections.items():
                if now - began > CONNECTION_SECONDS:
                    end_connection(connection)

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that hangs up is not our failure.
        if not isinstance(sys.exception(), ConnectionError):
            get_logger().exception("a health request failed")

    def close(self) -> None:
        self.shutdown()
        self.server_close()


def end_connection(connection: socket.socket) -> None:
    """End a connection under the thread that serves it, which then closes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class HeadReader:
    """Reads the lines of a request's head, up to a size."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = MAX_HEAD_BYTES
        self.close = file.close

    def readline(self, most: int) -> bytes:
        """Return the next line. Raise LineTooLong if the head is larger than MAX_HEAD_BYTES."""
        if self._left <= 0:
            raise LineTooLong("head")
        line = self._file.readline(min(most, self._left))
        self._left -= len(line)
        return line


class Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_SECONDS
    server: HealthServer

    def setup(self) -> None:
        super().setup()
        self.rfile: Any = HeadReader(self.rfile)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with the error's own text only: `message` would repeat what the client sent."""
        super().send_error(code)

    def do_GET(self) -> None:
        status, content_type, body = self.server.health.answer(self.path)
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        # The pid that a container's health check kills if this service hangs.
        self.send_header("x-pid", str(os.getpid()))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def version_string(self) -> str:
        return "twinlens"

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing, because probes come every few seconds."""


def serve_health(
    port: int,
    member: control_pb2.Member,
    load: Callable[[], tuple[int, int]],
    hung: Callable[[], bool] = lambda: False,
    registry: CollectorRegistry | None = None,
    watch: Callable[[], None] = lambda: None,
) -> HealthServer | None:
    """Open the health port, unless it is 0. `watch` is called twice a second.

    Raises
    ------
    CannotStart
        if the port cannot be opened.
    """
    return HealthServer(port, Health(member, load, hung, registry), watch) if port else None
