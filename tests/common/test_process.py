"""The life of a service: how it ends, with which status, and that it does not outlive its
launcher."""

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

# Starts the service and stays; both hold the pipe that the test reads.
PARENT = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], f"--die-with-parent={os.getpid()}"])
"""


@contextmanager
def start(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, of which nothing is left afterwards."""
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
def test_a_service_ends_with_a_status_and_its_reason_whatever_threads_are_left(
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
        # The pipe's end comes when nobody is left who could write to it.
        parent.communicate(timeout=DEADLINE)
    assert parent.returncode == -signal.SIGKILL


def test_a_service_whose_launcher_died_before_it_could_ask_does_not_start() -> None:
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


def ladder(*numbers: signal.Signals, then: str = "pass") -> tuple[int, list[str]]:
    """Status and output of a service that gets these signals, each when the last one has shown."""
    with start(service(DRAINS.format(then=then))) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(2)]
        for number in numbers:
            process.send_signal(number)
            lines.append(process.stdout.readline().strip())
        out, _ = process.communicate(timeout=DEADLINE)
    assert lines[:2] == ["up", "can drain"]
    return process.returncode, [*lines[2:], *out.split()]


def test_sigterm_asks_a_service_that_can_drain_to_do_so_and_the_second_signal_stops_it() -> None:
    assert ladder(signal.SIGTERM, signal.SIGTERM) == (0, ["drains", "stops"])
    assert ladder(signal.SIGTERM, signal.SIGINT) == (0, ["drains", "stops"])


def test_sigint_stops_a_service_that_can_drain() -> None:
    assert ladder(signal.SIGINT) == (0, ["stops"])


def test_a_signal_to_a_service_that_stops_ends_it_at_once() -> None:
    hangs = "threading.Event().wait()"
    assert ladder(signal.SIGINT, signal.SIGINT, then=hangs) == (1, ["stops", ""])
    assert ladder(signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, then=hangs) == (
        1,
        ["drains", "stops", ""],
    )


def test_sigusr1_promotes_and_is_no_step_towards_the_end() -> None:
    assert ladder(signal.SIGUSR1, signal.SIGTERM, signal.SIGINT) == (
        0,
        ["promoted", "drains", "stops"],
    )


LOCKED_FOR_EVER = """import ctypes
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    stop.on_drain(lambda: print("drains", flush=True))
    print("in a call", flush=True)
    lock(mutex)
    lock(mutex)"""


def test_a_signal_is_heard_while_the_main_thread_is_in_a_long_call() -> None:
    with start(service(LOCKED_FOR_EVER)) as process:
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["up", "in a call"]
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "drains\n"
        process.kill()


def test_draining_begins_once_however_often_it_is_asked_for() -> None:
    begun: list[bool] = []
    stop = Stop()
    stop.on_drain(lambda: begun.append(True))
    stop.drain()
    stop.drain()
    assert (begun, stop.is_set()) == ([True], False)


def test_who_cannot_drain_stops() -> None:
    stop = Stop()
    stop.drain()
    assert stop.is_set()
