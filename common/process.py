"""The life cycle that all services share: settings, logging, signals and the exit status."""

import argparse
import ctypes
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from common.checkpoint import BadCheckpoint
from common.config import BadSetting, load
from common.logs import get_logger, report_left_out, set_up_logging
from common.settings import KNOWN_NAMES, SERVICES

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
"""A setting or the model directory is wrong: starting again with the same ones is pointless."""
EXIT_INTERRUPTED = 130
PR_SET_PDEATHSIG = 1


class CannotStart(Exception):
    """The service cannot start or continue; the message tells its operator why."""


class Stop(threading.Event):
    """An event that is set when the process must stop now.

    A service that can finish what it holds registers `on_drain`, and exits by itself once drained.
    """

    def __init__(self) -> None:
        super().__init__()
        self._begin_drain: Callable[[], None] | None = None
        self._promote: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._draining = False

    def on_drain(self, begin: Callable[[], None]) -> None:
        """Register `begin`, which is called once, from another thread, when draining begins.

        From then on the service must accept no new work and exit when it holds none.
        """
        self._begin_drain = begin

    def drain(self) -> None:
        """Begin to drain, or stop now if the service cannot drain. Repeated calls do nothing."""
        with self._lock:
            is_first = not self._draining
            self._draining = True
        if self._begin_drain is None:
            self.set()
        elif is_first:
            self._begin_drain()

    def on_promotion(self, promote: Callable[[], None]) -> None:
        """Register `promote`, which is called, from another thread, when a standby must go live."""
        self._promote = promote

    def promote(self) -> None:
        """Put a standby to work (on SIGUSR1)."""
        self._promote()


def run(role: str, description: str, main: Callable[[Any, Stop], None]) -> None:
    """Run `main(settings, stop)` as the process of a role, then exit.

    SIGTERM drains and SIGINT stops. Each further signal escalates: from draining to stopping, and
    from stopping to exiting at once.
    """
    write_utf8()
    parser = argparse.ArgumentParser(
        f"python -m services.{role}", description=description, allow_abbrev=False
    )
    settings: Any = load(SERVICES[role], parser, None, KNOWN_NAMES)
    set_up_logging(role, settings.log_format, settings.log_level)
    stop = Stop()
    signals = open_signal_pipe()
    threading.Thread(
        target=handle_signals, args=(signals, stop), name="signals", daemon=True
    ).start()
    if settings.die_with_parent:
        die_with_parent(settings.die_with_parent)
    leave(run_main(main, settings, stop))


def write_utf8() -> None:
    """Let the standard streams write any text, whatever the locale is."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def run_main(main: Callable[[Any, Stop], None], settings: Any, stop: Stop) -> int:
    """Run `main` and return the exit status; an exception is logged with its reason."""
    log = get_logger()
    try:
        main(settings, stop)
    except (BadCheckpoint, BadSetting) as e:
        log.error("cannot start", reason=str(e))
        return EXIT_USAGE
    except CannotStart as e:
        log.error("cannot continue", reason=str(e))
        return EXIT_FAILED
    except Exception:  # the outermost loop: log the error, and let the launcher restart the service
        log.exception("failed")
        return EXIT_FAILED
    log.info("stopped")
    return EXIT_OK


def open_signal_pipe() -> int:
    """Return a file descriptor from which the numbers of arriving signals can be read.

    Another thread reads it, because the main thread may be in a library call for seconds.
    """
    incoming, outgoing = os.pipe()
    os.set_blocking(outgoing, False)
    signal.set_wakeup_fd(outgoing)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    return incoming


def handle_signals(signals: int, stop: Stop) -> None:
    """Act on each signal number read from `signals`, forever."""
    asked_to_drain = False
    while True:
        [number] = os.read(signals, 1)
        if number == signal.SIGUSR1:
            stop.promote()
        elif stop.is_set():
            leave(EXIT_FAILED)
        elif number == signal.SIGTERM and not asked_to_drain:
            asked_to_drain = True
            stop.drain()
        else:
            stop.set()


def leave(status: int) -> None:
    """Exit without waiting for library threads that may hang in a call."""
    report_left_out()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def die_with_parent(pid: int) -> None:
    """Ask the kernel to kill this process when its parent, the launcher, dies in any way (Linux).

    Exits if the parent is no longer the process `pid`, that is, if it died before this call.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != pid:
        sys.exit(EXIT_FAILED)
