"""What a system holds after its requests is found."""

import os
from dataclasses import replace

import pytest

from proto.twinlens.control.v1 import control_pb2
from tests.soak.at_rest import (
    MORE_BYTES,
    MORE_DESCRIPTORS,
    MORE_THREADS,
    AtRest,
    Process,
    leaks,
    look,
    metric,
)

BEFORE = AtRest(
    {
        1: Process("launcher", 20, 5, 10**8),
        2: Process("vision", 30, 8, 10**8),
        3: Process("vision", 34, 8, 10**8),
    },
    0,
    0,
)
CHILDREN = {2, 3}


def test_replaced_processes_are_no_leak() -> None:
    after = AtRest({1: BEFORE.processes[1], 7: BEFORE.processes[2], 8: BEFORE.processes[3]}, 0, 0)
    assert leaks(BEFORE, after, {7, 8}) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"held": 1}, "1 requests or images are held"),
        ({"requests_in_flight": 2}, "2 requests in flight"),
        (
            {"processes": {1: BEFORE.processes[1], 2: BEFORE.processes[2]}},
            "1 processes of vision, 2 before",
        ),
        (
            {
                "processes": BEFORE.processes
                | {3: Process("vision", 35 + MORE_DESCRIPTORS, 8, 10**8)}
            },
            "descriptors",
        ),
        (
            {"processes": BEFORE.processes | {3: Process("vision", 30, 9 + MORE_THREADS, 10**8)}},
            "threads",
        ),
        (
            {"processes": BEFORE.processes | {3: Process("vision", 30, 8, 10**8 + MORE_BYTES + 1)}},
            "resident",
        ),
    ],
)
def test_what_is_left_over_is_found(changed: dict[str, object], words: str) -> None:
    assert any(words in leak for leak in leaks(BEFORE, replace(BEFORE, **changed), CHILDREN))


def test_a_child_that_is_not_a_member_is_found() -> None:
    assert leaks(BEFORE, BEFORE, {2, 3, 9}) == ["process 9 is not a member"]


def test_the_use_of_a_process_is_read_from_proc() -> None:
    member = control_pb2.Member(role="vision", pid=os.getpid(), in_flight=2, queued=1)
    state = look(2**22 + 1, [member], "# HELP x\ntwinlens_gateway_requests_in_flight 4.0\n")
    assert (state.held, state.requests_in_flight) == (3, 4)
    (process,) = state.processes.values()
    assert (
        process.role == "vision"
        and process.descriptors > 2
        and process.threads >= 1
        and process.resident > 2**20
    )


def test_metrics_are_read_by_their_labels() -> None:
    text = (
        'twinlens_gateway_requests_total{outcome="stop"} '
        '3.0\ntwinlens_gateway_requests_total{outcome="Internal"} 1e+02\n'
        "twinlens_gateway_requests 7\n"
    )
    assert metric(text, "twinlens_gateway_requests_total") == {
        '{outcome="stop"}': 3.0,
        '{outcome="Internal"}': 100.0,
    }
