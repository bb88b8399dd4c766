"""Which replicas come and go, without a process behind them: the fleet signals children, and these
remember it."""

import signal
from typing import Any

import pytest

from common.membership import READY, STANDBY, STARTING
from proto.twinlens.control.v1 import control_pb2
from services.launcher import fleet as fleet_module
from services.launcher.child import Child
from services.launcher.fleet import STOP_SECONDS, Fleet


class Process:
    """Lives until it is told to have ended."""


def make(role: str, number: int) -> list[Child]:
    if role == "llm":
        return [Child(role, f"llm-{number}.{rank}", [], group=f"llm-{number}") for rank in range(2)]
    return [Child(role, f"{role}-{number}", [])]


class Fixture:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.signals: list[tuple[str, signal.Signals]] = []
        self.now = 100.0
        monkeypatch.setattr(
            fleet_module,
            "signal_child",
            lambda child, number: self.signals.append((child.name, number)),
        )
        monkeypatch.setattr(fleet_module.time, "monotonic", lambda: self.now)

    def fleet(self, standbys: int = 0, **wanted: int) -> Fleet:
        self.of = Fleet(wanted, standbys, make, drain_seconds=60.0)
        return self.of

    def run(self, *names: str, state: Any = READY, work: int = 0) -> None:
        """These, or all, have processes, and are members in this state."""
        for child in self.of.children:
            if not names or child.name in names:
                child.process = child.process or Process()  # type: ignore[assignment]
                child.num_starts = max(1, child.num_starts)
                child.member = control_pb2.Member(role=child.role, state=state, in_flight=work)

    def die(self, *names: str) -> None:
        for child in self.of.children:
            if child.name in names:
                child.process = child.member = None

    def names(self, role: str = "vision") -> list[str]:
        return sorted(replica.first.name for replica in self.of.active(role))

    def take(self) -> list[tuple[str, signal.Signals]]:
        sent = self.signals
        self.signals = []
        return sent


@pytest.fixture
def it(monkeypatch: pytest.MonkeyPatch) -> Fixture:
    return Fixture(monkeypatch)


def test_up_adds_and_down_drains_the_one_with_the_least_work(it: Fixture) -> None:
    fleet = it.fleet(vision=1)
    it.run()
    fleet.wanted["vision"] = 3
    fleet.reconcile()
    assert it.names() == ["vision-0", "vision-1", "vision-2"]
    for name, work in (("vision-0", 2), ("vision-1", 0), ("vision-2", 1)):
        it.run(name, work=work)
    fleet.wanted["vision"] = 1
    fleet.reconcile()
    assert it.names() == ["vision-0"]
    assert it.take() == [("vision-1", signal.SIGTERM), ("vision-2", signal.SIGTERM)]
    fleet.reconcile()
    assert it.take() == []  # a second SIGTERM would stop what drains


def test_down_takes_those_that_are_not_ready_first_however_much_the_ready_one_idles(
    it: Fixture,
) -> None:
    fleet = it.fleet(vision=3)
    it.run(state=STARTING, work=5)
    it.run("vision-0")
    fleet.wanted["vision"] = 1
    fleet.reconcile()
    assert it.names() == ["vision-0"]


def test_a_drained_replica_is_gone_and_its_name_is_free_again(it: Fixture) -> None:
    fleet = it.fleet(vision=2)
    it.run()
    fleet.wanted["vision"] = 1
    fleet.reconcile()
    fleet.wanted["vision"] = 2
    fleet.reconcile()
    # Vision-1 still drains.
    assert sorted(child.name for child in fleet.children) == [
        "vision-0",
        "vision-1",
        "vision-2",
    ]
    it.die("vision-1")
    fleet.wanted["vision"] = 3
    fleet.reconcile()
    assert it.names() == ["vision-0", "vision-1", "vision-2"]


def test_one_that_does_not_drain_in_time_is_stopped_and_then_killed(it: Fixture) -> None:
    fleet = it.fleet(vision=1)
    it.run()
    fleet.take_out(fleet.replicas[0], least=0)
    it.now += 59.0
    fleet.reconcile()
    assert it.take() == [("vision-0", signal.SIGTERM)]
    assert fleet.next_deadline() == it.now + 1.0
    it.now += 1.0
    fleet.reconcile()
    it.now += STOP_SECONDS
    fleet.reconcile()
    assert it.take() == [("vision-0", signal.SIGINT), ("vision-0", signal.SIGKILL)]


def test_a_group_drains_by_its_first_rank_and_the_others_end_with_it(it: Fixture) -> None:
    fleet = it.fleet(llm=2)
    it.run()
    fleet.wanted["llm"] = 1
    fleet.reconcile()
    assert it.take() == [("llm-1.0", signal.SIGTERM)]
    it.die("llm-1.0")
    fleet.reconcile()
    assert ("llm-1.1", signal.SIGKILL) in it.take()
    it.die("llm-1.1")
    fleet.reconcile()
    assert [replica.number for replica in fleet.replicas] == [0]


def test_a_standby_is_promoted_at_once_and_another_comes_in_its_place(it: Fixture) -> None:
    fleet = it.fleet(standbys=1, vision=1)
    it.run("vision-0")
    it.run("vision-1", state=STANDBY)
    fleet.reconcile()
    assert (it.names(), it.take()) == (["vision-0"], [])
    fleet.wanted["vision"] = 2
    fleet.reconcile()
    assert it.names() == ["vision-0", "vision-1"]
    assert it.take() == [("vision-1", signal.SIGUSR1)]
    assert [child.name for child in fleet.children if child.is_standby] == ["vision-2"]


def test_a_standby_that_still_loads_is_promoted_when_it_has_loaded(it: Fixture) -> None:
    fleet = it.fleet(standbys=1, vision=1)
    it.run(state=STARTING)
    fleet.wanted["vision"] = 2
    fleet.reconcile()
    assert it.names() == ["vision-0", "vision-1"]
    assert it.take() == []  # it may not be able to hear a signal yet, and would die of it
    it.run("vision-1", state=STANDBY)
    fleet.reconcile()
    assert it.take() == [("vision-1", signal.SIGUSR1)]


def test_a_standby_takes_the_place_of_a_replica_that_died(it: Fixture) -> None:
    fleet = it.fleet(standbys=1, vision=1)
    it.run("vision-0")
    it.run("vision-1", state=STANDBY)
    it.die("vision-0")
    fleet.reconcile()
    assert it.names() == ["vision-1"]
    assert it.take() == [("vision-1", signal.SIGUSR1)]
    assert [child.name for child in fleet.children if child.is_standby] == ["vision-0"]


def test_a_replica_that_was_never_started_is_not_taken_for_dead(it: Fixture) -> None:
    fleet = it.fleet(standbys=1, vision=1)
    it.run("vision-1", state=STANDBY)
    fleet.reconcile()
    assert it.names() == ["vision-0"]


def test_taking_one_out_lowers_what_is_wanted_once_and_not_below_the_least(it: Fixture) -> None:
    fleet = it.fleet(vision=2)
    it.run()
    for _ in range(2):
        fleet.take_out(fleet.replicas[0])
    assert fleet.wanted["vision"] == 1
    assert it.take() == [("vision-0", signal.SIGTERM)]
    fleet.take_out(fleet.replicas[1])
    fleet.reconcile()
    assert fleet.wanted["vision"] == 1
    assert it.names() == ["vision-2"]


def test_the_sample_tells_of_ready_replicas_that_take_work_and_of_what_waits_before_them(
    it: Fixture,
) -> None:
    fleet = it.fleet(standbys=1, vision=3, preprocess=2)
    it.run("vision-0", work=3)
    it.run("vision-1")
    it.run("vision-2", state=STARTING)
    it.run("vision-3", state=STANDBY)
    it.run("preprocess-0", "preprocess-1")
    delays = {"vision-0": 4.0, "vision-1": 2.0, "preprocess-0": 0.5, "preprocess-1": 0.25}
    for child in fleet.children:
        if child.member:
            child.member.expected_delay = delays.get(child.name, 0.0)
    sample = fleet.sample_vision()
    assert (sample.delay, sample.busy, sample.ready, sample.wanted) == (2.75, 1, 2, 3)
