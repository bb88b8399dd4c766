"""HTTP for an orchestrator's probes and for Prometheus, on a port of its own: /healthz, /readyz,
/metrics."""

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

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
TEXT = "text/plain; charset=utf-8"


class Health:
    """What the probes ask, about one member."""

    def __init__(
        self,
        member: control_pb2.Member,
        load: Callable[[], tuple[int, int]],
        hung: Callable[[], bool] = lambda: False,
        registry: CollectorRegistry | None = None,
    ) -> None:
        """`member` is the entry that its owner keeps up to date, `load` gives (in_flight, queued).
        A registry that is given holds further metrics, and gets the member's."""
        self._member = member
        self._hung = hung
        self._registry = registry or CollectorRegistry()
        self._registry.register(MemberCollector(member, load, hung))
        ProcessCollector(registry=self._registry)

    def answer(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, content type and body."""
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
    status = HTTPStatus.SERVICE_UNAVAILABLE if fault else HTTPStatus.OK
    return status, TEXT, f"{fault or 'ok'}\n".encode()


class MemberCollector(Collector):
    """The member's own figures, read when they are asked for."""

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
            "in_flight": ("Units (requests, images) begun.", in_flight),
            "queued": ("Units accepted and not begun.", queued),
            "expected_delay_seconds": (
                "vision: until another image would be begun; preprocess: what images that wait "
                "there add.",
                self._member.expected_delay,
            ),
        }
        labels = {"role": self._member.role, "id": self._member.id, "group": self._member.group}
        for name, (text, value) in figures.items():
            family = GaugeMetricFamily(f"twinlens_member_{name}", text, labels=list(labels))
            family.add_metric(list(labels.values()), float(value))
            yield family


class HealthServer(ThreadingHTTPServer):
    """Answers from threads of its own, so that a busy service answers at once; on every interface,
    as probes come from outside."""

    daemon_threads = True

    def __init__(self, port: int, health: Health, watch: Callable[[], None] = lambda: None) -> None:
        self.health = health
        self.service_actions = watch  # type: ignore[method-assign]
        self.address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        try:
            super().__init__(("", port), Handler)
        except OSError as e:
            raise CannotStart(
                f"cannot listen on port {port} ({e.strerror}): free it, or give another "
                "--health-port"
            ) from e
        threading.Thread(target=self.serve_forever, name="health", daemon=True).start()

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # HTTPServer's asks the DNS for our name, which may take long where there is none.
        TCPServer.server_bind(self)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(
            sys.exception(), ConnectionError
        ):  # a prober that hangs up is its own affair
            get_logger().exception("a health request failed")

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_SECONDS
    server: HealthServer

    def do_GET(self) -> None:
        status, content_type, body = self.server.health.answer(self.path)
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        # Whom a container's health check kills when it hangs.
        self.send_header("x-pid", str(os.getpid()))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def version_string(self) -> str:
        return "twinlens"

    def log_message(self, format: str, *args: object) -> None:
        """Probes come every few seconds: none is worth a line."""


def serve_health(
    port: int,
    member: control_pb2.Member,
    load: Callable[[], tuple[int, int]],
    hung: Callable[[], bool] = lambda: False,
    registry: CollectorRegistry | None = None,
    watch: Callable[[], None] = lambda: None,
) -> HealthServer | None:
    """None for port 0: no health port is wanted. `watch` is called twice a second.

    Raises
    ------
    CannotStart
        where the port cannot be had.
    """
    return HealthServer(port, Health(member, load, hung, registry), watch) if port else None
