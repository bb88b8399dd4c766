"""Two hosts, made of network namespaces that a veth pair joins.

The services in them share neither a network nor the memory of /dev/shm.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.system.running import READY_SECONDS, ROOT, own_environment, until

CONTROLLER_PORT = 50050
GRPC_PORT = 50051
_numbers = itertools.count()


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Host:
    """One namespace, with an address that the other host reaches."""

    def __init__(self, name: str, address: str, interface: str, logs: Path) -> None:
        self.name = name
        self.address = address
        self.interface = interface
        self._logs = logs
        self._processes: list[subprocess.Popen[bytes]] = []

    def command(self, *command: str) -> list[str]:
        own_memory = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        return ["ip", "netns", "exec", self.name, "sh", "-c", own_memory, "sh", *command]

    def start(self, role: str, controller: "Host", *flags: str) -> "subprocess.Popen[bytes]":
        address = f"{controller.address}:{CONTROLLER_PORT}"
        flags = (
            f"--controller={address}",
            "--listen=tcp://0.0.0.0:*",
            f"--advertise={self.address}",
            *flags,
        )
        log = self._logs / f"{role}-{next(_numbers)}.log"
        with log.open("wb") as output:
            command = self.command(sys.executable, "-m", f"services.{role}", *flags)
            environment = own_environment() | {"GLOO_SOCKET_IFNAME": self.interface}
            process = subprocess.Popen(command, cwd=ROOT, stderr=output, env=environment)
        self._processes.append(process)
        return process

    def begin(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start a command of `twinlens` and do not wait for it."""
        command = self.command(
            sys.executable,
            "-m",
            "services.cli",
            *arguments,
            "--grpc",
            f"{self.address}:{GRPC_PORT}",
        )
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=own_environment(),
        )

    def twinlens(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        process = self.begin(*arguments)
        out, err = process.communicate(timeout=READY_SECONDS)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def members(self) -> list[dict[str, Any]]:
        shown = self.twinlens("status", "--json")
        return json.loads(shown.stdout)["members"] if shown.returncode == 0 else []

    def cut_off(self) -> None:
        """Let no packet in or out any more. Connections are not closed."""
        ip("-n", self.name, "link", "set", self.interface, "down")

    def stop(self) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGINT)
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def two_hosts(logs: Path) -> Iterator[tuple[Host, Host]]:
    """Make two hosts; skip the test if this process may not make network namespaces."""
    if not shutil.which("ip"):
        pytest.skip("there is no `ip` here (Debian: iproute2)")
    prefix = f"tl{os.getpid()}"
    hosts = [
        Host(f"{prefix}{end}", f"10.203.0.{n}", f"{prefix}{end}", logs)
        for n, end in ((1, "a"), (2, "b"))
    ]
    with ExitStack() as stack:
        try:
            for host in hosts:
                ip("netns", "add", host.name)
                stack.callback(ip, "netns", "delete", host.name)
            first, second = hosts
            ip(
                "link",
                "add",
                first.interface,
                "netns",
                first.name,
                "type",
                "veth",
                "peer",
                second.interface,
                "netns",
                second.name,
            )
            for host in hosts:
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
                for interface in (host.interface, "lo"):
                    ip("-n", host.name, "link", "set", interface, "up")
        except OSError as e:
            pytest.skip(f"network namespaces cannot be made here: {e}")
        for host in hosts:
            stack.callback(host.stop)
        yield first, second


def start_front(host: Host, model: Path | str) -> None:
    """Start the services that hold no weights: controller, gateway, preprocess, detokenizer."""
    host.start("controller", host, f"--control-listen={host.address}:{CONTROLLER_PORT}")
    host.start(
        "gateway", host, f"--host={host.address}", f"--grpc-port={GRPC_PORT}", "--drain-delay=0"
    )
    host.start("preprocess", host, f"--model={model}")
    host.start("detokenizer", host, f"--model={model}")


def await_ready(host: Host) -> None:
    def ready() -> bool:
        return any(
            member["role"] == "gateway" and member["state"] == "ready" for member in host.members()
        )

    until(ready, "the gateway is ready", READY_SECONDS)
