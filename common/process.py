"""The life that every service shares: settings, logging, signals, the launcher's death, the exit
status."""

import argparse
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from common.checkpoint import BadCheckpoint
from common.config import BadSetting, load
from common.logs import get_logger, set_up_logging
from common.settings import KNOWN_NAMES, SERVICES

EXIT_FAILED = 1
EXIT_USAGE = 2
PR_SET_PDEATHSIG = 1


class CannotStart(Exception):
    """The service cannot start or go on; the message is for its operator."""


class Stop(threading.Event):
    """Set when the process is to stop now. A service that can finish what it holds says so by
    `on_drain`, and ends by itself then."""

    def __init__(self) -> None:
        super().__init__()
        self._begin: Callable[[], None] | None = None
        self._promote: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._draining = False

    def on_drain(self, begin: Callable[[], None]) -> None:
        """`begin` is called once, by another thread: the process is to take nothing new, and to
        leave when it holds nothing."""
        self._begin = begin

    def drain(self) -> None:
        """Stops now where the service cannot drain. Calling it again changes nothing."""
        with self._lock:
            begins = not self._draining
            self._draining = True
        if self._begin is None:
            self.set()
        elif begins:
            self._begin()

    def on_promotion(self, promote: Callable[[], None]) -> None:
        """`promote` is called, by another thread, when a standby is to take work."""
        self._promote = promote

    def promote(self) -> None:
        """What SIGUSR1 does."""
        self._promote()


def run(role: str, description: str, main: Callable[[Any, Stop], None]) -> None:
    """Runs `main(settings, stop)` as the process of this role and exits. SIGTERM drains, SIGINT
    stops; each further signal goes a step further, from draining to stopping, and from stopping
    to leaving at once."""
    parser = argparse.ArgumentParser(
        f"python -m services.{role}", description=description, allow_abbrev=False
    )
    settings: Any = load(SERVICES[role], parser, None, KNOWN_NAMES)
    set_up_logging(role, settings.log_format, settings.log_level)
    stop = Stop()
    threading.Thread(target=obey, args=(read_signals(), stop), name="signals", daemon=True).start()
    if settings.die_with_parent:
        die_with(settings.die_with_parent)
    log = get_logger()
    try:
        main(settings, stop)
    except (BadCheckpoint, BadSetting) as e:
        log.error("cannot start", reason=str(e))
        leave(EXIT_USAGE)
    except CannotStart as e:
        log.error("cannot go on", reason=str(e))
        leave(EXIT_FAILED)
    except (
        Exception
    ):  # the outermost loop: say what it was, and let the launcher start the service anew
        log.exception("failed")
        leave(EXIT_FAILED)
    log.info("stopped")
    leave(0)


def read_signals() -> int:
    """A descriptor that the numbers of the signals are read from. The main thread is not needed for
    it, which may be in a call of some library for seconds."""
    incoming, outgoing = os.pipe()
    os.set_blocking(outgoing, False)
    signal.set_wakeup_fd(outgoing)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    return incoming


def obey(signals: int, stop: Stop) -> None:
    told_to_drain = False
    while True:
        [number] = os.read(signals, 1)
        if number == signal.SIGUSR1:
            stop.promote()
        elif stop.is_set():
            leave(EXIT_FAILED)
        elif number == signal.SIGTERM and not told_to_drain:
            told_to_drain = True
            stop.drain()
        else:
            stop.set()


def leave(status: int) -> None:
    """Ends the process without waiting for threads of libraries that may hang in a call."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def die_with(parent: int) -> None:
    """Asks the kernel to kill this process when the launcher dies, however it dies (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(EXIT_FAILED)
