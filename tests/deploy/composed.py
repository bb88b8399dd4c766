"""The system as `docker compose` runs it, as clients and operators see it."""

import json
import os
import signal
import subprocess
import threading
import urllib.error
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from common.membership import state_name
from tests.deploy.load import picture
from tests.loopback import free_port
from tests.policy.sources import ROOT
from tests.system.running import Running, ask_about, own_environment, until

PROJECT = "twinlens-test"
START_SECONDS = 180
SCALE_SECONDS = 120


def docker(*arguments: str) -> str:
    """Run docker and return its output; an AssertionError has the output of a failure."""
    done = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        env=own_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (
        f"docker {' '.join(arguments)}: {(done.stdout + done.stderr)[-2000:]}"
    )
    return done.stdout


class Composed(Running):
    """A Compose project of its own, next to whatever else the engine runs."""

    def __init__(self) -> None:
        self.http_port = free_port()
        self.grpc_port = free_port()
        self.environment = own_environment() | {
            "COMPOSE_PROJECT_NAME": PROJECT,
            "TWINLENS_HTTP_PORT": str(self.http_port),
            "TWINLENS_GRPC_PORT": str(self.grpc_port),
            "TWINLENS_LOG_LEVEL": "debug",
        }

    def __enter__(self) -> "Composed":
        self.compose("up", "--detach", "--no-build")
        self.until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.compose("down", "--volumes", "--timeout", "20")

    def compose(self, *arguments: str) -> str:
        done = subprocess.run(
            ["docker", "compose", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
        )
        assert done.returncode == 0, (
            f"docker compose {' '.join(arguments)}: {(done.stdout + done.stderr)[-2000:]}"
        )
        return done.stdout

    def scale(self, **replicas: int) -> None:
        """Scale these services, and all others to one. Return when exactly that many are ready."""
        counts = [
            part for role, count in replicas.items() for part in ("--scale", f"{role}={count}")
        ]
        self.compose("up", "--detach", "--no-build", "--no-recreate", *counts)
        for role, count in replicas.items():
            until(
                lambda: self.states(role) == ["ready"] * count,  # noqa: B023
                f"{count} of {role} are ready",
                SCALE_SECONDS,
            )

    def containers(self, service: str = "") -> list[str]:
        return self.compose("ps", "--all", "--quiet", *([service] if service else [])).split()

    def until_ready(self) -> None:
        until(lambda: self.answers("/readyz") == 200, "the gateway is ready", START_SECONDS)

    def answers(self, path: str) -> int:
        """Return the HTTP status, or 0 if nothing listens."""
        try:
            return self.get(path)[0]
        except (OSError, urllib.error.URLError):
            return 0

    def states(self, role: str) -> list[str]:
        return [state_name(member.state) for member in self.members(role)]


def inspect(container: str, what: str) -> Any:
    return json.loads(docker("inspect", "--format", f"{{{{json {what}}}}}", container))


def crash(container: str) -> None:
    """Kill the container's process, and return when the engine has restarted it.

    Unlike a stopped container, a killed one is restarted.
    """
    pid = inspect(container, ".State.Pid")
    restarts = inspect(container, ".RestartCount")
    assert pid > 0
    os.kill(pid, signal.SIGKILL)
    until(lambda: inspect(container, ".RestartCount") > restarts, f"{container} is started again")


class Load:
    """Clients that ask about new pictures, one after another, until they are stopped."""

    def __init__(self, system: Composed) -> None:
        self.outcomes: Counter[str] = Counter()
        self._system = system
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        while not self._stop.is_set():
            outcome = self._ask()
            with self._lock:
                self.outcomes[outcome] += 1

    def _ask(self) -> str:
        try:
            status, answer = self._system.chat(ask_about(picture()), max_tokens=4, ignore_eos=True)
        except (OSError, urllib.error.URLError, json.JSONDecodeError) as e:
            return f"{type(e).__name__}: {e}"
        if status != 200:
            return f"{status}: {answer}"
        return "answered" if answer["usage"]["completion_tokens"] == 4 else f"short: {answer}"

    def stop(self) -> None:
        self._stop.set()

    def more(self, count: int = 20) -> None:
        """Return when `count` more requests were answered."""
        wanted = self.outcomes["answered"] + count
        until(
            lambda: self.outcomes["answered"] >= wanted or self.failures(),
            f"{count} more answers",
            120,
        )

    def failures(self) -> dict[str, int]:
        return {outcome: count for outcome, count in self.outcomes.items() if outcome != "answered"}


@contextmanager
def under_load(system: Composed, clients: int = 6) -> Iterator[Load]:
    """Keep clients busy meanwhile, and fail if any of their requests fails."""
    load = Load(system)
    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(load.run) for _ in range(clients)]
        try:
            load.more()
            yield load
            load.more()
        finally:
            load.stop()
    for client in running:
        client.result()
    print(f"{load.outcomes['answered']} answered, failed: {load.failures()}")
    assert load.failures() == {}
