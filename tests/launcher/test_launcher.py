"""The launcher starts, watches, restarts and stops its children; here they are processes of one
line."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from common.config import load
from common.membership import DEAD, READY, STARTING
from common.settings import KNOWN_NAMES, SERVICES, ServeSettings
from proto.twinlens.control.v1 import control_pb2
from services.launcher import autoscale, launcher
from services.launcher import child as child_module
from services.launcher.child import MAX_FAILED_STARTS, Child
from services.launcher.launcher import Launcher
from tests.system.running import GOLDEN

MODEL = GOLDEN / "a_image" / "checkpoint"
WAITS = ["sleep", "infinity"]


class NoControlPlane:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def leave(self) -> None:
        pass


Make = Callable[..., Launcher]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Make]:
    """Makes a launcher whose children run the given line of Python, by role, or wait."""
    made: list[Launcher] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def make(lines: dict[str, str] | None = None, **settings: Any) -> Launcher:
        def command_of(child: Child, _: Path) -> list[str]:
            line = (lines or {}).get(child.role)
            return [sys.executable, "-I", "-S", "-c", line] if line else WAITS

        monkeypatch.setattr(child_module, "command_of", command_of)
        monkeypatch.setattr(launcher, "Membership", NoControlPlane)
        made.append(
            Launcher(
                ServeSettings(model=str(MODEL), served_model_name="tiny", **settings), tmp_path
            )
        )
        return made[-1]

    yield make
    for one in made:
        for child in one._fleet.children:
            if child.process is not None:
                child.process.kill()
                child.process.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def child_of(launcher: Launcher, role: str) -> Child:
    return next(child for child in launcher._fleet.children if child.role == role)


def pids(launcher: Launcher) -> dict[str, int]:
    return {
        child.name: child.process.pid
        for child in launcher._fleet.children
        if child.process is not None
    }


def report(
    launcher: Launcher,
    *roles: str,
    state: "control_pb2.MemberState.ValueType" = READY,
    **fields: Any,
) -> None:
    """What the control plane says of the children of these roles, or of these names."""
    told = [
        (name, pid)
        for name, pid in pids(launcher).items()
        if name in roles or name.rsplit("-", 1)[0] in roles
    ]
    launcher._hear(
        control_pb2.JoinResponse(
            members=[member_of(name, pid, state, **fields) for name, pid in told]
        )
    )


def member_of(
    name: str, pid: int, state: "control_pb2.MemberState.ValueType" = READY, **fields: Any
) -> control_pb2.Member:
    return control_pb2.Member(
        id=f"{name}-{pid}", role=name.rsplit("-", 1)[0], pid=pid, state=state, **fields
    )


def kill(child: Child) -> None:
    assert child.process is not None
    child.process.kill()
    child.process.wait()


def none_lives(launcher: Launcher) -> bool:
    return all(
        child.process is None or child.process.poll() is not None
        for child in launcher._fleet.children
    )


def test_five_failed_starts_in_a_row_end_serve_with_the_last_words(
    make: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(child_module, "FIRST_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(child_module, "LAST_BACKOFF_SECONDS", 0.03)
    started = tmp_path / "started"
    one = make(
        {
            "vision": f"import sys; open({str(started)!r}, 'a').write('x'); sys.exit('the weights "
            "are torn')"
        }
    )
    with structlog.testing.capture_logs() as logs:
        assert one.run() == 1
    assert len(started.read_text()) == MAX_FAILED_STARTS
    assert [entry["wait"] for entry in logs if entry["event"].startswith("service ended")] == [
        0.0,
        0.01,
        0.02,
        0.03,
        0.03,
    ]
    _, _, last_words = capfd.readouterr().err.partition(
        "twinlens serve: vision-0 failed 5 starts in a row. Its last words:\n"
    )
    assert last_words == "the weights are torn\n"
    assert none_lives(one)


def test_a_service_that_was_told_what_cannot_be_ends_serve_at_once(
    make: Make, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    started = tmp_path / "started"
    one = make(
        {
            "llm": f"import sys; open({str(started)!r}, 'a').write('x'); print('no such dtype', "
            "file=sys.stderr); sys.exit(2)"
        }
    )
    assert one.run() == 2
    assert started.read_text() == "x"
    assert capfd.readouterr().err.endswith(
        "twinlens serve: llm-0 failed to start. Its last words:\nno such dtype\n"
    )
    assert none_lives(one)


def test_a_child_that_was_ready_and_dies_is_started_anew_at_once_and_alone(make: Make) -> None:
    one = make()
    assert one._keep_running() is None
    before = pids(one)
    assert len(before) == 6
    report(one, "vision")
    kill(child_of(one, "vision"))
    one._keep_running()
    after = pids(one)
    assert after.pop("vision-0") != before.pop("vision-0")
    assert after == before
    assert child_of(one, "vision").failed_starts == 0


def test_a_child_that_dies_soon_again_waits_for_its_next_start(make: Make) -> None:
    one = make()
    moments = []
    for _ in range(2):
        one._keep_running()
        report(one, "vision")
        kill(child_of(one, "vision"))
        one._keep_running()
        moments.append(child_of(one, "vision").start_at)
    assert moments[0] <= time.monotonic() < moments[1]
    one._keep_running()
    assert child_of(one, "vision").process is None


def test_deaths_of_a_child_that_gets_ready_in_between_never_end_serve(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "FIRST_BACKOFF_SECONDS", 0.0)
    one, child = (one := make()), child_of(one, "vision")
    for death in range(2 * MAX_FAILED_STARTS):
        one._keep_running()
        if death % MAX_FAILED_STARTS == 0:
            report(one, "vision")
        kill(child)
        assert one._keep_running() is None


def test_the_ranks_of_a_group_die_and_meet_anew_together(make: Make) -> None:
    real = child_module.command_of
    one = make(tp=2)

    def meeting():
        return {
            real(child, Path("/run"))[-1] for child in one._fleet.children if child.role == "llm"
        }

    one._keep_running()
    before = pids(one)
    met = meeting()
    assert {"llm-0", "llm-0.1"} < before.keys() and len(met) == 1
    kill(next(child for child in one._fleet.children if child.name == "llm-0.1"))
    one._keep_running()
    process = child_of(one, "llm").process
    assert process is not None and process.wait() == -signal.SIGKILL
    one._keep_running()
    one._keep_running()
    after = pids(one)
    assert {name for name in before if after.get(name) != before[name]} == {"llm-0", "llm-0.1"}
    assert after.keys() == before.keys()
    assert len(meeting()) == 1 and meeting() != met


def test_a_rank_that_is_due_waits_for_the_death_of_its_mate(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make(tp=2)
    one._keep_running()
    waited: list[float | None] = []
    news = SimpleNamespace(
        get=lambda timeout: waited.append(timeout) or (lambda: None), put=lambda _: None
    )
    monkeypatch.setattr(one, "_news", news)
    monkeypatch.setattr(launcher, "signal_child", lambda *_: None)
    kill(next(child for child in one._fleet.children if child.name == "llm-0.1"))
    one._keep_running()
    one._wait()
    assert waited == [None]
    assert "llm-0.1" not in pids(one)
    kill(child_of(one, "llm"))
    one._keep_running()
    assert {"llm-0", "llm-0.1"} < pids(one).keys()


def test_everything_is_ready_when_each_child_is_and_not_after_one_died(make: Make) -> None:
    one = make()
    one._keep_running()
    report(one, *SERVICES, state=STARTING)
    assert not one._all_ready()
    report(one, *SERVICES)
    assert one._all_ready()
    kill(child_of(one, "llm"))
    one._keep_running()
    one._keep_running()
    assert not one._all_ready()


def stubborn(ready: Path, number: str = "SIGINT") -> str:
    """Ignores the signal; opens the pipe once it does."""
    return (
        f"import signal; signal.signal(signal.{number}, signal.SIG_IGN); "
        f"open({str(ready)!r}, 'w').close(); signal.pause()"
    )


def signals_launcher(number: signal.Signals) -> str:
    return (
        "import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        f"os.kill(os.getppid(), {int(number)}); signal.pause()"
    )


def test_sigint_ends_serve_and_every_child(make: Make) -> None:
    """Here none has joined: each could still be importing, where SIGINT would end in a
    traceback."""
    one = make({"controller": signals_launcher(signal.SIGINT)})
    assert one.run() == 0
    assert [child.process.returncode for child in one._fleet.children if child.process] == [
        -signal.SIGTERM
    ] * 6


def test_members_are_stopped_without_a_drain(make: Make) -> None:
    one = make()
    one._keep_running()
    report(one, *SERVICES)
    one._stop_all()
    assert [child.process.returncode for child in one._fleet.children if child.process] == [
        -signal.SIGINT
    ] * 6


def test_sigterm_drains_the_gateway_and_then_ends_the_rest(make: Make) -> None:
    one = make({"controller": signals_launcher(signal.SIGTERM)})
    with structlog.testing.capture_logs() as logs:
        assert one.run() == 0
    assert [(entry["event"], entry["name"]) for entry in logs] == [
        ("draining", "gateway-0"),
        ("service ended", "gateway-0"),
    ]
    assert [child.process.returncode for child in one._fleet.children if child.process] == [
        -signal.SIGTERM
    ] * 5


def test_while_the_gateway_drains_who_dies_is_started_anew(make: Make, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    one = make({"gateway": stubborn(tmp_path / "ready", "SIGTERM")})
    one._keep_running()
    (tmp_path / "ready").read_bytes()
    one._obey(signal.SIGTERM)
    one._keep_running()
    before = pids(one)
    kill(child_of(one, "vision"))
    one._keep_running()
    assert (
        pids(one)["gateway-0"] == before["gateway-0"]
        and pids(one)["vision-0"] != before["vision-0"]
    )
    assert not one._has_drained()


def test_a_signal_while_it_drains_stops_now(make: Make) -> None:
    one = make()
    one._obey(signal.SIGTERM)
    assert not one._stopping
    one._obey(signal.SIGTERM)
    assert one._stopping


def test_a_child_that_ignores_sigint_is_killed_in_the_end(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launcher, "STOP_SECONDS", 0.3)
    os.mkfifo(tmp_path / "ready")
    one = make({"vision": stubborn(tmp_path / "ready")})
    one._keep_running()
    (tmp_path / "ready").read_bytes()
    report(one, *SERVICES)
    one._stop_all()
    ended = {child.role: child.process.returncode for child in one._fleet.children if child.process}
    assert ended["vision"] == -signal.SIGKILL
    assert {ended[role] for role in ("gateway", "preprocess", "llm", "detokenizer")} == {
        -signal.SIGINT
    }
    assert none_lives(one)


def test_a_child_that_ignores_sigint_takes_no_time_from_the_controller(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launcher, "STOP_SECONDS", 0.3)
    given: dict[str, float] = {}

    def wait_for(child: Child, deadline: float) -> None:
        given[child.role] = deadline - time.monotonic()
        real(child, deadline)

    real = launcher.wait_for
    monkeypatch.setattr(launcher, "wait_for", wait_for)
    os.mkfifo(tmp_path / "ready")
    one = make({"vision": stubborn(tmp_path / "ready")})
    one._keep_running()
    (tmp_path / "ready").read_bytes()
    report(one, *SERVICES)
    one._stop_all()
    assert given["controller"] == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize(
    ("host", "http", "grpc"),
    [
        ("127.0.0.1", "http://127.0.0.1:80/v1", "127.0.0.1:81"),
        ("::1", "http://[::1]:80/v1", "[::1]:81"),
    ],
)
def test_what_is_announced_can_be_dialled(
    host: str, http: str, grpc: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Launcher(
        ServeSettings(
            model=str(MODEL), served_model_name="m", host=host, http_port=80, grpc_port=81
        ),
        tmp_path,
    )._announce()
    assert (
        capsys.readouterr().out
        == f"Twinlens serves 'm': OpenAI HTTP on {http}, gRPC on {grpc}. Ctrl-C stops it.\n"
    )


def test_a_second_signal_kills_at_once(make: Make, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    one = make({"vision": stubborn(tmp_path / "ready")})
    one._keep_running()
    (tmp_path / "ready").read_bytes()
    one._stopping = True
    assert not none_lives(one)
    one._on_signal(signal.SIGINT, None)
    process = child_of(one, "vision").process
    assert process is not None and process.wait() == -signal.SIGKILL


def test_children_get_none_of_the_launchers_variables(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TWINLENS_DTYPE", "float16")
    monkeypatch.setenv("ANOTHERS", "kept")
    one = make(
        {
            "llm": f"import json, os; json.dump(dict(os.environ), open({str(tmp_path / 'seen')!r}, "
            "'w'))"
        }
    )
    one._keep_running()
    process = child_of(one, "llm").process
    assert process is not None and process.wait() == 0
    seen = json.loads((tmp_path / "seen").read_text())
    assert seen["ANOTHERS"] == "kept"
    assert not [name for name in seen if name.startswith("TWINLENS_")]


def test_only_the_language_groups_threads_spin_unless_the_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    llm = child_module.child_environment("llm")
    vision = child_module.child_environment("vision")
    assert (llm["GOMP_SPINCOUNT"], llm["OMP_WAIT_POLICY"], vision["OMP_WAIT_POLICY"]) == (
        "1000",
        "passive",
        "passive",
    )
    assert "GOMP_SPINCOUNT" not in vision
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    assert child_module.child_environment("llm")["GOMP_SPINCOUNT"] == "0"


def test_each_child_gets_the_settings_that_its_service_knows(tmp_path: Path) -> None:
    settings = ServeSettings(
        model=str(MODEL),
        vision=2,
        http_port=8123,
        max_model_len=99,
        dtype="float32",
        embedding_cache_mib=0,
    )
    children = Launcher(settings, tmp_path)._fleet.children
    assert sorted(child.name for child in children if child.role in ("vision", "llm")) == [
        "llm-0",
        "vision-0",
        "vision-1",
    ]
    given = {
        child.name: load(
            SERVICES[child.role], argparse.ArgumentParser(), child.arguments, KNOWN_NAMES
        )
        for child in children
    }
    assert given["gateway-0"].http_port == 8123
    assert (given["llm-0"].max_model_len, given["llm-0"].dtype, given["vision-1"].dtype) == (
        99,
        "float32",
        "float32",
    )
    assert given["vision-1"].embedding_cache_mib == 0
    assert len({service.listen for service in given.values()}) == len(children)
    assert {service.controller for service in given.values()} == {
        given["controller-0"].control_listen
    }


def test_what_is_wanted_is_told_and_scaled_to(make: Make) -> None:
    one = make(preprocess=2)
    one._keep_running()
    report(one, *SERVICES)
    one._hear(control_pb2.JoinResponse(wanted={"vision": 3, "preprocess": 1}))
    one._keep_running()
    one._tell_managed()
    assert one._managed.replicas == {"vision": 3, "preprocess": 1, "llm": 1, "detokenizer": 1}
    assert {"vision-0", "vision-1", "vision-2"} < pids(one).keys()
    assert one._fleet.active("preprocess")[0].first.name == "preprocess-0"
    retired = next(replica for replica in one._fleet.replicas if replica.retired)
    assert retired.first.name == "preprocess-1" and retired.first.process is not None
    assert retired.first.process.wait() == -signal.SIGTERM
    one._keep_running()
    assert "preprocess-1" not in pids(one)


def test_a_member_that_an_operator_drains_is_not_replaced(make: Make) -> None:
    one = make(vision=2)
    one._keep_running()
    report(one, *SERVICES)
    drained = child_of(one, "vision").member
    assert drained is not None
    for _ in range(2):  # the controller says it again and again
        one._hear(control_pb2.JoinResponse(drained=[drained.id, "someone-else"]))
        one._keep_running()
    kill(child_of(one, "vision"))
    one._keep_running()
    assert [name for name in pids(one) if name.startswith("vision")] == ["vision-1"]
    assert one._fleet.wanted["vision"] == 1


def test_a_hung_child_is_killed_and_started_anew_with_the_ranks_of_its_group(make: Make) -> None:
    one = make(tp=2)
    one._keep_running()
    report(one, *SERVICES)
    before = pids(one)
    report(one, "llm-0.1", hung=True)
    process = next(child for child in one._fleet.children if child.name == "llm-0.1").process
    assert process is not None and process.wait() == -signal.SIGKILL
    one._keep_running()
    leader = child_of(one, "llm").process
    assert leader is not None and leader.wait() == -signal.SIGKILL
    one._keep_running()
    assert {name for name, pid in pids(one).items() if pid != before[name]} == {"llm-0", "llm-0.1"}


def test_a_frozen_child_is_killed_when_it_does_not_come_back(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make()
    now = SimpleNamespace(seconds=1000.0)
    one._keep_running()
    monkeypatch.setattr(launcher, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    report(one, "vision")
    child = child_of(one, "vision")
    assert child.process is not None
    for state in (DEAD, READY, DEAD):  # it thawed once
        report(one, "vision", state=state)
        now.seconds += launcher.FROZEN_SECONDS
        assert child.process.poll() is None
    report(one, "vision", state=DEAD)
    assert child.process.poll() is None
    now.seconds += 0.1
    report(one, "vision", state=DEAD)
    assert child.process.wait() == -signal.SIGKILL


def test_a_replica_that_was_added_and_cannot_start_is_given_up(
    make: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    one = make()
    one._keep_running()
    report(one, *SERVICES)
    one._announced = True
    one._fleet.wanted["vision"] = 2
    one._keep_running()
    added = next(child for child in one._fleet.children if child.name == "vision-1")
    for _ in range(MAX_FAILED_STARTS):
        added.start_at = 0.0
        one._keep_running()
        kill(added)
        assert one._keep_running() is None
    assert "vision-1" not in pids(one) and one._fleet.wanted["vision"] == 1


def test_by_the_expected_delay_replicas_are_added(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoscale, "UP_SECONDS", 0.0)
    one = make(autoscale="vision=1:3")
    one._keep_running()
    report(one, *SERVICES)
    one._announced = True
    report(one, "vision", expected_delay=5.0)
    one._tell_managed()
    assert (one._managed.replicas["vision"], one._managed.autoscaled["vision"]) == (2, "1:3")


def test_the_bounds_of_autoscaling_bound_the_first_replicas_too(make: Make) -> None:
    assert len(make(autoscale="vision=2:4")._fleet.active("vision")) == 2
