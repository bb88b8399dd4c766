"""The whole run of a launcher: how it ends, and how it handles signals."""

import os
import signal
from pathlib import Path

import pytest
import structlog

from common.process import EXIT_FAILED, EXIT_USAGE
from common.settings import ServeSettings
from services.launcher import child as child_module
from services.launcher import supervisor as supervisor_module
from services.launcher.child import MAX_FAILED_STARTS
from services.launcher.launcher import announce
from tests.launcher.conftest import Launch
from tests.launcher.processes import ignoring, none_lives, statuses

SIGNALS_LAUNCHER = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.kill(os.getppid(), {number})
signal.pause()
"""
# Answers each SIGTERM of the launcher with another signal to it, and asks for the first one.
SIGNALS_LAUNCHER_AGAIN = """
import os, signal
def answer(*_):
    {then}
    os.kill(os.getppid(), {number})
signal.signal(signal.SIGTERM, answer)
os.kill(os.getppid(), {number})
while True:
    signal.pause()
"""


def signals_launcher(number: signal.Signals) -> str:
    return SIGNALS_LAUNCHER.format(number=int(number))


def signals_launcher_again(number: signal.Signals, then: str = "pass") -> str:
    return SIGNALS_LAUNCHER_AGAIN.format(number=int(number), then=then)


def test_five_failed_starts_in_a_row_end_serve_with_the_last_output(
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(child_module, "FIRST_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(child_module, "LAST_BACKOFF_SECONDS", 0.03)
    started = tmp_path / "started"
    line = f"import sys; open({str(started)!r}, 'a').write('x'); sys.exit('the weights are torn')"
    launcher = launch({"vision": line})
    with structlog.testing.capture_logs() as logs:
        assert launcher.run() == EXIT_FAILED
    assert len(started.read_text()) == MAX_FAILED_STARTS
    waits = [entry["wait"] for entry in logs if entry["event"].startswith("service exited")]
    assert waits == [0.0, 0.01, 0.02, 0.03, 0.03]
    _, _, last_lines = capfd.readouterr().err.partition(
        "twinlens serve: vision-0 failed 5 starts in a row. Its last output:\n"
    )
    assert last_lines == "the weights are torn\n"
    assert none_lives(launcher.supervisor)


def test_a_service_that_refuses_its_settings_ends_serve_at_once(
    launch: Launch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    started = tmp_path / "started"
    line = (
        f"import sys; open({str(started)!r}, 'a').write('x'); "
        "print('no such dtype', file=sys.stderr); sys.exit(2)"
    )
    launcher = launch({"llm": line})
    assert launcher.run() == EXIT_USAGE
    assert started.read_text() == "x"
    assert capfd.readouterr().err.endswith(
        "twinlens serve: llm-0 failed to start. Its last output:\nno such dtype\n"
    )
    assert none_lives(launcher.supervisor)


def test_sigint_ends_serve_and_every_child(launch: Launch) -> None:
    """No child has joined, so each may still be importing: SIGINT would end it with a traceback."""
    launcher = launch({"controller": signals_launcher(signal.SIGINT)})
    assert launcher.run() == 0
    assert list(statuses(launcher.supervisor).values()) == [-signal.SIGTERM] * 6


def test_sigterm_drains_the_gateway_and_then_ends_the_rest(launch: Launch) -> None:
    launcher = launch({"controller": signals_launcher(signal.SIGTERM)})
    with structlog.testing.capture_logs() as logs:
        assert launcher.run() == 0
    assert [(entry["event"], entry["name"]) for entry in logs] == [
        ("draining", "gateway-0"),
        ("service exited", "gateway-0"),
    ]
    assert list(statuses(launcher.supervisor).values()) == [-signal.SIGTERM] * 5


def test_a_second_signal_stops_a_drain(launch: Launch) -> None:
    """The gateway does not drain: it answers SIGTERM by sending the launcher a second one."""
    exits_next_time = "signal.signal(signal.SIGTERM, signal.SIG_DFL)"
    launcher = launch({"gateway": signals_launcher_again(signal.SIGTERM, exits_next_time)})
    assert launcher.run() == 0
    assert list(statuses(launcher.supervisor).values()) == [-signal.SIGTERM] * 6


def test_a_signal_while_it_stops_kills_at_once(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "STOP_SECONDS", 1000.0)
    launcher = launch({"vision": signals_launcher_again(signal.SIGINT)})
    assert launcher.run() == 0
    assert statuses(launcher.supervisor)["vision-0"] == -signal.SIGKILL


def test_a_child_that_ignores_its_signal_is_killed_in_the_end(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(supervisor_module, "STOP_SECONDS", 0.3)
    os.mkfifo(tmp_path / "ready")
    waits_for_vision = f"open({str(tmp_path / 'ready')!r}).read(); "
    launcher = launch(
        {
            "vision": ignoring("SIGTERM", tmp_path / "ready"),
            "controller": waits_for_vision + signals_launcher(signal.SIGINT).strip(),
        }
    )
    assert launcher.run() == 0
    assert statuses(launcher.supervisor) == {
        "controller-0": -signal.SIGTERM,
        "gateway-0": -signal.SIGTERM,
        "preprocess-0": -signal.SIGTERM,
        "vision-0": -signal.SIGKILL,
        "llm-0": -signal.SIGTERM,
        "detokenizer-0": -signal.SIGTERM,
    }


@pytest.mark.parametrize(
    ("host", "http", "grpc"),
    [
        ("127.0.0.1", "http://127.0.0.1:80/v1", "127.0.0.1:81"),
        ("::1", "http://[::1]:80/v1", "[::1]:81"),
    ],
)
def test_the_announced_addresses_can_be_dialled(
    host: str, http: str, grpc: str, capsys: pytest.CaptureFixture[str]
) -> None:
    announce(ServeSettings(served_model_name="m", host=host, http_port=80, grpc_port=81))
    assert (
        capsys.readouterr().out
        == f"Twinlens serves 'm': OpenAI HTTP on {http}, gRPC on {grpc}. Ctrl-C stops it.\n"
    )
