"""The metrics of the controller: which members there are."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from common.membership import state_name
from common.metrics import StageMetrics
from common.settings import SERVICES
from proto.twinlens.control.v1 import control_pb2
from services.controller.membership_table import MembershipTable

STATES = [state for state in control_pb2.MemberState.values() if state]
ROLES = [role for role in SERVICES if role != "controller"]
"""All of them are shown, so that an alert sees the number of a role fall to 0."""


class ControllerMetrics(StageMetrics):
    """What the table of members says, read at each scrape."""

    def __init__(self, table: MembershipTable) -> None:
        super().__init__("controller")
        self.registry.register(MembersCollector(table))
        self.total(
            "lost_members",
            "Members that went silent, or left, without having drained.",
            lambda: table.num_lost,
        )


class MembersCollector(Collector):
    """The number of members of each role, by state, and of those that hang."""

    def __init__(self, table: MembershipTable) -> None:
        self._table = table

    def collect(self) -> Iterator[Metric]:
        members = self._table.members()
        by_state = Counter((member.role, member.state) for member in members)
        hung = Counter(member.role for member in members if member.hung)
        family = GaugeMetricFamily(
            "twinlens_controller_members",
            "Members by role and state. Dead ones count for a minute.",
            labels=["role", "state"],
        )
        for role in ROLES:
            for state in STATES:
                family.add_metric([role, state_name(state)], by_state[role, state])
        yield family
        family = GaugeMetricFamily(
            "twinlens_controller_hung_members",
            "Members that report that their work makes no progress.",
            labels=["role"],
        )
        for role in ROLES:
            family.add_metric([role], hung[role])
        yield family
