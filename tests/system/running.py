"""The real processes, started by the local launcher as a user would start them."""

import base64
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
RECEIPT = ROOT / "examples" / "receipt.png"
READY_SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Running:
    """`twinlens serve` with a client's view of it. Leaving the with block interrupts it and waits
    for its end."""

    def __init__(self, *arguments: str) -> None:
        self.http_port = free_port()
        self.grpc_port = free_port()
        ports = ["--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        command = [
            sys.executable,
            "-m",
            "services.cli",
            "serve",
            *ports,
            "--log-level",
            "debug",
            *arguments,
        ]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=own_environment(),
        )
        self.lines: list[str] = []
        self._news: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._readers = [
            threading.Thread(target=self._read, args=(stream,))
            for stream in (self.process.stdout, self.process.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> "Running":
        self.wait_for_line("Twinlens serves")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            for reader in self._readers:
                reader.join()
            for stream in (self.process.stdout, self.process.stderr):
                stream.close()

    def _read(self, stream: Any) -> None:
        for line in stream:
            self.lines.append(line)
            self._news.put(line)
        self._news.put(None)

    def wait_for_line(self, wanted: str) -> str:
        """The next line of output that holds the text; fails as soon as the launcher ends."""
        ended = 0
        while ended < len(self._readers):
            line = self._news.get(timeout=READY_SECONDS)
            if line is None:
                ended += 1
            elif wanted in line:
                return line
        raise AssertionError("serve ended:\n" + "".join(self.lines[-30:]))

    # As a client

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http_port}{path}"

    def get(self, path: str) -> tuple[int, Any]:
        return fetch(urllib.request.Request(self.url(path)))

    def chat(self, messages: list[dict[str, Any]], **body: Any) -> tuple[int, Any]:
        whole = {"model": self.model, "messages": messages, "temperature": 0, **body}
        return fetch(
            urllib.request.Request(
                self.url("/v1/chat/completions"),
                json.dumps(whole).encode(),
                {"content-type": "application/json"},
            )
        )

    def stream(self, messages: list[dict[str, Any]], **body: Any) -> Iterator[dict[str, Any]]:
        """Each event of a streamed answer; closing it hangs up."""
        whole = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "stream": True,
            **body,
        }
        request = urllib.request.Request(
            self.url("/v1/chat/completions"),
            json.dumps(whole).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=READY_SECONDS) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])

    @property
    def model(self) -> str:
        return self.get("/v1/models")[1]["data"][0]["id"]

    def twinlens(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "services.cli",
            *arguments,
            "--grpc",
            f"127.0.0.1:{self.grpc_port}",
        ]
        return subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=READY_SECONDS,
            env=own_environment(),
        )

    def members(self, role: str = "") -> list[dict[str, Any]]:
        """Those that are not dead."""
        found = json.loads(self.twinlens("status", "--json").stdout)["members"]
        return [m for m in found if role in ("", m["role"]) and m["state"] != "dead"]

    def logged(self, **wanted: Any) -> list[dict[str, Any]]:
        """The JSON log lines that have these values."""
        entries = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [entry for entry in entries if wanted.items() <= entry.items()]


def own_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("TWINLENS_")}


def fetch(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request, timeout=READY_SECONDS) as response:
            body = response.read()
            return response.status, json.loads(body) if response.headers["content-type"].startswith(
                "application/json"
            ) else body.decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Asks again and again, because what another process does sends no event here; fails after many
    seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return found


def data_uri(image: Path | bytes) -> str:
    data = image if isinstance(image, bytes) else image.read_bytes()
    return "data:image/png;base64," + base64.b64encode(data).decode()


def ask_about(image: Path | bytes, text: str = "OCR:") -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": data_uri(image)}},
                {"type": "text", "text": text},
            ],
        }
    ]


def golden_messages(case: Path) -> list[dict[str, Any]]:
    messages = json.loads((case / "inputs" / "messages.json").read_text())
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image_url":
                part["image_url"]["url"] = data_uri(case / "inputs" / part["image_url"]["url"])
    return messages


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def processes_of(launcher: int) -> set[int]:
    """The launcher's living children."""
    return {
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if (fields := read_stat(stat)) and int(fields[1]) == launcher and fields[0] != "Z"
    }


def lives(pid: int) -> bool:
    fields = read_stat(Path(f"/proc/{pid}/stat"))
    return bool(fields) and fields[0] != "Z"


def read_stat(stat: Path) -> list[str]:
    """State and parent of a process, as /proc tells; empty where it is gone."""
    try:
        return re.sub(r"^\d+ \(.*\) ", "", stat.read_text()).split()
    except OSError:
        return []
