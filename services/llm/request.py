"""A request as the language group sees it: its tokens, its images' embeddings, how far it is computed. Imports no torch."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.messages import Prompt

Key = tuple[str, int]
"""(request_id, attempt)."""


@dataclass(slots=True, eq=False)
class Request:
    """`num_computed_tokens` catches up with `num_tokens`; a preempted request starts again from 0 and keeps its output."""

    prompt: Prompt
    arrived: float = field(default_factory=time.monotonic)
    token_ids: np.ndarray = field(init=False)
    positions: np.ndarray = field(init=False)
    placeholders: list[tuple[int, int]] = field(init=False)
    embeddings: dict[int, Any] = field(default_factory=dict)
    """By image index: [length, hidden_size]."""
    image_timings: dict[int, dict[str, Any]] = field(default_factory=dict)
    output_token_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    first_scheduled: float | None = None
    first_token: float | None = None

    def __post_init__(self) -> None:
        self.token_ids = self.prompt.token_ids.numpy()
        self.positions = self.prompt.positions.numpy()
        self.placeholders = [(int(offset), int(length)) for offset, length in self.prompt.placeholders.numpy()]

    @property
    def key(self) -> Key:
        return self.prompt.request_id, self.prompt.attempt

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def num_image_tokens(self) -> int:
        return sum(length for _, length in self.placeholders)

    @property
    def num_computable_tokens(self) -> int:
        """The prompt can be computed up to the first image whose embeddings are not there yet."""
        missing = [offset for i, (offset, _) in enumerate(self.placeholders) if i not in self.embeddings]
        return min(missing, default=self.num_tokens)

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Token ids of [begin, end), prompt and output."""
        n = self.num_prompt_tokens
        return np.concatenate([self.token_ids[begin:end], np.array(self.output_token_ids[max(0, begin - n) : max(0, end - n)], np.int64)])

    def positions_of(self, begin: int, end: int) -> np.ndarray:
        """int64 [3, end - begin]."""
        n = self.num_prompt_tokens
        generated = np.arange(max(begin, n), max(end, n), dtype=np.int64) + self.prompt.rope_delta
        return np.concatenate([self.positions[:, begin:end], np.broadcast_to(generated, (3, len(generated)))], axis=1)
