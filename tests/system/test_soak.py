"""A short soak with a fixed seed; `make soak` is the long one."""

import argparse

import pytest

from tests.soak.faults import WEIGHTS
from tests.soak.run import Soak
from tests.soak.workload import POISONS

pytestmark = pytest.mark.system


async def test_no_answer_is_lost_doubled_or_changed_while_members_come_and_go() -> None:
    options = argparse.Namespace(
        requests=300,
        questions=100,
        seed=5,
        seconds=120.0,
        clients=16,
        fault_seconds=1.5,
        faults=list(WEIGHTS),
        vision_ms=60.0,
        log=None,
        poison_every=0,
        poisons=list(POISONS),
    )
    report = await Soak(options).run()
    assert report.is_clean, report.table()
    assert report.tally.calls == options.requests
    assert report.tally.answered > options.requests / 2
    assert sum(report.faults.values()) > 0, "a fault came while requests were in flight"
