"""A stand-in for an encoder or a language model behind another system's proxy.

    python -m benchmarks.stand_in encoder --port 8101 --seconds 0.2

It has the parts of OpenAI's interface that a proxy needs, and computes nothing. An encoder works on
one image at a time and takes the same time for each. A language model streams words at once.
"""

import argparse
import asyncio
import json
import time
from typing import Any

from aiohttp import web

MODEL = "stand-in"
WORD = "word "
MAX_BODY_BYTES = 64 * 2**20


def num_images(body: dict[str, Any]) -> int:
    contents = [message["content"] for message in body["messages"]]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(part["type"] == "image_url" for part in parts)


class Encoder:
    """Waits for each image of a request, one image of all requests at a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._tower = asyncio.Lock()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        for _ in range(num_images(body)):
            async with self._tower:
                await asyncio.sleep(self._seconds)
        return web.json_response(
            {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}
        )


class LanguageModel:
    """Streams as many words as the request asks for."""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        count = body["max_tokens"]
        for number in range(count):
            end = "length" if number == count - 1 else None
            choice = {"index": 0, "delta": {"content": WORD}, "finish_reason": end}
            await response.write(event({"choices": [choice]}))
        await response.write(event({"choices": [], "usage": {"completion_tokens": count}}))
        await response.write(b"data: [DONE]\n\n")
        return response


def event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


async def models(request: web.Request) -> web.StreamResponse:
    listed = {"id": MODEL, "object": "model", "created": int(time.time())}
    return web.json_response({"object": "list", "data": [listed]})


async def health(request: web.Request) -> web.StreamResponse:
    return web.json_response({})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=("encoder", "language"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=0.0, help="of an image in the encoder")
    options = parser.parse_args()
    server = Encoder(options.seconds) if options.role == "encoder" else LanguageModel()
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_post("/v1/chat/completions", server.chat)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/health", health)
    web.run_app(app, host="127.0.0.1", port=options.port, print=None)


if __name__ == "__main__":
    main()
