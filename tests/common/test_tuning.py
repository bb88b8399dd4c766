"""A service applies the tuning of its role itself, once; what the operator sets wins."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from common import tuning
from common.tuning import MARK, TUNING, apply_tuning, with_tuning

ROOT = Path(__file__).parents[2]
BARE = {
    name: value
    for name, value in os.environ.items()
    if name not in TUNING["llm"] and name != MARK and not name.startswith("TWINLENS_")
}
"""The environment of a shell that sets none of the variables."""
DEADLINE = 60.0

PROGRAM = """
import os
before = os.getpid()
from common.tuning import apply_tuning
apply_tuning("llm")
import json, sys
print(json.dumps([before, sys.argv[1:], sys.flags.safe_path, dict(os.environ)]))
"""


def run_program(*arguments: str, **environment: str) -> tuple[int, list[str], bool, dict[str, str]]:
    """Return pid, arguments, safe-path flag and environment of a process after its tuning."""
    command = [sys.executable, "-P", "-c", PROGRAM, *arguments]
    done = subprocess.run(
        command,
        env=BARE | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE,
    )
    pid, argv, safe_path, seen = json.loads(done.stdout)
    return pid, argv, safe_path, seen


def test_idle_threads_sleep_and_only_the_language_groups_spin_before() -> None:
    assert TUNING["vision"]["OMP_WAIT_POLICY"] == TUNING["llm"]["OMP_WAIT_POLICY"] == "passive"
    assert TUNING["llm"].items() - TUNING["vision"].items() == {("GOMP_SPINCOUNT", "1000")}


def test_a_role_that_does_not_compute_is_not_tuned() -> None:
    assert with_tuning("gateway", {"OWN": "1"}) == {"OWN": "1"}


def test_a_bare_process_gets_the_variables_and_keeps_its_pid_arguments_and_options() -> None:
    pid, argv, safe_path, seen = run_program("--flag=a b", "")
    assert TUNING["llm"].items() <= seen.items()
    assert seen[MARK] == str(pid)
    assert (argv, safe_path) == (["--flag=a b", ""], True)


@pytest.mark.parametrize("value", ["0", ""])
def test_a_value_of_the_operator_wins_even_an_empty_one(value: str) -> None:
    _, _, _, seen = run_program(GOMP_SPINCOUNT=value)
    assert (TUNING["llm"] | {"GOMP_SPINCOUNT": value}).items() <= seen.items()


def test_a_process_that_has_all_variables_is_not_executed_again() -> None:
    _, _, _, seen = run_program(**TUNING["llm"])
    assert MARK not in seen


def test_a_process_is_executed_again_only_once_even_if_a_variable_gets_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executed: list[Mapping[str, str]] = []
    monkeypatch.setattr(tuning.os, "environ", dict(BARE))
    monkeypatch.setattr(tuning.os, "execve", lambda _path, _argv, env: executed.append(env))
    apply_tuning("vision")
    lost, *_ = TUNING["vision"]
    monkeypatch.setattr(
        tuning.os, "environ", {name: value for name, value in executed[0].items() if name != lost}
    )
    apply_tuning("vision")
    assert len(executed) == 1


def test_a_service_that_was_started_bare_is_tuned_and_handles_signals() -> None:
    """It also still dies with its launcher, which checks the parent's pid."""
    flags = ("--simulate-vision-ms=1", "--log-format=json", f"--die-with-parent={os.getpid()}")
    with subprocess.Popen(
        [sys.executable, "-m", "services.vision", *flags],
        cwd=ROOT,
        env=BARE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        watchdog = threading.Timer(DEADLINE, process.kill)
        watchdog.start()
        assert process.stderr is not None
        assert any('"event": "ready"' in line for line in process.stderr)
        seen = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        watchdog.cancel()
    assert {f"{name}={value}".encode() for name, value in TUNING["vision"].items()} <= set(seen)
    assert process.returncode == 0
