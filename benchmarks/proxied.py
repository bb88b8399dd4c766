"""vLLM's example proxy for split encoders, with stand-ins for the servers behind it.

Only the proxy is vLLM's. It is the file `disagg_epd_proxy.py` of vLLM's repository, in
`examples/disaggregated/disaggregated_encoder`, and runs unchanged.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.serving import ROOT, free_port

READY_SECONDS = 30.0
RETRY_SECONDS = 0.1
ADMIN_KEY = "benchmark"
LAST_LINES = 5


class CannotRun(Exception):
    """The proxy does not run here; the message says why."""


class Proxied:
    """The proxy with encoders and one language model, for as long as a with block lasts."""

    def __init__(
        self, proxy: Path, python: str, encoders: int, seconds: float, *, is_dynamic: bool
    ) -> None:
        """With `is_dynamic`, the servers register with the proxy, which then looks after them.

        Else the proxy gets a fixed list of them.
        """
        self._port = free_port()
        self._proxy = proxy
        self._python = python
        self._seconds = seconds
        self._is_dynamic = is_dynamic
        self._encoder_ports = [free_port() for _ in range(encoders)]
        self._language_port = free_port()
        self._processes: list[subprocess.Popen[str]] = []
        self._output: list[str] = []
        self._reader: threading.Thread | None = None
        self.url = f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> "Proxied":
        try:
            self._encoders = [self._start_encoder(port) for port in self._encoder_ports]
            self._start_stand_in("language", self._language_port)
            for port in (*self._encoder_ports, self._language_port):
                self._await(f"http://127.0.0.1:{port}/health")
            self._start_proxy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        if self._reader:
            self._reader.join()

    def kill_encoder(self) -> None:
        self._encoders[1].send_signal(signal.SIGKILL)

    def restart_encoder(self) -> None:
        """Start the killed encoder again at the same address."""
        self._encoders[1].wait()
        self._encoders[1] = self._start_encoder(self._encoder_ports[1])

    def _start_encoder(self, port: int) -> "subprocess.Popen[str]":
        return self._start_stand_in("encoder", port, "--seconds", str(self._seconds))

    def _start_stand_in(self, role: str, port: int, *more: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "benchmarks.stand_in", role, "--port", str(port), *more]
        process = subprocess.Popen(command, cwd=ROOT, text=True)
        self._processes.append(process)
        return process

    def _start_proxy(self) -> None:
        encoders = [f"http://127.0.0.1:{port}" for port in self._encoder_ports]
        language = f"http://127.0.0.1:{self._language_port}"
        static = ["--encode-servers-urls", ",".join(encoders), "--decode-servers-urls", language]
        servers = ["--dynamic-registration"] if self._is_dynamic else static
        port = str(self._port)
        process = subprocess.Popen(
            [self._python, self._proxy, *("--host", "127.0.0.1"), *("--port", port), *servers],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=dict(os.environ) | {"ADMIN_API_KEY": ADMIN_KEY},
        )
        self._processes.append(process)
        self._reader = threading.Thread(target=self._read, args=(process,))
        self._reader.start()
        self._await(f"http://127.0.0.1:{self._port}/health", process)
        if self._is_dynamic:
            for url in encoders:
                self._register("encode", url)
            self._register("prefill_decode", language)

    def _read(self, process: "subprocess.Popen[str]") -> None:
        """Keep the end of the proxy's output, which says why it ended."""
        assert process.stdout
        with process.stdout as lines:
            for line in lines:
                self._output = [*self._output[1 - LAST_LINES :], line.strip()]

    def _register(self, role: str, url: str) -> None:
        fetch(
            urllib.request.Request(
                f"http://127.0.0.1:{self._port}/instances",
                json.dumps({"role": role, "url": url}).encode(),
                {"content-type": "application/json", "x-api-key": ADMIN_KEY},
            )
        )

    def _await(self, url: str, process: "subprocess.Popen[str] | None" = None) -> None:
        """Wait until a server answers. Raises CannotRun if it ends, or does not in time."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if process and process.poll() is not None:
                assert self._reader
                self._reader.join()
                raise CannotRun(f"the proxy ended: {' '.join(self._output)[-300:]}")
            try:
                fetch(urllib.request.Request(url))
                return
            except OSError:
                time.sleep(RETRY_SECONDS)
        raise CannotRun(f"nothing answers at {url} after {READY_SECONDS:g} s")


def fetch(request: urllib.request.Request) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=READY_SECONDS) as response:
        return json.loads(response.read())
