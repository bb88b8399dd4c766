"""The life that every service shares: settings, logging, signals, the launcher's death, the exit status."""

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

EXIT_FAILED, EXIT_USAGE = 1, 2
PR_SET_PDEATHSIG = 1


class CannotStart(Exception):
    """The service cannot start or go on; the message is for its operator."""


def run(role: str, description: str, main: Callable[[Any, threading.Event], None]) -> None:
    """Runs `main(settings, stop)` as the process of this role and exits. `stop` is set by SIGTERM and SIGINT."""
    parser = argparse.ArgumentParser(f"python -m services.{role}", description=description, allow_abbrev=False)
    settings: Any = load(SERVICES[role], parser, None, KNOWN_NAMES)
    set_up_logging(role, settings.log_format, settings.log_level)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
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
    except Exception:  # the outermost loop: say what it was, and let the launcher start the service anew
        log.exception("failed")
        leave(EXIT_FAILED)
    log.info("stopped")
    leave(0)


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
