"""The page on a real HTTP server, with a core and a pipeline that follow a script."""

import asyncio
import json
import threading
from typing import Any

from services.gateway.generation import Core
from services.gateway.metrics import MeasuredCore
from services.gateway.openai_http import create_app
from services.gateway.record import RequestState
from services.gateway.servers import HttpServer, listen
from services.gateway.ui.endpoints import Ui
from services.gateway.ui.feed import Feed
from tests.gateway.fake_core import HELLO, FakeCore, Step
from tests.loopback import free_port

ROLES = ("gateway", "preprocess", "vision", "llm", "detokenizer")


def member(name: str, state: str = "ready", **fields: Any) -> dict[str, Any]:
    """A member as a snapshot has it."""
    idle = {"hung": False, "in_flight": 0, "queued": 0, "credits": 0, "expected_delay": 0.0}
    return {"id": name, "state": state, "detail": "", "rank": 0} | idle | fields


def stage(role: str, *members: dict[str, Any]) -> dict[str, Any]:
    ready = sum(m["state"] == "ready" for m in members)
    totals = {name: sum(m[name] for m in members) for name in ("in_flight", "queued")}
    return {"role": role, "ready": ready, "hidden": 0, "members": members} | totals


def pipeline(*vision: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A snapshot of a pipeline with these vision replicas, and one member of each other role."""
    members = {role: (member(f"{role}-0-abc"),) for role in ROLES} | {"vision": vision}
    usual = {
        "model": "org/tiny",
        "tasks": ["generate"],
        "unready": "",
        "is_current": True,
        "gateway": {"in_flight": 0, "waiting": 0, "first_token_seconds": None},
        "stages": [stage(role, *members[role]) for role in ROLES],
    }
    return usual | changes


class FakeGateway:
    """Serves the page from a thread of its own, because Playwright's calls block."""

    def __init__(self) -> None:
        self.core = FakeCore()
        self.state: RequestState | None = None
        """Where the page's request is said to be."""
        self.port = free_port("127.0.0.1")
        self._shown = pipeline(member("vision-0-abc"))
        self._changed = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._serve()])

    def __enter__(self) -> "FakeGateway":
        self._thread.start()
        assert self._started.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/ui"

    @property
    def num_watchers(self) -> int:
        return self._feed.num_watchers

    def answer(self, *script: Step, refusal: Exception | None = None) -> None:
        """Answer requests by this script from now on, or refuse them."""
        self.core.script = script or HELLO
        self.core.refusal = refusal

    def show(self, shown: dict[str, Any]) -> None:
        """Let the page show this pipeline."""
        self._shown = shown
        self._loop.call_soon_threadsafe(self._changed.set)

    def set(self, event: asyncio.Event) -> None:
        """Set an event that the script waits for."""
        self._loop.call_soon_threadsafe(event.set)

    def wait_for(self, event: asyncio.Event) -> None:
        """Wait until an event of the core is set."""
        asyncio.run_coroutine_threadsafe(event.wait(), self._loop).result(timeout=30)

    def state_of(self, request_id: str) -> RequestState | None:
        return self.state

    async def _describe(self) -> bytes:
        return json.dumps(self._shown).encode()

    async def _serve(self) -> None:
        core: Core = self.core
        watched: Any = self
        self._feed = Feed(self._describe, self._changed)
        self._ui = Ui(watched, self._feed)
        self._server = HttpServer(create_app(MeasuredCore(core), ui=self._ui))
        serving = asyncio.create_task(self._server.serve([listen("127.0.0.1", self.port)]))
        self._started.set()
        await asyncio.wait({serving})

    def _end(self) -> None:
        self._ui.close()
        self._server.should_exit = True
        self._server.force_exit = True
