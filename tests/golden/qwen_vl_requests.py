"""The golden requests of Qwen-VL, as the language group and its reference see them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tests.golden import GoldenCase

CASES = ("a_chat_image", "b_long_ntk_logn", "c_box_two_images")
NUM_REQUESTS = {"a_chat_image": 3, "b_long_ntk_logn": 4, "c_box_two_images": 2}
REQUESTS = [(name, number) for name in CASES for number in range(NUM_REQUESTS[name])]


@dataclass(frozen=True)
class GoldenRequest:
    """A request of a case, and what the reference made of it."""

    case: GoldenCase
    number: int

    @property
    def expected(self) -> dict[str, Any]:
        return self.case.expected["requests"][self.number]

    @property
    def token_ids(self) -> np.ndarray:
        """int64 [num_tokens]: the prompt with 256 tokens for each image, which mean nothing."""
        return np.array(self.expected["input_ids"], np.int64)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(offset, length) of the tokens of each image."""
        marker = self.case.expected["special_tokens"]["<img>"]
        return [(int(i) + 1, 256) for i in np.flatnonzero(self.token_ids == marker)]

    @property
    def unexpanded_ids(self) -> list[int]:
        """The prompt with one placeholder for each image."""
        ids = self.expected["input_ids"]
        placeholder = self.case.expected["special_tokens"]["<imgpad>"]
        for offset, length in reversed(self.spans):
            ids = [*ids[:offset], placeholder, *ids[offset + length :]]
        return ids

    @property
    def pictures(self) -> list[str]:
        """The name of the file of each image."""
        return re.findall("<img>(.*?)</img>", self.expected["raw_text"])

    def messages(self, image_part: Callable[[bytes], dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the chat messages. `image_part` makes a part of the bytes of a file."""
        given = self.expected
        turns = [*given.get("history", []), (given["query"], None)]
        messages = [{"role": "system", "content": given["system"]}] if "system" in given else []
        for query, answer in turns:
            messages.append({"role": "user", "content": self._parts(query, image_part)})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return messages

    def _parts(
        self, query: str, image_part: Callable[[bytes], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return the parts that the reference joins to this text."""
        *before, text = re.split(r"(?:Picture \d: )?<img>(.*?)</img>\n?", query)
        assert not any(before[::2]), "images come first"
        files = [(self.case.inputs / name).read_bytes() for name in before[1::2]]
        return [*map(image_part, files), {"type": "text", "text": text}]

    @property
    def alpha(self) -> int:
        return int(self.expected["ntk_alpha"])

    @property
    def answer(self) -> list[int]:
        return self.expected["greedy_ids"]

    @property
    def embeddings(self) -> list[np.ndarray]:
        """float32 [256, hidden] of each image."""
        return [self.case.tensors[f"vision_features.{name}"] for name in self.pictures]

    @property
    def logits(self) -> np.ndarray:
        """float32 [num answer tokens, vocab_size]."""
        return self.case.tensors[f"req{self.number}.greedy_logits"]


@cache
def golden_request(name: str, number: int) -> GoldenRequest:
    return GoldenRequest(GoldenCase(name, "qwen_vl"), number)


def requests_of(name: str) -> list[GoldenRequest]:
    return [golden_request(name, number) for number in range(NUM_REQUESTS[name])]
