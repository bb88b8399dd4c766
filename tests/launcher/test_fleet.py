"""Which replicas come and go, without real processes: the signals to the children are recorded."""

import signal
from typing import Any

import pytest

from common.membership import READY, STANDBY, STARTING
from proto.twinlens.control.v1 import control_pb2
from services.launcher import fleet as fleet_module
from services.launcher.child import Child
from services.launcher.fleet import STOP_SECONDS, Fleet


class Process:
    """Lives until `Simulation.die` takes it away."""


def make_children(role: str, number: int) -> list[Child]:
    if role == "llm":
        return [Child(role, f"llm-{number}.{rank}", [], group=f"llm-{number}") for rank in range(2)]
    return [Child(role, f"{role}-{number}", [])]


class Simulation:
    """A fleet whose children run as long as the test says, with a clock that it sets."""

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
        self.made = Fleet(wanted, standbys, make_children, drain_seconds=60.0)
        return self.made

    def run(self, *names: str, state: Any = READY, work: int = 0) -> None:
        """Give these children, or all, a process that is a member in this state."""
        for child in self.made.children:
            if not names or child.name in names:
                child.process = child.process or Process()  # type: ignore[assignment]
                child.num_starts = max(1, child.num_starts)
                child.member = control_pb2.Member(role=child.role, state=state, in_flight=work)

    def die(self, *names: str) -> None:
        for child in self.made.children:
            if child.name in names:
                child.process = child.member = None

    def names(self, role: str = "vision") -> list[str]:
        return sorted(replica.leader.name for replica in self.made.active(role))

    def take_signals(self) -> list[tuple[str, signal.Signals]]:
        sent = self.signals
        self.signals = []
        return sent


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Simulation:
    return Simulation(monkeypatch)


def test_scaling_up_adds_and_scaling_down_drains_those_with_the_least_work(
    simulation: Simulation,
) -> None:
    fleet = simulation.fleet(vision=1)
    simulation.run()
    fleet.wanted["vision"] = 3
    fleet.reconcile()
    assert simulation.names() == ["vision-0", "vision-1", "vision-2"]
    for name, work in (("vision-0", 2), ("vision-1", 0), ("vision-2", 1)):
        simulation.run(name, work=work)
    fleet.wanted["vision"] = 1
    fleet.reconcile()
    assert simulation.names() == ["vision-0"]
    assert simulation.take_signals() == [("vision-1", signal.SIGTERM), ("vision-2", signal.SIGTERM)]
    fleet.reconcile()
    assert simulation.take_signals() == []  # a second SIGTERM would stop what drains


def test_scaling_down_drains_replicas_that_are_not_ready_first(
    simulation: Simulation,
) -> None:
    fleet = simulation.fleet(vision=3)
    simulation.run(state=STARTING, work=5)
    simulation.run("vision-0")
    fleet.wanted["vision"] = 1
    fleet.reconcile()
    assert simulation.names() == ["vision-0"]


def test_the_name_of_a_drained_replica_is_used_again_once_it_has_exited(
    simulation: Simulation,
) -> None:
    fleet = simulation.fleet(vision=2)
    simulation.run()
    fleet.wanted["vision"] = 1
    fleet.reconcile()
    fleet.wanted["vision"] = 2
    fleet.reconcile()
    # vision-1 is still draining.
    assert sorted(child.name for child in fleet.children) == [
        "vision-0",
        "vision-1",
        "vision-2",
    ]
    simulation.die("vision-1")
    fleet.wanted["vision"] = 3
    fleet.reconcile()
    assert simulation.names() == ["vision-0", "vision-1", "vision-2"]


def test_a_replica_that_does_not_drain_in_time_is_stopped_and_then_killed(
    simulation: Simulation,
) -> None:
    fleet = simulation.fleet(vision=1)
    simulation.run()
    fleet.remove(fleet.replicas[0], least=0)
    simulation.now += 59.0
    fleet.reconcile()
    assert simulation.take_signals() == [("vision-0", signal.SIGTERM)]
    assert fleet.next_deadline() == simulation.now + 1.0
    simulation.now += 1.0
    fleet.reconcile()
    simulation.now += STOP_SECONDS
    fleet.reconcile()
    assert simulation.take_signals() == [("vision-0", signal.SIGINT), ("vision-0", signal.SIGKILL)]


def test_a_group_drains_by_its_leader_and_the_other_ranks_are_killed_then(
    simulation: Simulation,
) -> None:
    fleet = simulation.fleet(llm=2)
    simulation.run()
    fleet.wanted["llm"] = 1
    fleet.reconcile()
    assert simulation.take_signals() == [("llm-1.0", signal.SIGTERM)]
    simulation.die("llm-1.0")
    fleet.reconcile()
    assert ("llm-1.1", signal.SIGKILL) in simulation.take_signals()
    simulation.die("llm-1.1")
    fleet.reconcile()
    assert [replica.number for replica in fleet.replicas] == [0]


def test_scaling_up_promotes_a_standby_and_starts_another_one(simulation: Simulation) -> None:
    fleet = simulation.fleet(standbys=1, vision=1)
    simulation.run("vision-0")
    simulation.run("vision-1", state=STANDBY)
    fleet.reconcile()
    assert (simulation.names(), simulation.take_signals()) == (["vision-0"], [])
    fleet.wanted["vision"] = 2
    fleet.reconcile()
    assert simulation.names() == ["vision-0", "vision-1"]
    assert simulation.take_signals() == [("vision-1", signal.SIGUSR1)]
    assert [child.name for child in fleet.children if child.is_standby] == ["vision-2"]


def test_a_standby_that_is_still_loading_is_promoted_when_it_has_loaded(
    simulation: Simulation,
) -> None:
    fleet = simulation.fleet(standbys=1, vision=1)
    simulation.run(state=STARTING)
    fleet.wanted["vision"] = 2
    fleet.reconcile()
    assert simulation.names() == ["vision-0", "vision-1"]
    assert simulation.take_signals() == []  # it may not handle the signal yet, and would die of it
    simulation.run("vision-1", state=STANDBY)
    fleet.reconcile()
    assert simulation.take_signals() == [("vision-1", signal.SIGUSR1)]


def test_a_standby_replaces_a_replica_that_died(simulation: Simulation) -> None:
    fleet = simulation.fleet(standbys=1, vision=1)
    simulation.run("vision-0")
    simulation.run("vision-1", state=STANDBY)
    simulation.die("vision-0")
    fleet.reconcile()
    assert simulation.names() == ["vision-1"]
    assert simulation.take_signals() == [("vision-1", signal.SIGUSR1)]
    assert [child.name for child in fleet.children if child.is_standby] == ["vision-0"]


def test_a_replica_that_was_never_started_does_not_count_as_dead(simulation: Simulation) -> None:
    fleet = simulation.fleet(standbys=1, vision=1)
    simulation.run("vision-1", state=STANDBY)
    fleet.reconcile()
    assert simulation.names() == ["vision-0"]


def test_removing_a_replica_lowers_the_wanted_count_once_and_not_below_the_least(
    simulation: Simulation,
) -> None:
    fleet = simulation.fleet(vision=2)
    simulation.run()
    for _ in range(2):
        fleet.remove(fleet.replicas[0])
    assert fleet.wanted["vision"] == 1
    assert simulation.take_signals() == [("vision-0", signal.SIGTERM)]
    fleet.remove(fleet.replicas[1])
    fleet.reconcile()
    assert fleet.wanted["vision"] == 1
    assert simulation.names() == ["vision-2"]


def test_the_sample_counts_ready_replicas_and_adds_the_delay_in_preprocess(
    simulation: Simulation,
) -> None:
    fleet = simulation.fleet(standbys=1, vision=3, preprocess=2)
    simulation.run("vision-0", work=3)
    simulation.run("vision-1")
    simulation.run("vision-2", state=STARTING)
    simulation.run("vision-3", state=STANDBY)
    simulation.run("preprocess-0", "preprocess-1")
    delays = {"vision-0": 4.0, "vision-1": 2.0, "preprocess-0": 0.5, "preprocess-1": 0.25}
    for child in fleet.children:
        if child.member:
            child.member.expected_delay = delays.get(child.name, 0.0)
    sample = fleet.sample_vision()
    assert (sample.delay, sample.busy, sample.ready, sample.wanted) == (2.75, 1, 2, 3)
