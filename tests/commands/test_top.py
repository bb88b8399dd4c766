"""`twinlens top` against a real controller behind a gateway's gRPC port."""

import argparse
import asyncio
import io
import os
import pty
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from rich.console import Console

from common.membership import DEAD, READY
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services.commands.top import Look, Watched, add_top_arguments, picture, read_counters, top
from tests.commands.scripted_server import Script, response, scripted_server
from tests.commands.test_control import some_members
from tests.gateway.fake_core import FakeCore, http_server
from tests.loopback import free_port
from tests.policy.sources import ROOT

METRICS = b"""# TYPE twinlens_gateway_requests_total counter
twinlens_gateway_requests_total{outcome="stop"} 5.0
twinlens_gateway_requests_total{outcome="abort"} 1.0
# TYPE twinlens_gateway_generation_tokens_total counter
twinlens_gateway_generation_tokens_total 100.0
"""


def member(id: str, role: str, **fields: Any) -> control_pb2.Member:
    return control_pb2.Member(id=id, role=role, **{"state": READY} | fields)


def shown(watched: Watched, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        console.print(picture(watched))
    return captured.get()


class Controls(control_pb2_grpc.ControlServiceServicer):
    """Lists a vision replica with one more image in flight each time it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    async def ListMembers(self, request: Any, context: Any) -> control_pb2.ListMembersResponse:
        self.asked += 1
        return control_pb2.ListMembersResponse(
            members=[member("vision-0-abc", "vision", in_flight=40 + self.asked)]
        )


@pytest.fixture
async def controls() -> AsyncIterator[tuple[Controls, str]]:
    import grpc

    servicer = Controls()
    server = grpc.aio.server()
    control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, server)
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield servicer, target
    await server.stop(None)


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser("twinlens top")
    add_top_arguments(parser)
    return parser.parse_args(given)


def test_stages_add_up_their_members_and_members_are_in_the_order_of_requests() -> None:
    watched = Watched("host:1", "http://host/v1")
    watched.now = Look(
        [
            member("llm-0", "llm", in_flight=3, credits=9),
            member("vision-0", "vision", in_flight=1, queued=2, credits=4, expected_delay=0.5),
            member("vision-1", "vision", in_flight=1, credits=6, expected_delay=0.25),
            member("vision-2", "vision", hung=True, credits=7, detail="stuck [red]"),
            member("vision-3", "vision", state=DEAD, in_flight=8),
        ]
    )
    lines = [line.split() for line in shown(watched).splitlines()]
    assert ["vision", "2", "of", "3", "ready", "2", "2", "10", "0.25", "s"] in lines
    assert ["llm", "1", "3", "9"] in lines
    ids = [line[0] for line in lines if line and "-" in line[0]]
    assert ids[:5] == ["vision-0", "vision-1", "vision-2", "vision-3", "llm-0"]
    assert ["vision-2", "hung", "7"] in lines
    assert ["vision-2:", "stuck", "[red]"] in lines
    assert "host:1" in shown(watched) and "- requests/s" in shown(watched)


def test_rates_come_from_the_changes_of_counters() -> None:
    watched = Watched("host:1", "http://host/v1")
    watched.before = Look(counters={"a": 10.0, "b": 5.0}, at=100.0)
    watched.now = Look(counters={"a": 16.0, "b": 4.0}, at=102.0)
    assert watched.rate("a") == 3.0
    assert watched.rate("b") is None  # the gateway was restarted
    assert watched.rate("c") is None


async def test_counters_are_read_from_the_gateways_metrics() -> None:
    async with scripted_server(Script([response(200, METRICS)])) as url:
        found = await asyncio.to_thread(read_counters, url)
    assert found == {
        "twinlens_gateway_requests_total": 6.0,
        "twinlens_gateway_generation_tokens_total": 100.0,
    }
    assert read_counters(f"http://127.0.0.1:{free_port()}/metrics") == {}
    for other in (response(404, METRICS), response(200, b"other_total 1.0\n")):
        async with scripted_server(Script([other])) as url:
            assert await asyncio.to_thread(read_counters, url) == {}


async def test_the_counters_have_the_names_of_our_gateway() -> None:
    async with http_server(FakeCore()) as port:
        page = f"http://127.0.0.1:{port}/metrics"
        found = await asyncio.to_thread(read_counters, page)
    assert found == {
        "twinlens_gateway_requests_total": 0.0,
        "twinlens_gateway_generation_tokens_total": 0.0,
    }


def test_many_members_fit_into_80_columns() -> None:
    watched = Watched("host:1", "http://host/v1")
    listed = [member(m["id"], m["role"]) for m in some_members()]
    for found, described in zip(listed, some_members(), strict=True):
        found.detail = described["detail"]
        found.queued = described["queued"]
        found.expected_delay = 1234.5
        found.credits = 1000
    watched.now = Look(listed)
    text = shown(watched)
    assert max(map(len, text.splitlines())) <= 80
    assert all(found.id[-20:] in text for found in listed)


async def test_it_prints_once_into_a_pipe(
    controls: tuple[Controls, str], capsys: pytest.CaptureFixture[str]
) -> None:
    servicer, target = controls
    nowhere = f"http://127.0.0.1:{free_port()}/v1"
    assert await asyncio.to_thread(top, arguments("--grpc", target, "--url", nowhere)) == 0
    assert "vision-0-abc" in capsys.readouterr().out
    assert servicer.asked == 1


def test_a_gateway_that_is_not_there_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert top(arguments("--grpc", f"127.0.0.1:{free_port()}")) == 1
    assert capsys.readouterr().err.startswith("twinlens: nothing answers at 127.0.0.1")


async def test_a_gateway_that_goes_away_is_shown_and_what_was_seen_stays(
    controls: tuple[Controls, str],
) -> None:
    _, target = controls
    watched = Watched(target, "http://127.0.0.1:1/v1")
    await asyncio.to_thread(watched.look)
    watched.target = f"127.0.0.1:{free_port()}"
    await asyncio.to_thread(watched.look_again)
    text = " ".join(shown(watched).split())
    assert "nothing answers at" in text and "looking again" in text and "vision-0-abc" in text
    watched.target = target
    await asyncio.to_thread(watched.look_again)
    assert "looking again" not in shown(watched)


async def test_it_refreshes_in_a_terminal_until_q(controls: tuple[Controls, str]) -> None:
    servicer, target = controls
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "services.cli", "top", "--grpc", target, "--interval", "0.01"]
    environment = dict(os.environ) | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdin=its, stdout=its, stderr=its, env=environment
    )
    os.close(its)
    reading = asyncio.create_task(asyncio.to_thread(read_until, ours, b" 43 "))
    assert b"vision-0-abc" in await reading
    os.write(ours, b"\x1b[Aq")  # an arrow key sends three bytes at once
    draining = asyncio.create_task(asyncio.to_thread(read_until, ours, b""))
    assert await process.wait() == 0
    await draining
    os.close(ours)
    assert servicer.asked >= 3


def read_until(terminal: int, wanted: bytes) -> bytes:
    """Return what a terminal shows up to some text, or up to its end."""
    seen = b""
    while not wanted or wanted not in seen:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # Linux says so when the other end is closed
            return seen
        if not part:
            return seen
        seen += part
    return seen
