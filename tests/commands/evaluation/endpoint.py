"""A fake OpenAI endpoint for the tests of `twinlens eval`, and what runs the command against it."""

import argparse
import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from PIL import Image

from services.commands.evaluation.command import add_arguments, evaluate

Reply = Callable[[str, list[bytes]], str | int]
"""From the request's text and images to the answer, or the status of a refusal."""


@dataclass
class Endpoint:
    """Answers chat completions and keeps the bodies of the requests."""

    reply: Reply
    url: str = ""
    model: str = "fake"
    bodies: list[dict[str, Any]] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [text_of(body)[0] for body in self.bodies]

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        answer = self.reply(*text_of(body))
        if isinstance(answer, int):
            return web.json_response({"error": {"message": "refused"}}, status=answer)
        message = {"role": "assistant", "content": answer}
        reason = "length" if len(answer) > body.get("max_tokens", 2**31) else "stop"
        return web.json_response({"choices": [{"message": message, "finish_reason": reason}]})

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": self.model}]})


def text_of(body: dict[str, Any]) -> tuple[str, list[bytes]]:
    """The text of a request, with `<image>` for each image, and the images."""
    text, images = "", []
    for part in body["messages"][0]["content"]:
        if part["type"] == "text":
            text += part["text"]
        else:
            text += "<image>"
            images.append(base64.b64decode(part["image_url"]["url"].partition("base64,")[2]))
    return text, images


@asynccontextmanager
async def endpoint(reply: Reply, model: str = "fake") -> AsyncIterator[Endpoint]:
    fake = Endpoint(reply, model=model)
    app = web.Application(client_max_size=2**30)
    app.router.add_get("/v1/models", fake.models)
    app.router.add_post("/v1/chat/completions", fake.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        fake.url = f"http://{host}:{port}/v1"
        yield fake
    finally:
        await runner.cleanup()


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser("twinlens eval")
    add_arguments(parser)
    return parser.parse_args(arguments)


async def run(fake: Endpoint, *arguments: object) -> int:
    """Run `twinlens eval` with these arguments against the endpoint; return its exit status."""
    parsed = parse(*map(str, arguments), "--url", fake.url)
    return await asyncio.to_thread(evaluate, parsed)


def last_line(out: str) -> dict[str, Any]:
    """The JSON object at the end of what the command printed."""
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def png(shade: int = 0) -> bytes:
    """A small image; another `shade` makes other bytes."""
    file = io.BytesIO()
    Image.new("L", (8, 8), shade).save(file, "PNG")
    return file.getvalue()


def png_base64(shade: int = 0) -> str:
    return base64.b64encode(png(shade)).decode()
