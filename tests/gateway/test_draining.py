"""A draining gateway and draining stages get no new work and finish the requests in flight."""

import asyncio
from typing import Any

import grpc
import pytest

from common.errors import Unavailable
from common.events import PeerDraining
from common.messages import Released
from common.settings import GatewaySettings
from proto.twinlens.inference.v1 import inference_pb2, inference_pb2_grpc
from services.gateway.metrics import MeasuredCore
from services.gateway.servers import start_api_servers
from tests.gateway.builders import Gateway, delta, request, rest, routed
from tests.gateway.fake_core import HELLO, FakeCore, http_server
from tests.gateway.test_http_disconnect import request as http_request
from tests.loopback import free_port


async def refused(port: int) -> None:
    """Return when the port refuses connections."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            await writer.wait_closed()
        except ConnectionRefusedError:
            return
        except ConnectionError:
            pass  # The connection was accepted and then closed.


async def test_drained_servers_refuse_new_clients_and_finish_the_others() -> None:
    gate = asyncio.Event()
    idle = asyncio.Event()
    core = FakeCore(*HELLO[:2], gate, *HELLO[2:])
    settings = GatewaySettings(
        controller="127.0.0.1:1", http_port=free_port("127.0.0.1"), grpc_port=free_port("127.0.0.1")
    )
    async with (
        asyncio.timeout(30),
        start_api_servers(settings, MeasuredCore(core)) as servers,
        grpc.aio.insecure_channel(f"127.0.0.1:{settings.grpc_port}") as channel,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", settings.http_port)
        writer.write(http_request(stream=True))
        call = inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(
            inference_pb2.GenerateStreamRequest(text="hi")
        )
        while len(core.requests) < 2:
            await asyncio.sleep(0)
        drained = asyncio.create_task(servers.drain(idle))
        await asyncio.gather(refused(settings.http_port), refused(settings.grpc_port))
        assert not drained.done()
        gate.set()
        assert (await reader.read()).count(b"[DONE]") == 1, "and then the connection is closed"
        assert [response.WhichOneof("event") async for response in call][-1] == "end"
        idle.set()
        await drained
        writer.close()


async def test_a_draining_gateway_asks_clients_to_close_their_connections() -> None:
    core = FakeCore()
    async with http_server(core) as port, asyncio.timeout(10):
        for core.is_draining in (False, True):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(http_request(stream=True))
            head = await reader.readuntil(b"\r\n\r\n")
            assert (b"connection: close" in head) == core.is_draining
            writer.close()
            await writer.wait_closed()


async def test_a_draining_gateway_is_not_ready_but_answers_requests() -> None:
    gateway = Gateway()
    gateway.core.drain()
    assert gateway.core.unready_reason() == "the gateway is draining"
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed(), delta(0, [10], "a", "stop"))
        assert len(await rest(events)) == 3


async def test_a_stopping_gateway_refuses_requests() -> None:
    gateway = Gateway()
    await gateway.core.stop(grace=0)
    with pytest.raises(Unavailable, match="stopping"):
        async with gateway.core.generate(request()):
            pass


@pytest.mark.parametrize(("role", "holder"), [("preprocess", 0), ("detokenizer", 1)])
async def test_a_draining_member_gets_no_new_request_while_there_is_another(
    role: str, holder: int
) -> None:
    gateway = Gateway(replicas=2)

    def holders() -> list[Any]:
        return [
            (preprocess, submit.detokenizer.id)[holder]
            for preprocess, submit in gateway.submitted()
        ]

    gateway.core.on_event(PeerDraining(f"{role}-1", role))
    async with gateway.core.generate(request("a")), gateway.core.generate(request("b")):
        assert holders() == [f"{role}-2"] * 2
    gateway.lose(role, 2)
    async with gateway.core.generate(request("c")):
        assert holders()[-1] == f"{role}-1"


async def test_a_request_stays_with_its_draining_language_group() -> None:
    gateway = Gateway(replicas=2)
    async with gateway.core.generate(request()) as events:
        gateway.on_event(routed())
        gateway.core.on_event(PeerDraining("llm-1", "llm"))
        gateway.on_event(delta(0, [10], "a", "stop"))
        assert len(await rest(events)) == 3
    assert len(gateway.submitted()) == 1 and gateway.aborts() == []


def released(gateway: Gateway) -> list[str]:
    return [peer_id for peer_id, message in gateway.links.sent if isinstance(message, Released)]


async def test_a_draining_detokenizer_is_released_once_after_its_last_answer() -> None:
    gateway = Gateway()
    async with gateway.core.generate(request("a")) as a, gateway.core.generate(request("b")):
        gateway.regain("detokenizer", 2)
        gateway.core.on_event(PeerDraining("detokenizer-1", "detokenizer"))
        assert released(gateway) == [], "their answers have not begun, but will come to it"
        gateway.on_event(routed("a"), delta(0, [10], "a", "stop", "a"))
        await rest(a)
        assert released(gateway) == []
    assert released(gateway) == ["detokenizer-1"]
    async with gateway.core.generate(request("c")):
        assert gateway.submitted()[-1][1].detokenizer.id == "detokenizer-2"
    assert released(gateway) == ["detokenizer-1"]


async def test_a_draining_detokenizer_without_requests_is_released_at_once() -> None:
    gateway = Gateway(replicas=2)
    gateway.core.on_event(PeerDraining("detokenizer-1", "detokenizer"))
    assert released(gateway) == ["detokenizer-1"]
