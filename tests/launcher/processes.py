"""Children of a launcher that run one line of Python, and the controller's reports about them."""

import sys
from pathlib import Path
from typing import Any

from common.membership import READY
from proto.twinlens.control.v1 import control_pb2
from services.launcher.child import Child
from services.launcher.supervisor import Command, Supervisor
from tests.system.running import GOLDEN

MODEL = GOLDEN / "a_image" / "checkpoint"


def run_lines(lines: dict[str, str]) -> Command:
    """Return a command that runs a role's line of Python; a role without one waits forever."""

    def command_of(child: Child, _: Path) -> list[str]:
        line = lines.get(child.role)
        return [sys.executable, "-I", "-S", "-c", line] if line else ["sleep", "infinity"]

    return command_of


def ignoring(number: str, ready: Path) -> str:
    """Return a line that ignores the signal, and opens the pipe `ready` once it does."""
    return (
        f"import signal; signal.signal(signal.{number}, signal.SIG_IGN); "
        f"open({str(ready)!r}, 'w').close(); signal.pause()"
    )


def child_named(supervisor: Supervisor, name: str) -> Child:
    return next(child for child in supervisor.fleet.children if child.name == name)


def pids(supervisor: Supervisor) -> dict[str, int]:
    """Return the process of each child that has one, by the child's name."""
    return {
        child.name: child.process.pid
        for child in supervisor.fleet.children
        if child.process is not None
    }


def statuses(supervisor: Supervisor) -> dict[str, int | None]:
    """Return the exit status of each child that has, or had, a process since its last start."""
    return {
        child.name: child.process.returncode
        for child in supervisor.fleet.children
        if child.process is not None
    }


def none_lives(supervisor: Supervisor) -> bool:
    return all(
        child.process is None or child.process.poll() is not None
        for child in supervisor.fleet.children
    )


def kill(supervisor: Supervisor, name: str) -> None:
    process = child_named(supervisor, name).process
    assert process is not None
    process.kill()
    process.wait()


def wait_for_status(supervisor: Supervisor, name: str) -> int:
    process = child_named(supervisor, name).process
    assert process is not None
    return process.wait()


def report(
    supervisor: Supervisor,
    *names: str,
    state: "control_pb2.MemberState.ValueType" = READY,
    **fields: Any,
) -> None:
    """Let the controller report these children, or all if none is named."""
    members = [
        control_pb2.Member(
            id=f"{name}-{pid}", role=name.rsplit("-", 1)[0], pid=pid, state=state, **fields
        )
        for name, pid in pids(supervisor).items()
        if not names or name in names
    ]
    supervisor.on_response(control_pb2.JoinResponse(members=members))
