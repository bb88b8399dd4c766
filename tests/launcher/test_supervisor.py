"""The supervisor starts, watches, restarts, scales and stops real child processes."""

import argparse
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.config import load
from common.membership import DEAD, READY, STARTING
from common.settings import KNOWN_NAMES, SERVICES, ServeSettings
from common.tuning import TUNING
from proto.twinlens.control.v1 import control_pb2
from services.launcher import autoscale
from services.launcher import child as child_module
from services.launcher import supervisor as supervisor_module
from services.launcher.child import MAX_FAILED_STARTS, Child, command_of
from services.launcher.supervisor import Supervisor
from tests.launcher.conftest import Supervise
from tests.launcher.processes import (
    MODEL,
    child_named,
    ignoring,
    kill,
    none_lives,
    pids,
    report,
    statuses,
    wait_for_status,
)


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """Return the children that have another process, or none."""
    return {name for name in before if after.get(name) != before[name]}


def test_a_child_that_dies_after_it_was_ready_is_restarted_at_once_and_alone(
    supervise: Supervise,
) -> None:
    supervisor = supervise()
    assert supervisor.keep_running() is None
    before = pids(supervisor)
    assert len(before) == 6
    report(supervisor, "vision-0")
    kill(supervisor, "vision-0")
    supervisor.keep_running()
    after = pids(supervisor)
    assert changed(before, after) == {"vision-0"} and after.keys() == before.keys()
    assert child_named(supervisor, "vision-0").failed_starts == 0


def test_a_child_that_soon_dies_again_is_restarted_after_a_delay(supervise: Supervise) -> None:
    supervisor = supervise()
    due: list[float] = []
    for _ in range(2):
        supervisor.keep_running()
        report(supervisor, "vision-0")
        kill(supervisor, "vision-0")
        supervisor.keep_running()
        due.append(child_named(supervisor, "vision-0").start_at)
    assert due[0] <= time.monotonic() < due[1]
    supervisor.keep_running()
    assert "vision-0" not in pids(supervisor)
    assert supervisor.next_deadline() == due[1]


def test_deaths_of_a_child_that_gets_ready_in_between_never_end_serve(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "FIRST_BACKOFF_SECONDS", 0.0)
    supervisor = supervise()
    for death in range(2 * MAX_FAILED_STARTS):
        supervisor.keep_running()
        if death % MAX_FAILED_STARTS == 0:
            report(supervisor, "vision-0")
        kill(supervisor, "vision-0")
        assert supervisor.keep_running() is None


def test_the_ranks_of_a_group_are_restarted_together_at_a_new_rendezvous(
    supervise: Supervise,
) -> None:
    supervisor = supervise(tp=2)

    def rendezvous() -> set[str]:
        ranks = [child for child in supervisor.fleet.children if child.role == "llm"]
        return {command_of(rank, Path("/run"))[-1] for rank in ranks}

    supervisor.keep_running()
    before = pids(supervisor)
    first = rendezvous()
    assert {"llm-0", "llm-0.1"} < before.keys() and len(first) == 1
    kill(supervisor, "llm-0.1")
    supervisor.keep_running()
    assert wait_for_status(supervisor, "llm-0") == -signal.SIGKILL
    supervisor.keep_running()
    supervisor.keep_running()
    after = pids(supervisor)
    assert changed(before, after) == {"llm-0", "llm-0.1"} and after.keys() == before.keys()
    assert len(rendezvous()) == 1 and rendezvous() != first


def test_a_rank_that_is_due_waits_for_the_other_rank_to_exit(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = supervise(tp=2)
    supervisor.keep_running()
    monkeypatch.setattr(supervisor_module, "signal_child", lambda *_: None)
    kill(supervisor, "llm-0.1")
    supervisor.keep_running()
    assert supervisor.next_deadline() is None
    assert "llm-0.1" not in pids(supervisor)
    kill(supervisor, "llm-0")
    supervisor.keep_running()
    assert {"llm-0", "llm-0.1"} < pids(supervisor).keys()


def test_the_system_is_ready_when_every_child_is_and_not_after_one_died(
    supervise: Supervise,
) -> None:
    supervisor = supervise()
    supervisor.keep_running()
    report(supervisor, state=STARTING)
    assert not supervisor.is_all_ready()
    report(supervisor)
    assert supervisor.is_all_ready()
    kill(supervisor, "llm-0")
    supervisor.keep_running()
    supervisor.keep_running()
    assert not supervisor.is_all_ready()


def test_members_are_stopped_without_a_drain(supervise: Supervise) -> None:
    supervisor = supervise()
    supervisor.keep_running()
    report(supervisor)
    supervisor.stop_all()
    assert list(statuses(supervisor).values()) == [-signal.SIGINT] * 6


def test_a_member_that_ignores_sigint_is_killed_and_the_controller_keeps_its_time(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(supervisor_module, "STOP_SECONDS", 0.3)
    remaining: dict[str, float] = {}
    real = supervisor_module.wait_or_kill

    def wait_or_kill(child: Child, deadline: float) -> None:
        remaining[child.role] = deadline - time.monotonic()
        real(child, deadline)

    monkeypatch.setattr(supervisor_module, "wait_or_kill", wait_or_kill)
    os.mkfifo(tmp_path / "ready")
    supervisor = supervise({"vision": ignoring("SIGINT", tmp_path / "ready")})
    supervisor.keep_running()
    (tmp_path / "ready").read_bytes()
    report(supervisor)
    supervisor.stop_all()
    ended = statuses(supervisor)
    assert ended.pop("vision-0") == -signal.SIGKILL
    assert set(ended.values()) == {-signal.SIGINT}
    assert none_lives(supervisor)
    assert remaining["controller"] == pytest.approx(0.3, abs=0.1)


def test_a_child_that_dies_while_the_gateway_drains_is_restarted(
    supervise: Supervise, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "ready")
    supervisor = supervise({"gateway": ignoring("SIGTERM", tmp_path / "ready")})
    supervisor.keep_running()
    (tmp_path / "ready").read_bytes()
    supervisor.drain()
    supervisor.keep_running()
    before = pids(supervisor)
    kill(supervisor, "vision-0")
    supervisor.keep_running()
    assert changed(before, pids(supervisor)) == {"vision-0"}
    assert "vision-0" in pids(supervisor)
    assert not supervisor.has_drained()


def test_a_child_gets_the_tuning_of_its_role_but_no_settings_of_the_launcher(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in TUNING["llm"]:
        monkeypatch.delenv(name, raising=False)
    own, *_ = TUNING["llm"]
    monkeypatch.setenv(own, "the operator's")
    monkeypatch.setenv("TWINLENS_DTYPE", "float16")
    monkeypatch.setenv("ANOTHERS", "kept")
    seen_file = str(tmp_path / "seen")
    supervisor = supervise(
        {"llm": f"import json, os; json.dump(dict(os.environ), open({seen_file!r}, 'w'))"}
    )
    supervisor.keep_running()
    assert wait_for_status(supervisor, "llm-0") == 0
    seen = json.loads((tmp_path / "seen").read_text())
    assert (TUNING["llm"] | {own: "the operator's", "ANOTHERS": "kept"}).items() <= seen.items()
    assert seen["PYTHONSAFEPATH"] == "1"
    assert not [name for name in seen if name.startswith("TWINLENS_")]


def test_each_child_gets_the_settings_that_its_service_knows(tmp_path: Path) -> None:
    settings = ServeSettings(
        model=str(MODEL),
        vision=2,
        http_port=8123,
        max_model_len=99,
        dtype="float32",
        embedding_cache_mib=0,
    )
    children = Supervisor(settings, tmp_path).fleet.children
    assert sorted(child.name for child in children if child.role in ("vision", "llm")) == [
        "llm-0",
        "vision-0",
        "vision-1",
    ]
    loaded = {
        child.name: load(
            SERVICES[child.role], argparse.ArgumentParser(), child.arguments, KNOWN_NAMES
        )
        for child in children
    }
    assert loaded["gateway-0"].http_port == 8123
    assert loaded["llm-0"].max_model_len == 99
    assert loaded["llm-0"].dtype == loaded["vision-1"].dtype == "float32"
    assert loaded["vision-1"].embedding_cache_mib == 0
    assert len({service.listen for service in loaded.values()}) == len(children)
    assert {service.controller for service in loaded.values()} == {
        loaded["controller-0"].control_listen
    }


def test_the_wanted_counts_of_the_controller_are_scaled_to_and_reported_back(
    supervise: Supervise,
) -> None:
    supervisor = supervise(preprocess=2)
    supervisor.keep_running()
    report(supervisor)
    supervisor.on_response(control_pb2.JoinResponse(wanted={"vision": 3, "preprocess": 1}))
    supervisor.keep_running()
    assert supervisor.managed().replicas == {
        "vision": 3,
        "preprocess": 1,
        "llm": 1,
        "detokenizer": 1,
    }
    assert {"vision-0", "vision-1", "vision-2", "preprocess-0"} < pids(supervisor).keys()
    assert wait_for_status(supervisor, "preprocess-1") == -signal.SIGTERM
    supervisor.keep_running()
    assert "preprocess-1" not in pids(supervisor)
    assert "preprocess-0" in pids(supervisor)


def test_a_member_that_an_operator_drains_is_not_replaced(supervise: Supervise) -> None:
    supervisor = supervise(vision=2)
    supervisor.keep_running()
    report(supervisor)
    child = child_named(supervisor, "vision-0")
    drained = child.member
    process = child.process
    assert drained is not None and process is not None
    for _ in range(2):  # the controller repeats it with every response
        supervisor.on_response(control_pb2.JoinResponse(drained=[drained.id, "someone-else"]))
        supervisor.keep_running()
    process.wait()  # it ends at the signal that asks it to drain
    supervisor.keep_running()
    assert [name for name in pids(supervisor) if name.startswith("vision")] == ["vision-1"]
    assert supervisor.managed().replicas["vision"] == 1


def test_a_hung_child_is_killed_and_restarted_with_the_ranks_of_its_group(
    supervise: Supervise,
) -> None:
    supervisor = supervise(tp=2)
    supervisor.keep_running()
    report(supervisor)
    before = pids(supervisor)
    report(supervisor, "llm-0.1", hung=True)
    assert wait_for_status(supervisor, "llm-0.1") == -signal.SIGKILL
    supervisor.keep_running()
    assert wait_for_status(supervisor, "llm-0") == -signal.SIGKILL
    supervisor.keep_running()
    assert changed(before, pids(supervisor)) == {"llm-0", "llm-0.1"}
    assert pids(supervisor).keys() == before.keys()


def test_a_frozen_child_is_killed_if_it_does_not_thaw_in_time(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = supervise()
    now = SimpleNamespace(seconds=1000.0)
    supervisor.keep_running()
    clock = SimpleNamespace(monotonic=lambda: now.seconds)
    monkeypatch.setattr(supervisor_module, "time", clock)
    report(supervisor, "vision-0")
    process = child_named(supervisor, "vision-0").process
    assert process is not None
    for state in (DEAD, READY, DEAD):  # it thawed once
        report(supervisor, "vision-0", state=state)
        now.seconds += supervisor_module.FROZEN_SECONDS
        assert process.poll() is None
    report(supervisor, "vision-0", state=DEAD)
    assert process.poll() is None
    now.seconds += 0.1
    report(supervisor, "vision-0", state=DEAD)
    assert process.wait() == -signal.SIGKILL


def test_an_added_replica_that_cannot_start_is_abandoned(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "FIRST_BACKOFF_SECONDS", 0.0)
    supervisor = supervise()
    supervisor.keep_running()
    report(supervisor)
    supervisor.keep_running()
    assert supervisor.has_come_up
    supervisor.on_response(control_pb2.JoinResponse(wanted={"vision": 2}))
    for _ in range(MAX_FAILED_STARTS):
        supervisor.keep_running()
        kill(supervisor, "vision-1")
        assert supervisor.keep_running() is None
    assert "vision-1" not in pids(supervisor)
    assert supervisor.managed().replicas["vision"] == 1


def test_a_long_expected_delay_adds_replicas(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoscale, "UP_SECONDS", 0.0)
    supervisor = supervise(autoscale="vision=1:3")
    supervisor.keep_running()
    report(supervisor)
    supervisor.keep_running()
    report(supervisor, "vision-0", expected_delay=5.0)
    managed = supervisor.managed()
    assert (managed.replicas["vision"], managed.autoscaled["vision"]) == (2, "1:3")


def test_the_bounds_of_autoscaling_apply_to_the_first_replicas(supervise: Supervise) -> None:
    supervisor = supervise(autoscale="vision=2:4")
    assert len(supervisor.fleet.active("vision")) == 2
