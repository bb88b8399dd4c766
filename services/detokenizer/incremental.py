"""Token ids to text, a few at a time, exactly as the tokenizer decodes the whole answer; and stop
strings in it."""

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.checkpoint import BadCheckpoint, read_json

# JSON has no infinity; this is what OpenAI's interface says instead.
LOWEST_LOGPROB = -9999.0


def byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: printable Latin-1 as itself, the rest
    from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


ALPHABET = byte_level_alphabet()


class Vocabulary:
    """The bytes of every token of a byte-level BPE tokenizer, and which tokens are special."""

    def __init__(self, tokenizer_file: str | Path) -> None:
        config = read_json(Path(tokenizer_file))
        decoder = (config.get("decoder") or {}).get("type")
        if decoder != "ByteLevel":
            raise BadCheckpoint(
                f"{tokenizer_file} has the decoder {decoder}, which is not supported yet; "
                "supported: ByteLevel"
            )
        added = config.get("added_tokens") or []
        tokens = {id: token for token, id in config["model"]["vocab"].items()} | {
            entry["id"]: entry["content"] for entry in added
        }
        special = {entry["content"] for entry in added if entry["special"]}
        self.special_ids = frozenset(id for id, token in tokens.items() if token in special)
        self.bytes_by_id = {id: bytes_of(token) for id, token in tokens.items()}

    def token_bytes(self, token_id: int) -> bytes:
        """Empty for an id that is no token: models have more output rows than their tokenizer has
        tokens."""
        return self.bytes_by_id.get(token_id, b"")

    def visible_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes:
        return (
            b""
            if skip_special_tokens and token_id in self.special_ids
            else self.token_bytes(token_id)
        )


def bytes_of(token: str) -> bytes:
    """A token with a character outside the alphabet, as added ones may have, stands for its own
    text."""
    try:
        return bytes(ALPHABET[character] for character in token)
    except KeyError:
        return token.encode()


class IncrementalDecoder:
    """The text of one answer.

    The pieces that `push` and `finish` return, joined, are the decoded answer up to its end or
    right before the first stop string. What `push` returned is certain: no later token changes it.
    CacheHit back are the bytes of an incomplete character and text that may become a stop string;
    both are bounded, so the cost of a token does not grow with the answer.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """A stop string that is complete before the `min_tokens`-th token does not end the
        answer."""
        assert all(stop)
        self.vocabulary = vocabulary
        self.stop = stop
        self.skip_special_tokens = skip_special_tokens
        self.min_tokens = min_tokens
        self.num_tokens = 0
        """Tokens of the answer so far; after a stop, up to and including the one that completed the
        stop string."""
        self.stopped = False
        self.held = ""
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that has become certain. Tokens after a stop string are ignored."""
        return "".join([self.push_one(token_id) for token_id in token_ids])

    def push_one(self, token_id: int) -> str:
        if self.stopped:
            return ""
        self.num_tokens += 1
        return self.advance(
            self.utf8.decode(self.vocabulary.visible_bytes(token_id, self.skip_special_tokens))
        )

    def finish(self) -> str:
        """What was held back and belongs to the answer after all."""
        if self.stopped:
            return ""
        text = self.advance(self.utf8.decode(b"", final=True))
        text = text + self.held
        self.held = ""
        return text

    def advance(self, new: str) -> str:
        if not self.stop or not new:
            return new
        text = self.held + new
        num_old = len(self.held)
        if (
            self.num_tokens >= self.min_tokens
            and (start := first_stop(text, self.stop, num_old)) is not None
        ):
            self.stopped = True
            self.held = ""
            return text[:start]
        certain = len(text) - max(num_held(text, stop) for stop in self.stop)
        self.held = text[certain:]
        return text[:certain]


def first_stop(text: str, stop: Sequence[str], num_old: int) -> int | None:
    """Where the earliest stop string begins that ends beyond the first `num_old` characters, which
    were searched before."""
    found = [text.find(one, max(0, num_old - len(one) + 1)) for one in stop]
    return min((start for start in found if start >= 0), default=None)


def num_held(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop string."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0


def logprob_entry(
    vocabulary: Vocabulary, token_id: int, logprob: float, top: Iterable[tuple[int, float]] = ()
) -> dict[str, Any]:
    """An entry of OpenAI's `logprobs.content`; `top` holds the (id, log-probability) of the most
    likely tokens, best first."""
    best = [logprob_of(vocabulary, *candidate) for candidate in top]
    return logprob_of(vocabulary, token_id, logprob) | {"top_logprobs": best}


def logprob_of(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, Any]:
    data = vocabulary.token_bytes(token_id)
    return {
        "token": data.decode("utf-8", "replace"),
        "logprob": max(logprob, LOWEST_LOGPROB),
        "bytes": list(data),
    }
