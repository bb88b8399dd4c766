"""Many requests at once against a running system that has a fault while it works on them.

Every answer is compared with the undisturbed one.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from common.membership import READY
from proto.twinlens.control.v1 import control_pb2
from tests.soak import at_rest
from tests.soak.clients import Client
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
    """Return calls about pictures whose clients wait for the whole answer."""
    calls = [
        replace(call, manner="patient", mistake="", deadline=60.0)
        for call in make_calls(seed, 3 * number, 3 * number)
    ]
    return [call for call in calls if call.question.pictures][:number]


async def references_of(system: Running, calls: list[Call]) -> dict[Question, Reference]:
    """Return the answers of a system that has had no fault yet."""
    return await undisturbed(system.grpc_port, list({call.question: None for call in calls}))


async def busiest(faults: Faults, role: str) -> control_pb2.Member:
    """Wait for a member of the role with work in hand, and return the one with the most.

    The controller never has work in hand.
    """
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
    """Ask all calls and count the outcomes; a fault may happen meanwhile."""
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
    """Wait until all members are back and hold no work, and none has grown."""
    deadline = time.monotonic() + REST_SECONDS
    while left := at_rest.leaks(before, state_of(system), processes_of(system.process.pid)):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def state_of(system: Running) -> at_rest.AtRest:
    ready = system.in_state("", READY)
    return at_rest.look(system.process.pid, ready, at_rest.read(system.url("/metrics")))


def control_address(system: Running) -> str:
    """Return the controller's address, for members that the launcher does not start."""
    for pid in processes_of(system.process.pid):
        if found := re.search(r"--controller=([^\0]+)", Path(f"/proc/{pid}/cmdline").read_text()):
            return found[1]
    raise AssertionError("no child knows the controller's address")


def num_ended(system: Running) -> int:
    """Return the number of admitted requests that have ended, as the gateway counts them."""
    metrics = at_rest.read(system.url("/metrics"))
    return round(sum(at_rest.metric(metrics, "twinlens_gateway_requests_total").values()))
