"""`twinlens serve`: runs every service of one machine as child processes until it is stopped."""

import contextlib
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from common.address import host_port
from common.checkpoint import BadCheckpoint
from common.config import BadSetting
from common.logs import set_up_logging
from common.membership import Membership
from common.process import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from common.settings import ServeSettings
from proto.twinlens.control.v1 import control_pb2
from services.commands.sample import show_sample
from services.launcher.checks import check
from services.launcher.child import Child, command_of
from services.launcher.replicas import control_address
from services.launcher.run_dir import open_run_dir
from services.launcher.supervisor import WATCH_SECONDS, Command, Supervisor


class Launcher:
    """The main loop of `twinlens serve`: it hands every event to the supervisor, one by one."""

    def __init__(
        self, settings: ServeSettings, run_dir: Path, command: Command = command_of
    ) -> None:
        self._settings = settings
        self._run_dir = run_dir
        # Calls for the main thread to make. A SimpleQueue, because signal handlers put to it, and
        # they must not wait for a lock.
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.supervisor = Supervisor(settings, run_dir, self._wake, command)
        self._managed = self.supervisor.managed()
        self._stopping = False
        self._announced = False

    def run(self) -> int:
        """Run until SIGINT, a drain after SIGTERM, or a service that cannot be kept running.

        Return the exit status.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle_signal)
        membership = Membership(
            control_address(self._run_dir),
            None,
            lambda: (0, 0),
            managed=lambda: self._managed,
            on_response=self._receive,
            key=self.supervisor.key,
        )
        try:
            while not self._stopping:
                if failed := self.supervisor.keep_running():
                    return report_failure(failed)
                if self.supervisor.has_drained():
                    break
                if self.supervisor.has_come_up and not self._announced:
                    self._announced = True
                    threading.Thread(target=announce, args=(self._settings,), daemon=True).start()
                self._report_managed(membership)
                self._handle_next_call()
            return EXIT_OK
        finally:
            membership.leave()
            self._stopping = True
            self.supervisor.stop_all()

    def _report_managed(self, membership: Membership) -> None:
        """Report to the controller when the wanted replicas have changed, for whatever reason."""
        managed = self.supervisor.managed()
        if managed != self._managed:
            self._managed = managed
            membership.report()

    def _handle_next_call(self) -> None:
        """Wait for the next call and make it, or return when the supervisor is due."""
        timeout = WATCH_SECONDS
        deadline = self.supervisor.next_deadline()
        if deadline is not None:
            timeout = min(timeout, max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(queue.Empty):
            self._calls.get(timeout=timeout)()

    def _escalate(self, number: int) -> None:
        """Drain at a first SIGTERM, and stop at any other signal."""
        if number == signal.SIGTERM and not self.supervisor.is_draining:
            self.supervisor.drain()
        else:
            self._stopping = True

    # Called by other threads and by signal handlers

    def _wake(self) -> None:
        self._calls.put(lambda: None)

    def _receive(self, response: control_pb2.JoinResponse) -> None:
        self._calls.put(lambda: self.supervisor.on_response(response))

    def _handle_signal(self, number: int, _: object) -> None:
        """Let the main loop drain or stop, or kill the children if it stops them already."""
        if self._stopping:
            self.supervisor.kill_all()
        self._calls.put(lambda: self._escalate(number))


def report_failure(child: Child) -> int:
    """Print why the child could not be kept running, and return the exit status of `serve`."""
    many = f"{child.failed_starts} starts in a row"
    print(
        f"twinlens serve: {child.name} failed {many if child.failed_starts > 1 else 'to start'}. "
        "Its last output:",
        *child.last_lines,
        sep="\n",
        file=sys.stderr,
    )
    return EXIT_USAGE if child.status == EXIT_USAGE else EXIT_FAILED


def announce(settings: ServeSettings) -> None:
    """Print the addresses to connect to, after what `--read` asks for."""
    http = host_port(settings.host, settings.http_port)
    grpc = host_port(settings.host, settings.grpc_port)
    if settings.read:
        show_sample(grpc, Path(settings.read))
    print(
        f"Twinlens serves {settings.served_model_name!r}: OpenAI HTTP on http://{http}/v1, gRPC "
        f"on {grpc}. Ctrl-C stops it.",
        flush=True,
    )


def serve(settings: ServeSettings) -> int:
    """Run the system until it is stopped, and return the exit status."""
    set_up_logging("launcher", settings.log_format, settings.log_level)
    try:
        settings = check(settings)
        with open_run_dir() as run_dir:
            return Launcher(settings, run_dir).run()
    except (BadSetting, BadCheckpoint) as e:
        print(f"twinlens serve: {e}", file=sys.stderr)
        return EXIT_USAGE
