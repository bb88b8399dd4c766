"""An asynchronous client of any OpenAI-compatible server.

It measures: each answer says when its tokens came. A failed request is recorded, not raised.
"""

import argparse
import asyncio
import base64
import math
import os
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from services.commands.answers import Answer as Answer
from services.commands.answers import decode, error_text, read_stream, read_whole
from services.commands.client import NEEDS_TOOLS, ClientError

if TYPE_CHECKING:
    import aiohttp

DEFAULT_URL = "http://127.0.0.1:8000/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
CONNECT_SECONDS = 10.0
IDLE_SECONDS = 2.0
"""An unused connection is closed after this time. Servers close theirs after five seconds or more,
and a request that is sent at that moment would fail."""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
WORTH_REPEATING = (429, 503)

MEDIA_TYPES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
}
"""The media type of an image file by its first bytes."""


class ChatClient:
    """Sends requests to one server. An asynchronous context manager."""

    def __init__(self, url: str, api_key: str = "", timeout: float = 600.0) -> None:
        """`url` is the base URL, which usually ends in /v1. `timeout` is for each whole request.

        Without `api_key` the variable OPENAI_API_KEY is used. Entering raises ClientError if no
        header can hold its value.
        """
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._api_key = api_key
        self._session: aiohttp.ClientSession
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "ChatClient":
        aiohttp = import_aiohttp()
        api_key = self._api_key or api_key_of_user()
        key = {"authorization": f"Bearer {api_key}"} if api_key else {}
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=key,
            timeout=aiohttp.ClientTimeout(total=self.timeout, sock_connect=CONNECT_SECONDS),
            trust_env=False,  # a proxy that the environment sets is not meant for this address
        )
        self._session = await self._stack.enter_async_context(session)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def models(self) -> list[str]:
        """Return the names of the models that the server lists.

        Raises
        ------
        ClientError
            If the server does not answer, or answers something else.
        """
        import aiohttp

        url = f"{self.url}/models"
        try:
            async with self._session.get(url) as response:
                body = await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ClientError(
                f"nothing answers at {self.url} ({reason_of(error)}): start a server, or set its "
                "address with --url http://HOST:PORT/v1"
            ) from error
        if status != 200:
            raise ClientError(f"{url} answers with status {status}: {error_text(body)}")
        match decode(body):
            case {"data": list(listed)}:
                return [str(model["id"]) for model in listed if "id" in model]
        raise ClientError(f"{url} does not list models: does --url end in /v1?")

    async def complete(self, body: dict[str, Any], headers: Mapping[str, str] = {}) -> Answer:
        """Send a chat completion. `body["stream"]` says whether the answer is streamed.

        A request that fails in any way is an Answer with an `error`.
        """
        import aiohttp

        encoded = msgspec.json.encode(body)
        answer = Answer(began=time.monotonic())
        sent = {"content-type": "application/json"} | dict(headers)
        url = f"{self.url}/chat/completions"
        try:
            async with self._session.post(url, data=encoded, headers=sent) as response:
                answer.status = response.status
                await read_response(response, answer)
        except aiohttp.ConnectionTimeoutError as error:
            answer.error = f"the connection failed: {reason_of(error)}"
            answer.is_broken = True
        except TimeoutError:
            answer.error = f"no whole answer within {self.timeout:g} s"
            answer.has_timed_out = True
        except aiohttp.ClientError as error:
            answer.error = f"the connection failed: {reason_of(error)}"
            answer.is_broken = True
        answer.seconds = time.monotonic() - answer.began
        if answer.error:
            answer.finish_reason = ""
        return answer


def api_key_of_user() -> str:
    """Return the key in the variable OPENAI_API_KEY; empty if there is none.

    Raises
    ------
    ClientError
        If no header can hold it. The message does not show it.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ClientError(f"the variable {KEY_VARIABLE} holds characters that no key has")
    return key


def import_aiohttp() -> Any:
    """Return the module aiohttp.

    Raises
    ------
    ClientError
        If it is not installed.
    """
    try:
        import aiohttp
    except ImportError as error:
        raise ClientError(f"this command {NEEDS_TOOLS}") from error
    return aiohttp


async def read_response(response: "aiohttp.ClientResponse", answer: Answer) -> None:
    """Read a whole response into the answer."""
    if response.status != 200:
        answer.error = error_text(await response.read())
        answer.error = answer.error or f"status {response.status}"
        answer.retry_after = read_retry_after(response.headers)
    elif response.content_type == "text/event-stream":
        await read_stream(response.content.iter_any(), answer)
    else:
        read_whole(await response.read(), answer)


async def complete_patiently(
    client: ChatClient, body: dict[str, Any], patience: float = 300.0
) -> Answer:
    """Send a chat completion, again while the server is busy or the connection breaks.

    Waits as long as the server asks for, else a growing time. Returns the last answer once
    the request succeeded, failed for another reason, or used up `patience` seconds.
    """
    began = time.monotonic()
    pause = FIRST_PAUSE_SECONDS
    while True:
        answer = await client.complete(body)
        is_worth_it = answer.is_broken or answer.status in WORTH_REPEATING
        wait = answer.retry_after or pause  # a server that says 0 is not asked without a pause
        if not is_worth_it or time.monotonic() + wait > began + patience:
            return answer
        await asyncio.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


async def choose_model(client: ChatClient, wanted: str) -> str:
    """Return the model to ask: the wanted one, or the first that the server lists.

    A server that lists no models at all is believed to have the wanted one.

    Raises
    ------
    ClientError
        If the server does not answer, or does not have the model.
    """
    try:
        served = await client.models()
    except ClientError:
        if not wanted:
            raise
        return wanted
    if not served:
        raise ClientError(f"{client.url} lists no model; name one with --model")
    if wanted and wanted not in served:
        raise ClientError(f"{client.url} has no model {wanted!r}; it serves {', '.join(served)}")
    return wanted or served[0]


def add_url_argument(parser: argparse.ArgumentParser) -> None:
    """Add --url and --model. The API key comes from the variable OPENAI_API_KEY."""
    parser.add_argument(
        "--url",
        type=base_url,
        default=DEFAULT_URL,
        metavar="URL",
        help="the server's OpenAI base URL (default: %(default)s); the variable "
        f"{KEY_VARIABLE} has its key, if it needs one",
    )
    parser.add_argument(
        "--model",
        default="",
        metavar="NAME",
        help="the model to ask (default: the first that the server lists)",
    )


def base_url(text: str) -> str:
    """Return the URL without a slash at its end; an argparse type."""
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} does not begin with http:// or https://")
    try:
        has_host = bool(urlsplit(text).hostname) and urlsplit(text).port != 0
    except ValueError:
        has_host = False
    if not has_host:
        raise argparse.ArgumentTypeError(f"{text!r} does not name HOST or HOST:PORT")
    return text.rstrip("/")


def image_part(data: bytes) -> dict[str, Any]:
    """Return an image file as a part of a message, with its bytes in a data: URI.

    Raises
    ------
    ClientError
        If it is not a PNG, JPEG, GIF or WebP file.
    """
    if not (kind := media_type(data)):
        raise ClientError("an image is not a PNG, JPEG, GIF or WebP file")
    return {"type": "image_url", "image_url": {"url": data_uri(data, kind)}}


def media_type(data: bytes) -> str:
    """Return the media type of an image file; empty if it is none of MEDIA_TYPES."""
    return next((kind for start, kind in MEDIA_TYPES.items() if data.startswith(start)), "")


def data_uri(data: bytes, kind: str) -> str:
    """Return a data: URI of a file of this media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a response asks to wait; None if it does not say a number."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * scale
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def reason_of(error: BaseException) -> str:
    """Return why a connection failed."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno:
        return os.strerror(cause.errno).lower()
    return str(error) or type(error).__name__  # some errors of aiohttp have no text
