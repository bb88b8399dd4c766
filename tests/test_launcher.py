"""The launcher starts, watches, restarts and stops its children; here they are processes of one line."""

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
from common.membership import READY, STARTING
from common.settings import KNOWN_NAMES, SERVICES, ServeSettings
from proto.twinlens.control.v1 import control_pb2
from services import launcher
from services.launcher import MAX_FAILED_STARTS, Child, Launcher
from tests.system.running import GOLDEN

MODEL = GOLDEN / "a_image" / "checkpoint"
WAITS = "import signal; signal.pause()"


class NoControlPlane:
    def __init__(self, *_: Any) -> None:
        pass

    def leave(self) -> None:
        pass


Make = Callable[..., Launcher]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Make]:
    """Makes a launcher whose children run the given line of Python, by role, or wait."""
    made: list[Launcher] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def make(tp: int = 1, **lines: str) -> Launcher:
        command_of = lambda child, _: [sys.executable, "-I", "-S", "-c", lines.get(child.role, WAITS)]  # noqa: E731
        monkeypatch.setattr(launcher, "command_of", command_of)
        monkeypatch.setattr(launcher, "Membership", NoControlPlane)
        made.append(Launcher(ServeSettings(model=str(MODEL), served_model_name="tiny", tp=tp), tmp_path))
        return made[-1]

    yield make
    for one in made:
        for child in one._children:
            if child.process is not None:
                child.process.kill()
                child.process.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def child_of(launcher: Launcher, role: str) -> Child:
    return next(child for child in launcher._children if child.role == role)


def pids(launcher: Launcher) -> dict[str, int]:
    return {child.name: child.process.pid for child in launcher._children if child.process is not None}


def report(launcher: Launcher, *roles: str, state: "control_pb2.MemberState.ValueType" = READY) -> None:
    """What the control plane says of the children of these roles."""
    launcher._on_members(
        [control_pb2.Member(pid=pid, state=state) for name, pid in pids(launcher).items() if name.rsplit("-", 1)[0] in roles]
    )


def kill(child: Child) -> None:
    assert child.process is not None
    child.process.kill()
    child.process.wait()


def none_lives(launcher: Launcher) -> bool:
    return all(child.process is None or child.process.poll() is not None for child in launcher._children)


def test_five_failed_starts_in_a_row_end_serve_with_the_last_words(
    make: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(launcher, "FIRST_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(launcher, "LAST_BACKOFF_SECONDS", 0.03)
    started = tmp_path / "started"
    one = make(vision=f"import sys; open({str(started)!r}, 'a').write('x'); sys.exit('the weights are torn')")
    with structlog.testing.capture_logs() as logs:
        assert one.run() == 1
    assert len(started.read_text()) == MAX_FAILED_STARTS
    assert [entry["wait"] for entry in logs if entry["event"].startswith("service ended")] == [0.0, 0.01, 0.02, 0.03, 0.03]
    _, _, last_words = capfd.readouterr().err.partition("twinlens serve: vision-0 failed 5 starts in a row. Its last words:\n")
    assert last_words == "the weights are torn\n"
    assert none_lives(one)


def test_a_service_that_was_told_what_cannot_be_ends_serve_at_once(make: Make, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    started = tmp_path / "started"
    one = make(llm=f"import sys; open({str(started)!r}, 'a').write('x'); print('no such dtype', file=sys.stderr); sys.exit(2)")
    assert one.run() == 2
    assert started.read_text() == "x"
    assert capfd.readouterr().err.endswith("twinlens serve: llm-0 failed to start. Its last words:\nno such dtype\n")
    assert none_lives(one)


def test_a_child_that_was_ready_and_dies_is_started_anew_at_once_and_alone(make: Make) -> None:
    one = make()
    assert one._keep_running() is None
    before = pids(one)
    assert len(before) == 6
    report(one, "vision")
    kill(child_of(one, "vision"))
    one._keep_running()
    assert "vision-0" not in pids(one)
    one._keep_running()
    after = pids(one)
    assert after.pop("vision-0") != before.pop("vision-0")
    assert after == before
    assert child_of(one, "vision").failed_starts == 0


def test_a_child_that_dies_soon_again_waits_for_its_next_start(make: Make) -> None:
    one, moments = make(), []
    for _ in range(2):
        one._keep_running()
        report(one, "vision")
        kill(child_of(one, "vision"))
        one._keep_running()
        moments.append(child_of(one, "vision").start_at)
    assert moments[0] <= time.monotonic() < moments[1]
    one._keep_running()
    assert child_of(one, "vision").process is None


def test_deaths_of_a_child_that_gets_ready_in_between_never_end_serve(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "FIRST_BACKOFF_SECONDS", 0.0)
    one, child = (one := make()), child_of(one, "vision")
    for death in range(2 * MAX_FAILED_STARTS):
        one._keep_running()
        if death % MAX_FAILED_STARTS == 0:
            report(one, "vision")
        kill(child)
        assert one._keep_running() is None


def test_the_ranks_of_a_group_die_and_meet_anew_together(make: Make) -> None:
    real = launcher.command_of
    one = make(tp=2)
    meeting = lambda: {real(child, Path("/run"))[-1] for child in one._children if child.role == "llm"}  # noqa: E731
    one._keep_running()
    before, met = pids(one), meeting()
    assert {"llm-0", "llm-0.1"} < before.keys() and len(met) == 1
    kill(next(child for child in one._children if child.name == "llm-0.1"))
    one._keep_running()
    process = child_of(one, "llm").process
    assert process is not None and process.wait() == -signal.SIGKILL
    one._keep_running()
    one._keep_running()
    after = pids(one)
    assert {name for name in before if after.get(name) != before[name]} == {"llm-0", "llm-0.1"}
    assert after.keys() == before.keys()
    assert len(meeting()) == 1 and meeting() != met


def test_a_rank_that_is_due_waits_for_the_death_of_its_mate(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make(tp=2)
    one._keep_running()
    waited: list[float | None] = []
    monkeypatch.setattr(one, "_changed", SimpleNamespace(get=lambda timeout: waited.append(timeout), put=lambda _: None))
    monkeypatch.setattr(launcher, "signal_child", lambda *_: None)
    kill(next(child for child in one._children if child.name == "llm-0.1"))
    one._keep_running()
    one._wait()
    kill(child_of(one, "llm"))
    one._keep_running()
    one._wait()
    assert waited == [None, 0.0]


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_serve_and_every_child(make: Make, number: signal.Signals) -> None:
    one = make(controller=f"import os, signal; os.kill(os.getppid(), {int(number)}); signal.pause()")
    assert one.run() == 0
    assert [child.process.returncode for child in one._children if child.process] == [-signal.SIGTERM] * 6


def stubborn(ready: Path) -> str:
    """Ignores SIGTERM; opens the pipe once it does."""
    return f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(ready)!r}, 'w').close(); signal.pause()"


def test_a_child_that_ignores_sigterm_is_killed_in_the_end(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launcher, "STOP_SECONDS", 0.3)
    os.mkfifo(tmp_path / "ready")
    one = make(vision=stubborn(tmp_path / "ready"))
    one._keep_running()
    (tmp_path / "ready").read_bytes()
    one._stop_all()
    ended = {child.role: child.process.returncode for child in one._children if child.process}
    assert ended["vision"] == -signal.SIGKILL
    assert {ended[role] for role in ("gateway", "preprocess", "llm", "detokenizer")} == {-signal.SIGTERM}
    assert none_lives(one)


def test_a_child_that_ignores_sigterm_takes_no_time_from_the_controller(
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
    one = make(vision=stubborn(tmp_path / "ready"))
    one._keep_running()
    (tmp_path / "ready").read_bytes()
    one._stop_all()
    assert given["controller"] == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize(
    ("host", "http", "grpc"),
    [("127.0.0.1", "http://127.0.0.1:80/v1", "127.0.0.1:81"), ("::1", "http://[::1]:80/v1", "[::1]:81")],
)
def test_what_is_announced_can_be_dialled(host: str, http: str, grpc: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Launcher(ServeSettings(model=str(MODEL), served_model_name="m", host=host, http_port=80, grpc_port=81), tmp_path)._announce()
    assert capsys.readouterr().out == f"Twinlens serves 'm': OpenAI HTTP on {http}, gRPC on {grpc}. Ctrl-C stops it.\n"


def test_a_second_signal_kills_at_once(make: Make, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    one = make(vision=stubborn(tmp_path / "ready"))
    one._keep_running()
    (tmp_path / "ready").read_bytes()
    one._on_signal()
    assert not none_lives(one)
    one._on_signal()
    process = child_of(one, "vision").process
    assert process is not None and process.wait() == -signal.SIGKILL


def test_children_get_none_of_the_launchers_variables(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TWINLENS_DTYPE", "float16")
    monkeypatch.setenv("ANOTHERS", "kept")
    one = make(llm=f"import json, os; json.dump(dict(os.environ), open({str(tmp_path / 'seen')!r}, 'w'))")
    one._keep_running()
    process = child_of(one, "llm").process
    assert process is not None and process.wait() == 0
    seen = json.loads((tmp_path / "seen").read_text())
    assert seen["ANOTHERS"] == "kept"
    assert not [name for name in seen if name.startswith("TWINLENS_")]


def test_each_child_gets_the_settings_that_its_service_knows(tmp_path: Path) -> None:
    settings = ServeSettings(model=str(MODEL), vision=2, http_port=8123, max_model_len=99, dtype="float32", embedding_cache_mib=0)
    children = Launcher(settings, tmp_path)._children
    assert sorted(child.name for child in children if child.role in ("vision", "llm")) == ["llm-0", "vision-0", "vision-1"]
    given = {child.name: load(SERVICES[child.role], argparse.ArgumentParser(), child.arguments, KNOWN_NAMES) for child in children}
    assert given["gateway-0"].http_port == 8123
    assert (given["llm-0"].max_model_len, given["llm-0"].dtype, given["vision-1"].dtype) == (99, "float32", "float32")
    assert given["vision-1"].embedding_cache_mib == 0
    assert len({service.listen for service in given.values()}) == len(children)
    assert {service.controller for service in given.values()} == {given["controller-0"].control_listen}
