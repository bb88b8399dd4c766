"""A system started by `twinlens serve` on free ports, for as long as a with block lasts."""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import grpc

from common.membership import DEAD
from proto.twinlens.control.v1 import control_pb2, control_pb2_grpc

ROOT = Path(__file__).resolve().parents[1]
READY_SECONDS = 120
STOP_SECONDS = 30
CONTROL_SECONDS = 15
RETRY_SECONDS = 0.05


class Serving:
    """The real processes, started as a user starts them.

    The end of the with block interrupts the launcher and waits until it has ended.
    """

    def __init__(self, *arguments: str, module: str = "services.cli", root: Path = ROOT) -> None:
        """`module` is the command to run; `twinlens` itself, unless a test extends it. `root` has
        the code."""
        self.http_port = free_port()
        self.grpc_port = free_port()
        ports = ["--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "serve", *ports, *arguments],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Children do not import from the working directory, so tests name it here.
            env=own_environment() | {"PYTHONPATH": os.pathsep.join([str(root), *import_path()])},
        )
        self.lines: list[str] = []
        self._unread: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        assert self.process.stdout and self.process.stderr
        self._streams = (self.process.stdout, self.process.stderr)
        self._readers = [
            threading.Thread(target=self._read, args=(stream,)) for stream in self._streams
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> "Serving":
        self.wait_for_line("Twinlens serves")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(STOP_SECONDS)
        finally:
            self.process.kill()
            for reader in self._readers:
                reader.join()
            for stream in self._streams:
                stream.close()

    def _read(self, stream: Iterable[str]) -> None:
        for line in stream:
            self.lines.append(line)
            self._unread.put(line)
        self._unread.put(None)

    def wait_for_line(self, wanted: str) -> str:
        """Return the next output line that contains the text; fail as soon as the launcher ends."""
        ended = 0
        while ended < len(self._readers):
            line = self._unread.get(timeout=READY_SECONDS)
            if line is None:
                ended += 1
            elif wanted in line:
                return line
        raise AssertionError("serve ended:\n" + "".join(self.lines[-30:]))

    def members(self, role: str = "") -> list[control_pb2.Member]:
        """Return the members that are not dead, or only those of one role.

        Waits while the gateway or the controller is restarted.
        """
        return [m for m in self._list_members() if role in ("", m.role) and m.state != DEAD]

    def _list_members(self) -> Iterable[control_pb2.Member]:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                return list_members(self.grpc_port)
            except grpc.RpcError as error:
                if not is_away(error) or time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)


def list_members(grpc_port: int) -> Iterable[control_pb2.Member]:
    # By default, channels share connections, and with them the back-off after a failure.
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}", options) as channel:
        control = control_pb2_grpc.ControlServiceStub(channel)
        request = control_pb2.ListMembersRequest()
        return control.ListMembers(request, timeout=CONTROL_SECONDS).members


def is_away(error: grpc.RpcError) -> bool:
    return isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.UNAVAILABLE


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def import_path() -> list[str]:
    """Return the folders that this process was told to import from."""
    return list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))


def own_environment() -> dict[str, str]:
    """Return this process's environment without the settings of a Twinlens that runs elsewhere."""
    return {key: value for key, value in os.environ.items() if not key.startswith("TWINLENS_")}
