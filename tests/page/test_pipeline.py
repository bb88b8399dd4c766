"""What the page is told of the pipeline and of requests, over HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from starlette.testclient import TestClient

from common.membership import DEAD, READY, STARTING
from common.messages import HandedOver, ItemsLeft
from common.settings import GatewaySettings
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from services.gateway.servers import ApiServers, start_api_servers
from services.gateway.ui.endpoints import Ui
from services.gateway.ui.pipeline import MAX_SHOWN, stage_body
from tests.gateway.builders import Gateway, delta, request, rest, routed
from tests.loopback import free_port

OWN_ID = "0123456789abcdef" * 2


def member(member_id: str, role: str = "vision", **fields: Any) -> control_pb2.Member:
    return control_pb2.Member(**{"id": member_id, "role": role, "state": READY} | fields)


class Controller(control_pb2_grpc.ControlServiceServicer):
    members = [
        member("vision-1", in_flight=1, queued=2, credits=1, expected_delay=0.5, pid=7, host="h"),
        member("vision-0", state=DEAD, detail="what it did last"),
        member("llm-0", "llm", address="tcp://10.0.0.1:5555"),
        member("controller", "controller"),
    ]

    async def ListMembers(self, request: Any, context: Any) -> control_pb2.ListMembersResponse:
        return control_pb2.ListMembersResponse(members=self.members)


@pytest.fixture
async def controller() -> AsyncIterator[str]:
    server = grpc.aio.server()
    control_pb2_grpc.add_ControlServiceServicer_to_server(Controller(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@asynccontextmanager
async def serving(
    gateway: Gateway, controller: str, **settings: Any
) -> AsyncIterator[tuple[ApiServers, int]]:
    ports = [free_port("127.0.0.1") for _ in range(2)]
    chosen = GatewaySettings(
        controller=controller, http_port=ports[0], grpc_port=ports[1], **settings
    )
    core = gateway.core
    async with asyncio.timeout(30), start_api_servers(chosen, MeasuredCore(core), core) as servers:
        yield servers, ports[0]


class Watching:
    """A client that reads the feed."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> "Watching":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(b"GET /ui/events HTTP/1.1\r\nhost: x\r\n\r\n")
        self.head = await self.reader.readuntil(b"\r\n\r\n")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def next(self) -> dict[str, Any]:
        while not (line := await self.reader.readline()).startswith(b"data: "):
            assert line, "the feed ended"
        return json.loads(line[6:])


async def test_the_feed_shows_the_stages_with_their_members_and_the_gateway(
    controller: str,
) -> None:
    gateway = Gateway()
    async with serving(gateway, controller) as (_, port), Watching(port) as page:
        assert b"text/event-stream" in page.head
        shown = await page.next()
    assert (shown["model"], shown["tasks"], shown["is_current"]) == ("tiny", ["generate"], True)
    roles = [stage["role"] for stage in shown["stages"]]
    assert roles == ["gateway", "preprocess", "vision", "llm", "detokenizer"]
    vision = shown["stages"][2]
    assert (vision["ready"], vision["in_flight"], vision["queued"]) == (1, 1, 2)
    assert vision["members"] == [
        {
            "id": "vision-0",
            "state": "dead",
            "detail": "",
            "hung": False,
            "in_flight": 0,
            "queued": 0,
            "credits": 0,
            "expected_delay": 0.0,
            "rank": 0,
        },
        {
            "id": "vision-1",
            "state": "ready",
            "detail": "",
            "hung": False,
            "in_flight": 1,
            "queued": 2,
            "credits": 1,
            "expected_delay": 0.5,
            "rank": 0,
        },
    ]
    assert "10.0.0.1" not in json.dumps(shown), "addresses are nobody's business"


async def test_a_change_is_shown_at_once(controller: str) -> None:
    gateway = Gateway()
    async with serving(gateway, controller) as (_, port), Watching(port) as page:
        assert "first_token_seconds" in (await page.next())["gateway"]
        async with gateway.core.generate(request()) as events:
            gateway.on_event(routed(), delta(0, [10], "a"))
            gateway.core.on_members([])
            shown = (await page.next())["gateway"]
            assert (shown["in_flight"], shown["waiting"]) == (1, 0)
            assert 0 < shown["first_token_seconds"] < 30
            gateway.on_event(delta(1, [11], "b", "stop"))
            await rest(events)


async def test_a_request_for_the_head_of_the_feed_ends() -> None:
    gateway = Gateway()
    async with serving(gateway, "127.0.0.1:1") as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HEAD /ui/events HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
    assert b"text/event-stream" in answer


async def test_without_a_controller_the_last_known_members_are_shown() -> None:
    gateway = Gateway()
    gateway.core.on_members([member("vision-1")])
    async with serving(gateway, "127.0.0.1:1") as (_, port), Watching(port) as page:
        shown = await page.next()
    assert not shown["is_current"]
    assert [m["id"] for m in shown["stages"][2]["members"]] == ["vision-1"]


async def test_draining_ends_the_feeds(controller: str) -> None:
    gateway = Gateway()
    async with serving(gateway, controller) as (servers, port), Watching(port) as page:
        await page.next()
        idle = asyncio.Event()
        idle.set()
        draining = asyncio.create_task(servers.drain(idle))
        while await page.reader.readline():
            pass
        await draining


async def test_the_page_can_be_switched_off(controller: str) -> None:
    async with serving(Gateway(), controller, ui=False) as (_, port), Watching(port) as page:
        assert page.head.startswith(b"HTTP/1.1 404")


def test_of_many_members_those_that_are_not_ready_are_shown() -> None:
    members = [member(f"vision-{n:03}") for n in range(MAX_SHOWN)]
    body = stage_body("vision", [*members, member("vision-new", state=STARTING)])
    assert (len(body["members"]), body["hidden"], body["ready"]) == (MAX_SHOWN, 1, MAX_SHOWN)
    assert body["members"][-1]["id"] == "vision-new"


class Asking:
    """A client that asks where its request is."""

    def __init__(self, gateway: Gateway) -> None:
        feed: Any = None
        app = create_app(MeasuredCore(gateway.core), ui=Ui(gateway.core, feed))
        self.client = TestClient(app)

    def __call__(self, request_id: str = OWN_ID) -> Any:
        return self.client.get(f"/ui/requests/{request_id}").json()


async def test_a_request_is_shown_from_stage_to_stage() -> None:
    gateway = Gateway()
    where = Asking(gateway)
    assert where() is None
    async with gateway.core.generate(request(OWN_ID)) as events:
        fresh = {
            "stage": "preprocess",
            "interruption": "",
            "num_retries": 0,
            "num_items_left": 0,
            "num_tokens": 0,
        }
        assert where() == fresh
        gateway.on_event(routed(OWN_ID))
        assert where() == fresh | {"stage": "llm"}
        gateway.lose("llm")
        lost = where()
        assert (lost["stage"], lost["num_retries"]) == ("gateway", 1)
        assert lost["interruption"].startswith("llm was lost while it held the request")
        gateway.regain("llm", 2)
        gateway.on_event(
            routed(OWN_ID, llm="llm-2", attempt=1),
            delta(0, [10], "a", request_id=OWN_ID, attempt=1),
        )
        assert where() == fresh | {"stage": "llm", "num_retries": 1, "num_tokens": 1}
        gateway.on_event(delta(1, [11], "b", "stop", request_id=OWN_ID, attempt=1))
        await rest(events)
    assert where() is None


async def test_ids_that_can_be_guessed_show_nothing() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request("job-1")):
        assert Asking(gateway)("job-1") is None


async def test_the_images_that_are_left_are_counted() -> None:
    gateway = Gateway()
    where = Asking(gateway)
    async with gateway.core.generate(request(OWN_ID, images=(b"a", b"b", b"c"))):
        gateway.on_event(routed(OWN_ID))
        assert (where()["stage"], where()["num_items_left"]) == ("vision", 3)
        gateway.on_event(ItemsLeft(request_id=OWN_ID, attempt=0, count=1))
        assert (where()["stage"], where()["num_items_left"]) == ("vision", 1)
        gateway.on_event(HandedOver(request_id=OWN_ID, attempt=0))
        assert (where()["stage"], where()["num_items_left"]) == ("llm", 0)
