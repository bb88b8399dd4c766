"""The HTTP and gRPC servers listen on their configured addresses, IPv6 included."""

import asyncio
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.address import host_port
from common.process import CannotStart
from common.settings import GatewaySettings
from services.gateway.metrics import MeasuredCore
from services.gateway.servers import start_api_servers
from tests.gateway.fake_core import FakeCore
from tests.loopback import LOOPBACKS, free_port


@pytest.mark.parametrize("host", LOOPBACKS)
async def test_both_servers_answer_at_their_addresses(host: str) -> None:
    settings = GatewaySettings(
        controller="127.0.0.1:1", host=host, http_port=free_port(host), grpc_port=free_port(host)
    )
    async with start_api_servers(settings, MeasuredCore(FakeCore())):
        url = f"http://{host_port(host, settings.http_port)}/livez"
        with await asyncio.to_thread(urllib.request.urlopen, url, None, 10) as response:
            assert response.status == 200
        async with grpc.aio.insecure_channel(host_port(host, settings.grpc_port)) as channel:
            request = health_pb2.HealthCheckRequest(service="liveness")
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("host", LOOPBACKS)
async def test_a_taken_grpc_port_is_an_error_that_names_host_and_port(host: str) -> None:
    settings = GatewaySettings(
        controller="127.0.0.1:1", host=host, http_port=free_port(host), grpc_port=free_port(host)
    )
    async with start_api_servers(settings, MeasuredCore(FakeCore())):
        with pytest.raises(CannotStart) as refused:
            async with start_api_servers(settings, MeasuredCore(FakeCore())):
                pass
    assert str(refused.value).startswith(f"cannot listen on {host_port(host, settings.grpc_port)}")
