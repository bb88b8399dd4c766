"""Faults of members with work in hand.

Every accepted request ends once, with the undisturbed answer, and no work or process is left over.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.soak.faults import Faults
from tests.soak.reference import Reference
from tests.soak.verdicts import Tally
from tests.soak.workload import Call, Question
from tests.system.running import ROOT, Running, own_environment, until
from tests.system.under_load import (
    REPLICAS,
    ask_all,
    assert_at_rest,
    busiest,
    control_address,
    num_ended,
    patient_calls,
    references_of,
    simulated,
    state_of,
)

pytestmark = pytest.mark.system
NUM_CALLS = 40
LOSSES = [
    ("vision", signal.SIGKILL),
    ("vision", signal.SIGSTOP),
    ("preprocess", signal.SIGKILL),
    ("detokenizer", signal.SIGSTOP),
    ("llm", signal.SIGKILL),
    ("controller", signal.SIGKILL),
]
"""The other losses are in test_failover.py, with streams in progress."""


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    return patient_calls(seed=3, number=NUM_CALLS)


@pytest.fixture(scope="module")
def started() -> Iterator[Running]:
    with simulated(80.0, *REPLICAS) as running:
        yield running


@pytest.fixture(scope="module")
def references(started: Running, calls: list[Call]) -> dict[Question, Reference]:
    return asyncio.run(references_of(started, calls))


@pytest.fixture(scope="module")
def system(started: Running, calls: list[Call], references: dict[Question, Reference]) -> Running:
    """The system after a first load: what grows with first use has grown."""
    assert_all_answered(asyncio.run(ask_all(started, calls, references)))
    return started


def assert_all_answered(tally: Tally) -> None:
    assert tally.is_clean, tally
    assert tally.answered == NUM_CALLS


@pytest.mark.parametrize(
    ("role", "number"), LOSSES, ids=lambda value: getattr(value, "name", value)
)
async def test_a_member_lost_with_work_in_hand_is_not_noticed(
    system: Running,
    calls: list[Call],
    references: dict[Question, Reference],
    role: str,
    number: signal.Signals,
) -> None:
    before = state_of(system)
    ended = num_ended(system)
    frozen: list[int] = []

    async def fault(faults: Faults) -> None:
        victim = await busiest(faults, role)
        os.kill(victim.pid, number)
        if number == signal.SIGSTOP:
            frozen.append(victim.pid)

    try:
        tally = await ask_all(system, calls, references, fault)
    finally:
        for pid in frozen:
            wake(pid)
    assert_all_answered(tally)
    assert num_ended(system) - ended == NUM_CALLS
    assert_at_rest(system, before)


def wake(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass  # it was found hung, and restarted


@contextmanager
def faulty_vision(system: Running, fault: str) -> Iterator[None]:
    """Keep one more vision replica in the system, whose embeddings cannot be used."""
    command = [
        sys.executable,
        "-m",
        "tests.system.faulty_vision",
        fault,
        f"--controller={control_address(system)}",
        "--simulate-vision-ms=1",
        "--name=faulty",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=own_environment())
    try:
        until(
            lambda: any(m.id.startswith("faulty") for m in system.members()),
            "the faulty replica is a member",
        )
        yield
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("fault", ["nan", "shape", "error"])
async def test_images_of_a_replica_that_returns_nothing_usable_go_to_another(
    system: Running, calls: list[Call], references: dict[Question, Reference], fault: str
) -> None:
    before = state_of(system)
    with faulty_vision(system, fault):
        tally = await ask_all(system, calls, references)
    assert_all_answered(tally)
    assert_at_rest(system, before)
    assert faulty_images(system) > 0, "the faulty replica was given work"


def faulty_images(system: Running) -> int:
    return sum(
        entry.get("vision", "").startswith("faulty")
        for entry in system.logged(event="image failed")
    )


async def test_clients_that_hang_up_anywhere_leave_nothing_behind(
    system: Running, calls: list[Call], references: dict[Question, Reference]
) -> None:
    """Clients hang up at any time between the request and the last piece, in steps of 20 ms.

    Other requests have deadlines in the same steps.
    """
    before = state_of(system)
    by_time = [
        replace(call, manner="hangs_up", hang_up_pieces=0, hang_up_seconds=0.02 * n)
        for n, call in enumerate(calls)
    ]
    by_piece = [
        replace(call, manner="hangs_up", is_streamed=True, hang_up_pieces=1 + n % 6)
        for n, call in enumerate(calls)
    ]
    hurried = [
        replace(call, manner="hurried", deadline=0.01 + 0.02 * n) for n, call in enumerate(calls)
    ]
    tally = await ask_all(
        system,
        [call for three in zip(by_time, by_piece, hurried, strict=True) for call in three],
        references,
    )
    assert tally.is_clean, tally
    assert tally.cancelled > NUM_CALLS
    assert tally.late > 0
    assert_at_rest(system, before)
    assert_all_answered(await ask_all(system, calls, references))
