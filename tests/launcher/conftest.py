"""Launchers and supervisors whose children are processes of one line, ended after the test."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.settings import ServeSettings
from services.launcher import launcher as launcher_module
from services.launcher.launcher import Launcher
from services.launcher.supervisor import Supervisor
from tests.launcher.processes import MODEL, run_lines

Launch = Callable[..., Launcher]
Supervise = Callable[..., Supervisor]


class NoMembership:
    """Stands in for the launcher's connection to the controller, which is a test's process."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def report(self) -> None:
        pass

    def leave(self) -> None:
        pass


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Launch]:
    """Make a launcher whose children run the given line of Python, by role, or wait."""
    made: list[Launcher] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(launcher_module, "Membership", NoMembership)

    def launch(lines: dict[str, str] | None = None, **settings: Any) -> Launcher:
        serve_settings = ServeSettings(model=str(MODEL), served_model_name="tiny", **settings)
        made.append(Launcher(serve_settings, tmp_path, run_lines(lines or {})))
        return made[-1]

    yield launch
    for launcher in made:
        for child in launcher.supervisor.fleet.children:
            if child.process is not None:
                child.process.kill()
                child.process.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def supervise(launch: Launch) -> Supervise:
    """Make a supervisor in the same way."""
    return lambda *lines, **settings: launch(*lines, **settings).supervisor
