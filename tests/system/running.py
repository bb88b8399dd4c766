"""A running system, and what a client sees of it."""

import base64
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.serving import READY_SECONDS, ROOT, Serving, own_environment
from proto.twinlens.control.v1 import control_pb2
from services import cli

GOLDEN = ROOT / "tests" / "golden" / "qwen2_5_vl"
RECEIPT = ROOT / "examples" / "receipt.png"


class Running(Serving):
    """`twinlens serve`, and the requests of its clients."""

    def __init__(self, *arguments: str, module: str = "services.cli") -> None:
        super().__init__("--log-level", "debug", *arguments, module=module)

    def __enter__(self) -> "Running":
        super().__enter__()
        return self

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http_port}{path}"

    def get(self, path: str) -> tuple[int, Any]:
        return fetch(urllib.request.Request(self.url(path)))

    @property
    def model(self) -> str:
        return self.get("/v1/models")[1]["data"][0]["id"]

    def chat(
        self, messages: list[dict[str, Any]], headers: Mapping[str, str] = {}, **body: Any
    ) -> tuple[int, Any]:
        """Return the status and the answer as a whole; greedy unless the body says otherwise."""
        return fetch(self._chat_request(messages, body, headers))

    def stream(self, messages: list[dict[str, Any]], **body: Any) -> Iterator[dict[str, Any]]:
        """Yield each event of a streamed answer. Closing the iterator hangs up."""
        request = self._chat_request(messages, {"stream": True, **body})
        with urllib.request.urlopen(request, timeout=READY_SECONDS) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])

    def _chat_request(
        self,
        messages: list[dict[str, Any]],
        body: dict[str, Any],
        headers: Mapping[str, str] = {},
    ) -> urllib.request.Request:
        whole = {"model": self.model, "messages": messages, "temperature": 0, **body}
        return urllib.request.Request(
            self.url("/v1/chat/completions"),
            json.dumps(whole).encode(),
            {"content-type": "application/json", **headers},
        )

    def twinlens(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of `twinlens` against this system."""
        grpc = ["--grpc", f"127.0.0.1:{self.grpc_port}"]
        return subprocess.run(
            [sys.executable, "-m", "services.cli", *arguments, *grpc],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=READY_SECONDS,
            env=own_environment(),
        )

    def verify(self, model: Path, *arguments: str) -> tuple[int, str]:
        """Return the exit status of `twinlens verify`, and what it prints.

        It runs in this process, because it imports much.
        """
        given = ["verify", "--model", str(model), "--url", self.url("/v1"), "--json", *arguments]
        with redirect_stdout(StringIO()) as printed:
            status = cli.run(cli.make_parser().parse_args(given))
        return status, printed.getvalue()

    def pids(self) -> dict[str, int]:
        """Return the process id of each role, for a system with one member of each."""
        return {member.role: member.pid for member in self.members()}

    def in_state(self, role: str, state: int) -> list[control_pb2.Member]:
        return [member for member in self.members(role) if member.state == state]

    def is_reachable(self) -> bool:
        """Whether the gateway answers and reports the system ready."""
        try:
            return self.get("/readyz")[0] == 200
        except OSError:
            return False

    def await_idle(self) -> None:
        until(
            lambda: all(m.in_flight + m.queued == 0 for m in self.members()),
            "no member holds anything",
        )

    def logged(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the JSON log lines that have these values."""
        entries = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [entry for entry in entries if wanted.items() <= entry.items()]


def fetch(request: urllib.request.Request) -> tuple[int, Any]:
    """Return the status and the body, parsed if it is JSON."""
    try:
        with urllib.request.urlopen(request, timeout=READY_SECONDS) as response:
            body = response.read()
            is_json = response.headers["content-type"].startswith("application/json")
            return response.status, json.loads(body) if is_json else body.decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Poll a condition until it is true, and return its value; fail after the given seconds.

    Polling is needed because what another process does sends no event here.
    """
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
            elif part["type"] == "video":
                part["video"] = [data_uri(case / "inputs" / name) for name in part["video"]]
    return messages


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def piece_of(event: dict[str, Any]) -> str:
    """Return the text that an event of a stream adds; fail if the event is an error."""
    assert "error" not in event, event
    return (event["choices"][0]["delta"].get("content") or "") if event["choices"] else ""


def processes_of(launcher: int) -> set[int]:
    """Return the process ids of the launcher's living children."""
    return {
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if (fields := read_stat(stat)) and int(fields[1]) == launcher and fields[0] != "Z"
    }


def lives(pid: int) -> bool:
    fields = read_stat(Path(f"/proc/{pid}/stat"))
    return bool(fields) and fields[0] != "Z"


def read_stat(stat: Path) -> list[str]:
    """Return state, parent and more of a process, as /proc lists them; empty if it is gone."""
    try:
        return re.sub(r"^\d+ \(.*\) ", "", stat.read_text()).split()
    except OSError:
        return []
