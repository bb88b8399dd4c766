"""Many requests at once against a running system, a fault with work in hand, and every answer
compared with the undisturbed one."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

import grpc

from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc
from tests.soak import at_rest
from tests.soak.doors import Client
from tests.soak.faults import Faults
from tests.soak.reference import Reference, undisturbed
from tests.soak.verdicts import Tally
from tests.soak.workload import Call, Question, make_calls
from tests.system.running import Running, processes_of

SIMULATED = (
    "--dtype",
    "float32",
    "--embedding-cache-mib",
    "0",
    "--kv-memory",
    str(64 * 2**20),
    "--log-level",
    "warning",
)
REPLICAS = ("--vision", "3", "--llm", "2", "--preprocess", "2", "--detokenizer", "2")
CLIENTS = 20
BUSY_SECONDS = 30.0
REST_SECONDS = 60.0


def simulated(vision_ms: float, *arguments: str) -> Running:
    return Running("--simulate-vision-ms", str(vision_ms), *SIMULATED, *arguments)


def patient_calls(seed: int, number: int) -> list[Call]:
    """Each about pictures of its own."""
    calls = [
        replace(call, manner="patient", mistake="", deadline=60.0)
        for call in make_calls(seed, 3 * number, 3 * number)
    ]
    return [call for call in calls if call.question.pictures][:number]


async def references_of(calls: list[Call]) -> dict[Question, Reference]:
    with simulated(0.0) as system:
        return await undisturbed(system.grpc_port, list({call.question: None for call in calls}))


async def busiest(faults: Faults, role: str) -> control_pb2.Member:
    """The one that has the most in hand, as soon as there is one that has."""
    async with asyncio.timeout(BUSY_SECONDS):
        while True:
            found = max(await faults.members(role), key=lambda m: m.in_flight, default=None)
            if found and (found.in_flight or role == "controller"):
                return found


async def ask_all(
    system: Running,
    calls: list[Call],
    references: dict[Question, Reference],
    fault: Callable[[Faults], Awaitable[None]] | None = None,
) -> Tally:
    client = Client(system.http_port, system.grpc_port, system.model)
    faults = Faults(system.grpc_port, 0, 1.0, [])
    tally = Tally()
    waiting = iter(calls)

    async def one_client() -> None:
        for call in waiting:
            tally.count(call, await client.ask(call), references)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CLIENTS):
                tasks.create_task(one_client())
            if fault:
                tasks.create_task(fault(faults))
    finally:
        await client.close()
        await faults.close()
    return tally


def assert_at_rest(system: Running, before: at_rest.AtRest) -> None:
    """Everyone is there again, and nothing is held or has grown."""
    deadline = time.monotonic() + REST_SECONDS
    while left := at_rest.leaks(before, state_of(system), processes_of(system.process.pid)):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def state_of(system: Running) -> at_rest.AtRest:
    ready = [m for m in list_members(system) if m.state == control_pb2.MEMBER_STATE_READY]
    return at_rest.look(system.process.pid, ready, at_rest.read(system.url("/metrics")))


def list_members(system: Running) -> list[control_pb2.Member]:
    """None while the controller is away."""
    with grpc.insecure_channel(f"127.0.0.1:{system.grpc_port}") as channel, suppress(grpc.RpcError):
        return list(
            control_pb2_grpc.ControlServiceStub(channel)
            .ListMembers(control_pb2.ListMembersRequest(), timeout=10)
            .members
        )
    return []


def num_ended(system: Running) -> int:
    """How many requests the gateway admitted that have ended."""
    return round(
        sum(
            at_rest.metric(at_rest.read(system.url("/metrics")), "twinlens_requests_total").values()
        )
    )
