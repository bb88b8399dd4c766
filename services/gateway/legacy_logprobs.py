"""`logprobs` of /v1/completions: four lists, one value in each for a token of the text."""

from collections.abc import Sequence
from typing import Any


class LegacyLogprobs:
    """Collects the log-probabilities of one answer, and of the prompt if the answer begins with it.

    The entries are those of `Piece.logprobs`.
    """

    def __init__(self) -> None:
        self._offset = 0
        """The number of characters before the next token."""
        self._tokens: list[str] = []
        self._token_logprobs: list[float | None] = []
        self._top_logprobs: list[dict[str, float] | None] = []
        self._text_offset: list[int] = []

    def body(self) -> dict[str, Any]:
        """Return the object of the whole text."""
        return {
            "tokens": self._tokens,
            "token_logprobs": self._token_logprobs,
            "top_logprobs": self._top_logprobs,
            "text_offset": self._text_offset,
        }

    def add_prompt(self, prompt: str, entries: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
        """Add the tokens of a prompt, the first of which has no log-probability.

        Returns the object of these tokens alone.
        """
        known = [entry for entry in entries if entry is not None]
        num_first = max(0, len(prompt) - sum(len(entry["token"]) for entry in known))
        if entries:
            self._add(prompt[:num_first], None, None)
        return self._added(1 if entries else 0, known)

    def add(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Add tokens of the answer. Returns the object of these tokens alone."""
        return self._added(0, entries)

    def _added(self, num_before: int, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        for entry in entries:
            top = {one["token"]: one["logprob"] for one in entry["top_logprobs"]}
            # OpenAI adds the token itself if it is not among the most likely ones.
            top.setdefault(entry["token"], entry["logprob"])
            self._add(entry["token"], entry["logprob"], top)
        count = num_before + len(entries)
        return {name: values[len(values) - count :] for name, values in self.body().items()}

    def _add(self, token: str, logprob: float | None, top: dict[str, float] | None) -> None:
        self._tokens.append(token)
        self._token_logprobs.append(logprob)
        self._top_logprobs.append(top)
        self._text_offset.append(self._offset)
        self._offset += len(token)
