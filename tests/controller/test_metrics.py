"""What the controller's metrics say about the members."""

import pytest

from common.membership import DRAINING, READY
from proto.twinlens.control.v1 import control_pb2
from services.controller.membership_table import MembershipTable
from services.controller.metrics import ControllerMetrics


@pytest.fixture
def table() -> MembershipTable:
    return MembershipTable()


@pytest.fixture
def metrics(table: MembershipTable) -> ControllerMetrics:
    return ControllerMetrics(table)


def value(metrics: ControllerMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"twinlens_controller_{name}", labels)


def report(table: MembershipTable, name: str, state: int = READY, hung: bool = False) -> None:
    role = name.partition("-")[0]
    table.report(control_pb2.Member(id=name, role=role, state=state, hung=hung), 0.0)


def test_members_are_counted_by_role_and_state(
    table: MembershipTable, metrics: ControllerMetrics
) -> None:
    report(table, "vision-1")
    report(table, "vision-2")
    report(table, "vision-3", DRAINING)
    report(table, "llm-1", hung=True)
    assert value(metrics, "members", role="vision", state="ready") == 2
    assert value(metrics, "members", role="vision", state="draining") == 1
    assert value(metrics, "members", role="vision", state="dead") == 0
    assert value(metrics, "members", role="gateway", state="ready") == 0, "alerts see a fall to 0"
    assert value(metrics, "hung_members", role="llm") == 1
    assert value(metrics, "hung_members", role="vision") == 0


def test_a_lost_member_is_counted_and_one_that_drained_is_not(
    table: MembershipTable, metrics: ControllerMetrics
) -> None:
    report(table, "vision-1")
    report(table, "vision-2", DRAINING)
    table.mark_dead("vision-1", 0.0)
    table.mark_dead("vision-2", 0.0)
    assert value(metrics, "lost_members_total") == 1
    assert value(metrics, "members", role="vision", state="dead") == 2
