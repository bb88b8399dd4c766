"""What the gateway serves under /ui: the page, the feed of the pipeline, and where a request is."""

import re

import grpc
import msgspec
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from services.gateway.bodies import address_of
from services.gateway.body_budget import client_of
from services.gateway.chat_http import send_body, start_stream
from services.gateway.endpoint import begin_stream, cancel_on_disconnect
from services.gateway.ui.feed import Feed
from services.gateway.ui.files import FILES, File
from services.gateway.ui.pipeline import Pipeline, WatchedCore

UNGUESSABLE_ID = re.compile(r"[0-9a-f]{32}")
"""The form of the page's request ids. Ids that other clients choose may be easy to guess."""


class Ui:
    """The page and what it asks for besides the API."""

    def __init__(self, core: WatchedCore, feed: Feed) -> None:
        self._core = core
        self._feed = feed

    def routes(self) -> list[BaseRoute]:
        """Return the routes of the page."""
        files = [Route(f"/ui/{name}", File(name).respond) for name in FILES if name != "index.html"]
        return [
            Route("/ui", File("index.html").respond),
            Route("/ui/", RedirectResponse("../ui", status_code=308)),
            *files,
            Route("/ui/events", Events(self._feed), methods=["GET"]),
            Route("/ui/requests/{request_id}", self.request_state),
        ]

    def close(self) -> None:
        """End the feeds, which would keep their connections open for ever."""
        self._feed.close()

    async def request_state(self, request: Request) -> Response:
        """Return where a request in flight is, to those who know its id; else null."""
        request_id = request.path_params["request_id"]
        is_unguessable = UNGUESSABLE_ID.fullmatch(request_id)
        state = self._core.state_of(request_id) if is_unguessable else None
        body = msgspec.json.encode(state)
        return Response(body, media_type="application/json", headers={"cache-control": "no-store"})


class Events:
    """GET /ui/events as an ASGI application: snapshots of the pipeline as server-sent events."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin_stream(scope)
        await cancel_on_disconnect(self._send(scope, send), receive)

    async def _send(self, scope: Scope, send: Send) -> None:
        with self._feed.place_for(client_of(address_of(scope))):
            await start_stream(send)
            if scope["method"] == "GET":  # Starlette lets HEAD through as well
                async for snapshot in self._feed.snapshots():
                    await send_body(send, b"data: " + snapshot + b"\n\n")
            await send({"type": "http.response.body", "body": b""})


def create_ui(core: WatchedCore, channel: grpc.aio.Channel) -> Ui:
    """Return the page of a core. `channel` leads to the controller."""
    return Ui(core, Feed(Pipeline(core, channel).describe, core.peers.changed))
