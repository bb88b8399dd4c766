"""Asks a running system by its OpenAI interface, and reads what it served token by token."""

import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

import numpy as np

from common.vocabulary import Vocabulary
from services.commands.chat_client import api_key_of_user
from services.commands.client import ClientError
from services.commands.verification.comparison import Served
from services.commands.verification.questions import Question

NUM_TOP = 5
"""How many of the most likely tokens of each step are compared."""
TIMEOUT = 600.0
TOKEN_ID = "token_id:"
"""What precedes an id that vLLM writes in the place of a token's text."""
NUMBERED = {
    "logprobs": True,
    "top_logprobs": NUM_TOP,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
"""What asks for token ids and log-probabilities: ours, and vLLM's way."""
PLAIN_SAMPLING = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,
    "skip_special_tokens": False,
}
"""What makes an answer the model's most likely one, whatever its own defaults are."""


class System:
    """A running system."""

    def __init__(self, url: str, name: str) -> None:
        """`name` is what requests call the model; empty for the first that the system lists.

        Raises ClientError if nothing answers.
        """
        self.url = url.rstrip("/")
        # A proxy that the environment sets is not meant for this address.
        self._send = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self.name = name or self._first_model()

    def _first_model(self) -> str:
        try:
            return str(self._fetch("/models", None)["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as e:
            raise ClientError(f"{self.url}/models lists no model") from e

    def answer(self, question: Question, max_tokens: int, vocabulary: Vocabulary) -> Served:
        """Return the answer to a question.

        A system that refuses to say ids and log-probabilities is asked for the text alone. Raises
        ClientError if it refuses that, too, or answers nothing.
        """
        plain = {
            "model": self.name,
            "messages": question.messages(),
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        try:
            body = self._fetch("/chat/completions", plain | PLAIN_SAMPLING | NUMBERED)
        except Refused:
            body = self._fetch("/chat/completions", plain)
        try:
            return read_answer(body, vocabulary)
        except (KeyError, IndexError, TypeError, ValueError) as e:
            raise ClientError(f"{self.url} answered in an unknown form ({e!r})") from e

    def label_probabilities(self, question: Question) -> np.ndarray:
        """Return the probabilities of all labels, float32 [number of labels]."""
        body = {"model": self.name, "messages": question.messages()}
        return self._numbers("/classify", body, "probs")

    def embedding(self, question: Question) -> np.ndarray:
        """Return the vector of a text or of an image, float32 [width]."""
        body: dict[str, Any] = {"model": self.name}
        body |= {"messages": question.messages()} if question.images else {"input": question.text}
        return self._numbers("/embeddings", body, "embedding")

    def _numbers(self, path: str, body: dict[str, Any], name: str) -> np.ndarray:
        answer = self._fetch(path, body)
        try:
            return np.array(answer["data"][0][name], np.float32)
        except (KeyError, IndexError, TypeError, ValueError) as e:
            raise ClientError(f"{self.url}{path} answered in an unknown form ({e!r})") from e

    def _fetch(self, path: str, body: dict[str, Any] | None) -> Any:
        """Return an answer's JSON. Raises Refused if the request is not accepted, ClientError if
        nothing useful answers."""
        headers = {"content-type": "application/json"}
        if key := api_key_of_user():
            headers["authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with self._send(request, timeout=TIMEOUT) as response:
                return json.load(response)
        except urllib.error.HTTPError as e:
            with e:
                said = e.read(2000).decode("utf-8", errors="replace")
            kind = Refused if e.code == 400 else ClientError
            raise kind(f"{self.url}{path} says {e.code}: {said}") from e
        except ValueError as e:
            raise ClientError(f"{self.url}{path} does not answer with JSON: {e}") from e
        except (OSError, HTTPException) as e:
            raise ClientError(
                f"nothing answers at {self.url}: start it with `twinlens serve`, or set its "
                f"address with --url http://HOST:PORT/v1 ({e})"
            ) from e


class Refused(ClientError):
    """The system does not accept the request."""


def read_answer(body: Mapping[str, Any], vocabulary: Vocabulary) -> Served:
    """Return what a completion says about its tokens.

    Ids come from the first of these that is there: `token_ids`, the entries of the
    log-probabilities (`token_id`, or vLLM's `token_id:N`), the text. Text alone need not become the
    tokens that were served.

    Raises KeyError, IndexError, TypeError or ValueError if the body has another form.
    """
    choice = body["choices"][0]
    prompt_ids = body.get("prompt_token_ids")
    entries = (choice.get("logprobs") or {}).get("content") or []
    ids = choice.get("token_ids")
    if ids is None and entries:
        ids = [id_of(entry, vocabulary) for entry in entries]
    if not ids or None in ids:
        entries = []
        ids = vocabulary.encode(choice["message"]["content"] or "")
    if not ids:
        raise ValueError("the answer is empty")
    if len(entries) != len(ids):
        entries = []
    return Served(
        prompt_ids=None if prompt_ids is None else [int(i) for i in prompt_ids],
        token_ids=[int(i) for i in ids],
        log_probs=[number(entry["logprob"]) for entry in entries],
        top=[top_of(entry, vocabulary) for entry in entries],
    )


def top_of(entry: Mapping[str, Any], vocabulary: Vocabulary) -> dict[int, float]:
    """Return the most likely tokens of a step; those that cannot be told are left out."""
    named = [(id_of(top, vocabulary), number(top["logprob"])) for top in entry["top_logprobs"]]
    return {token: value for token, value in named if token is not None}


def id_of(entry: Mapping[str, Any], vocabulary: Vocabulary) -> int | None:
    """Return the token of an entry of log-probabilities; None if it does not tell."""
    if (given := entry.get("token_id")) is not None:
        return int(given)
    token = entry["token"]
    if token.startswith(TOKEN_ID):
        return int(token.removeprefix(TOKEN_ID))
    ids = vocabulary.encode(token, continues=True)
    return ids[0] if len(ids) == 1 else None


def number(value: Any) -> float:
    """Return a log-probability. JSON has no infinity, for which servers write null."""
    return math.nan if value is None else float(value)
