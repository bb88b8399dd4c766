"""The health port, asked over real sockets, by hand and by a container's health check."""

import contextlib
import os
import resource
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from common import health
from common.health import Handler, Health, HealthServer, serve_health
from common.membership import DRAINING, READY, STARTING
from common.process import CannotStart
from proto.twinlens.control.v1 import control_pb2
from tests.loopback import free_port
from tests.policy.sources import ROOT
from tests.system.running import lives

DEADLINE = 30.0


class Asked:
    """A health port and what it is told."""

    def __init__(self) -> None:
        self.member = control_pb2.Member(
            id="vision-1", role="vision", state=STARTING, detail="loading weights, 40%"
        )
        self.load = (0, 0)
        self.hung = False
        self.registry = CollectorRegistry()
        self.server = HealthServer(
            0, Health(self.member, lambda: self.load, lambda: self.hung, self.registry)
        )

    def get(self, path: str, host: str = "127.0.0.1", method: str = "GET") -> tuple[int, str]:
        request = urllib.request.Request(
            f"http://{host}:{self.server.server_address[1]}{path}", method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@pytest.fixture
def asked() -> Iterator[Asked]:
    asked = Asked()
    yield asked
    asked.server.close()


def test_a_member_that_loads_is_healthy_and_not_ready_and_says_why(asked: Asked) -> None:
    assert asked.get("/healthz") == (200, "ok\n")
    assert asked.get("/readyz") == (503, "starting: loading weights, 40%\n")


def test_a_ready_member_is_ready(asked: Asked) -> None:
    asked.member.state = READY
    asked.member.detail = ""
    assert asked.get("/readyz") == (200, "ok\n")


def test_a_draining_member_is_healthy_and_gets_nothing_new(asked: Asked) -> None:
    asked.member.state = DRAINING
    asked.member.detail = ""
    assert asked.get("/healthz")[0] == 200
    assert asked.get("/readyz") == (503, "draining\n")


def test_a_hung_member_is_told_by_the_liveness_probe(asked: Asked) -> None:
    asked.hung = True
    status, said = asked.get("/healthz")
    assert status == 503 and "hung" in said
    assert (
        'twinlens_member_hung{group="",id="vision-1",role="vision"} 1.0' in asked.get("/metrics")[1]
    )


def test_metrics_tell_the_load_of_the_moment_and_what_the_service_counts(asked: Asked) -> None:
    Counter("twinlens_things", "Things.", registry=asked.registry).inc(3)
    asked.load = (1, 7)
    asked.member.expected_delay = 2.5
    status, text = asked.get("/metrics")
    assert status == 200
    assert 'twinlens_member_in_flight{group="",id="vision-1",role="vision"} 1.0' in text
    assert 'twinlens_member_queued{group="",id="vision-1",role="vision"} 7.0' in text
    assert (
        'twinlens_member_expected_delay_seconds{group="",id="vision-1",role="vision"} 2.5' in text
    )
    assert "twinlens_things_total 3.0" in text and "process_resident_memory_bytes" in text


def test_other_paths_are_not_found_and_a_query_is_no_other_path(asked: Asked) -> None:
    assert asked.get("/")[0] == 404
    assert asked.get("/healthz?verbose")[0] == 200


def test_head_has_no_body(asked: Asked) -> None:
    assert asked.get("/healthz", method="HEAD") == (200, "")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_it_answers_on_ipv6_as_well(asked: Asked) -> None:
    assert asked.get("/healthz", host="[::1]")[0] == 200


def test_one_who_connects_and_says_nothing_keeps_no_probe_waiting(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "timeout", None)
    with socket.create_connection(("127.0.0.1", asked.server.server_address[1])):
        assert asked.get("/healthz")[0] == 200


def test_connections_that_say_nothing_never_keep_a_probe_out(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An orchestrator would kill a service whose probe is not answered."""
    monkeypatch.setattr(health, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(Handler, "timeout", None)
    address = ("127.0.0.1", asked.server.server_address[1])
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(address)) for _ in range(3)]
        assert asked.get("/healthz")[0] == 200
        held[0].settimeout(DEADLINE)
        assert held[0].recv(1) == b""
        held[2].sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        held[2].settimeout(DEADLINE)
        assert b"200 OK" in held[2].recv(1000)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"x" * 20_000,
        b"GET / HTTP/1.0\r\nX: " + b"y" * 20_000,
        b"GET / HTTP/1.0\r\n" + b"X: y\r\n" * 5000,
        b"xxxnonsense\r\n\r\n",
    ],
    ids=["path", "header", "headers", "nonsense"],
)
def test_a_head_is_bounded_and_never_repeated(asked: Asked, head: bytes) -> None:
    address = ("127.0.0.1", asked.server.server_address[1])
    with socket.create_connection(address) as client:
        client.settimeout(DEADLINE)
        with contextlib.suppress(ConnectionError):
            client.sendall(head)
        with contextlib.suppress(ConnectionError):
            answer = client.makefile("rb").read(10_000)
            assert b"xxx" not in answer
            assert not answer or b" 431 " in answer or b" 400 " in answer
    assert asked.get("/healthz")[0] == 200


def test_a_connection_that_lasts_too_long_is_ended(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "CONNECTION_SECONDS", 0.0)
    with socket.create_connection(("127.0.0.1", asked.server.server_address[1])) as slow:
        slow.settimeout(DEADLINE)
        slow.sendall(b"GET /healthz HTTP/1.0\r\nX-A: ")
        assert slow.recv(1) == b""


def test_want_of_descriptors_does_not_end_it(asked: Asked) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as client:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            client.connect(("127.0.0.1", asked.server.server_address[1]))
            with pytest.raises(OSError, match="Too many open files"):
                asked.server.get_request()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert asked.get("/healthz")[0] == 200


def test_a_port_that_is_taken_is_named(asked: Asked) -> None:
    port = asked.server.server_address[1]
    with pytest.raises(CannotStart, match=f"port {port} .*--health-port"):
        serve_health(port, asked.member, lambda: (0, 0))


def test_port_0_is_no_health_port(asked: Asked) -> None:
    assert serve_health(0, asked.member, lambda: (0, 0)) is None


PROGRAM = """
import sys
from common.health import Health, HealthServer
from proto.twinlens.control.v1 import control_pb2
health = Health(control_pb2.Member(state=2), lambda: (0, 0), lambda: sys.argv[2] == "hung")
server = HealthServer(int(sys.argv[1]), health)
print("listens", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["works", "hung"])
def service(request: pytest.FixtureRequest) -> Iterator[tuple[str, int, subprocess.Popen[str]]]:
    """A process with a health port: how it is, its port, and itself."""
    port = free_port()
    command = [sys.executable, "-c", PROGRAM, str(port), request.param]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "listens\n"
        yield request.param, port, process
        process.kill()


def probe(port: int) -> tuple[int, str]:
    environment = os.environ | {"TWINLENS_HEALTH_PORT": str(port)}
    done = subprocess.run(
        [ROOT / "scripts" / "probe"], env=environment, capture_output=True, text=True, timeout=30
    )
    return done.returncode, done.stdout


def test_a_containers_check_kills_the_service_that_hangs_and_no_other(
    service: tuple[str, int, subprocess.Popen[str]],
) -> None:
    how, port, process = service
    assert probe(port) == ((0, "ok\n") if how == "works" else (1, "hangs: killed\n"))
    if how == "hung":
        assert process.wait(30) == -9
    assert lives(process.pid) == (how == "works")


def test_a_containers_check_fails_until_the_service_is_ready_and_says_why(asked: Asked) -> None:
    port = asked.server.server_address[1]
    assert probe(port) == (1, "starting: loading weights, 40%\n")
    asked.member.state = READY
    assert probe(port) == (0, "ok\n")
    assert probe(free_port()) == (1, "nobody answers\n")
