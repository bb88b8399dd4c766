"""How a service ends and with which exit status, and that it does not outlive its launcher."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.process import Stop

ROOT = Path(__file__).parents[2]
DEADLINE = 30.0

SERVICE = """
import threading
from common.checkpoint import BadCheckpoint
from common.config import BadSetting
from common.process import CannotStart, run

def main(settings, stop):
    threading.Thread(target=threading.Event().wait).start()  # a library's thread that never ends
    print("up", flush=True)
    {body}

run("detokenizer", "A service.", main)
"""

# Starts the service and waits for it. Both hold the pipe that the test reads.
PARENT = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], f"--die-with-parent={os.getpid()}"])
"""


@contextmanager
def start(*command: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process in a group of its own, and kill the whole group afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def service(body: str) -> str:
    return SERVICE.format(body=body)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("return", 0, "stopped"),
        ("raise BadCheckpoint('no such model')", 2, "no such model"),
        ("raise BadSetting('--tp 9 is too much')", 2, "--tp 9 is too much"),
        ("raise CannotStart('the port is taken')", 1, "the port is taken"),
        ("raise KeyError('a mistake of ours')", 1, "a mistake of ours"),
    ],
)
def test_a_service_exits_with_a_status_and_a_reason_despite_running_threads(
    body: str, status: int, said: str
) -> None:
    with start(service(body), "--log-format=json") as process:
        out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (status, "up\n")
    assert said in err.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_asks_the_service_to_stop_and_it_ends_in_order(number: signal.Signals) -> None:
    with start(service("stop.wait(); print('put away', flush=True)")) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (0, "put away\n")


def test_a_service_dies_with_its_launcher_even_when_that_is_killed() -> None:
    with start(PARENT, service("stop.wait()")) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "up\n"
        parent.kill()
        # The pipe closes when no process is left that could write to it.
        parent.communicate(timeout=DEADLINE)
    assert parent.returncode == -signal.SIGKILL


def test_a_service_whose_launcher_is_already_dead_does_not_start() -> None:
    with start(service("return"), "--die-with-parent=1") as process:
        out, _ = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (1, "")


def test_a_wrong_flag_ends_with_status_2() -> None:
    with start(service("return"), "--nothing") as process:
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 2
    assert "--nothing" in err


DRAINS = """stop.on_drain(lambda: print("drains", flush=True))
    stop.on_promotion(lambda: print("promoted", flush=True))
    print("can drain", flush=True)
    stop.wait()
    print("stops", flush=True)
    {then}"""


def escalate(*numbers: signal.Signals, then: str = "pass") -> tuple[int, list[str]]:
    """Return status and output of a service that gets each signal after the last one's effect."""
    with start(service(DRAINS.format(then=then))) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(2)]
        for number in numbers:
            process.send_signal(number)
            lines.append(process.stdout.readline().strip())
        out, _ = process.communicate(timeout=DEADLINE)
    assert lines[:2] == ["up", "can drain"]
    return process.returncode, [*lines[2:], *out.split()]


def test_sigterm_drains_a_service_that_can_and_the_second_signal_stops_it() -> None:
    assert escalate(signal.SIGTERM, signal.SIGTERM) == (0, ["drains", "stops"])
    assert escalate(signal.SIGTERM, signal.SIGINT) == (0, ["drains", "stops"])


def test_sigint_stops_a_service_that_can_drain() -> None:
    assert escalate(signal.SIGINT) == (0, ["stops"])


def test_a_signal_to_a_stopping_service_ends_it_at_once() -> None:
    hangs = "threading.Event().wait()"
    assert escalate(signal.SIGINT, signal.SIGINT, then=hangs) == (1, ["stops", ""])
    assert escalate(signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, then=hangs) == (
        1,
        ["drains", "stops", ""],
    )


def test_sigusr1_promotes_and_does_not_escalate() -> None:
    assert escalate(signal.SIGUSR1, signal.SIGTERM, signal.SIGINT) == (
        0,
        ["promoted", "drains", "stops"],
    )


LOCKED_FOREVER = """import ctypes
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    stop.on_drain(lambda: print("drains", flush=True))
    print("in a call", flush=True)
    lock(mutex)
    lock(mutex)"""


def test_a_signal_is_handled_while_the_main_thread_is_in_a_long_call() -> None:
    with start(service(LOCKED_FOREVER)) as process:
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["up", "in a call"]
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "drains\n"
        process.kill()


def test_draining_begins_only_once() -> None:
    begun: list[bool] = []
    stop = Stop()
    stop.on_drain(lambda: begun.append(True))
    stop.drain()
    stop.drain()
    assert begun == [True]
    assert not stop.is_set()


def test_a_service_that_cannot_drain_stops() -> None:
    stop = Stop()
    stop.drain()
    assert stop.is_set()
