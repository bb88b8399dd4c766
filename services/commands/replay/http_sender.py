"""Sends recorded requests again over HTTP."""

import base64
import time
from typing import Any

import msgspec

from common.recording import Exchange
from services.commands.answers import decode, error_text
from services.commands.chat_client import Answer, ChatClient, reason_of
from services.commands.replay.bodies import ReadFile, http_body
from services.commands.replay.outcome import Outcome, floats

LEAST_TIMEOUT = 0.001
PATHS = {"classify": "/classify", "embed": "/embeddings"}


class HttpSender(ChatClient):
    """A client of one server that sends recorded requests of every task."""

    def use(self, model: str, read_file: ReadFile) -> None:
        """Set the model to ask, and what reads the files of the recording."""
        self.model = model
        self.read_file = read_file

    async def send(self, exchange: Exchange) -> Outcome:
        body = http_body(exchange, self.model, self.read_file)
        timeout = exchange.asked.timeout
        headers = {}
        if timeout is not None:
            headers["x-request-timeout"] = f"{max(timeout, LEAST_TIMEOUT):g}"
        if exchange.asked.task == "generate":
            return outcome_of(await self.complete(body, headers))
        return await self._pool(PATHS[exchange.asked.task], body, headers)

    async def _pool(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Outcome:
        """Send a request for no text."""
        import aiohttp

        sent = {"content-type": "application/json"} | headers
        began = time.monotonic()
        try:
            async with self._session.post(
                self.url + path, data=msgspec.json.encode(body), headers=sent
            ) as response:
                outcome = pooled_outcome(response.status, await response.read())
        except TimeoutError:
            outcome = Outcome(error=f"no whole answer within {self.timeout:g} s")
        except aiohttp.ClientError as error:
            outcome = Outcome(error=f"the connection failed: {reason_of(error)}")
        outcome.seconds = time.monotonic() - began
        return outcome


def outcome_of(answer: Answer) -> Outcome:
    """Return the outcome of a chat completion, with the server's own times if it sends them.

    Those are measured as the recorded ones are.
    """
    first = answer.token_times[0][0] if answer.token_times else None
    return Outcome(
        finish_reason=answer.finish_reason,
        text=answer.text,
        token_ids=answer.token_ids,
        error=answer.error,
        seconds=answer.timings.get("total_seconds", answer.seconds),
        first_token_seconds=answer.timings.get("time_to_first_token_seconds", first),
        num_tokens=answer.usage.get("completion_tokens") or len(answer.token_ids),
    )


def pooled_outcome(status: int, body: bytes) -> Outcome:
    """Return the outcome of a classification or an embedding from its response."""
    if status != 200:
        return Outcome(error=error_text(body) or f"status {status}")
    try:
        match decode(body):
            case {"data": [{"probs": list(values)}]} | {"data": [{"embedding": list(values)}]}:
                return Outcome(finish_reason="pooled", values=list(map(float, values)))
            case {"data": [{"embedding": str(text)}]}:
                return Outcome(finish_reason="pooled", values=floats(base64.b64decode(text)))
    except (TypeError, ValueError):
        pass
    return Outcome(error=f"the answer has no values: {error_text(body)}")
