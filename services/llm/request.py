"""A request as the language group sees it: its tokens, its images' embeddings, how far it is
computed. Imports no torch."""

import time
from array import array
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from common.messages import Prompt

HASH_BYTES = 16
MM_HASH_BYTES = 32

Key = tuple[str, int]
"""(request_id, attempt)."""


def objection_to(prompt: Prompt, max_tokens: int, max_image_tokens: int) -> str:
    """Why a prompt cannot be taken: its tensors do not fit each other, or it can never fit into a
    cache of `max_tokens`, or its embeddings into the room for `max_image_tokens`."""
    num_tokens = prompt.token_ids.shape[-1:]
    num_images = prompt.placeholders.shape[:1]
    wanted = {
        "token_ids": num_tokens,
        "positions": (3, *num_tokens),
        "placeholders": (*num_images, 2),
        "mm_hashes": (*num_images, MM_HASH_BYTES),
    }
    for name, shape in wanted.items():
        tensor = getattr(prompt, name)
        if tensor.shape != shape or tensor.dtype != ("uint8" if name == "mm_hashes" else "int64"):
            return f"{name} is {tensor}, int64 or uint8 {shape} is wanted"
    if (resumed := prompt.output_token_ids) and (
        resumed.dtype != "int64" or len(resumed.shape) != 1
    ):
        return f"output_token_ids is {resumed}, int64 [n] is wanted"
    end = 0
    for offset, length in prompt.placeholders.numpy().tolist():
        if not end <= offset < offset + length <= num_tokens[0]:
            return (
                f"the placeholder range {offset} + {length} lies outside the prompt or in another"
            )
        end = offset + length
    if (image_tokens := int(prompt.placeholders.numpy()[:, 1].sum())) > max_image_tokens:
        return (
            f"its images become {image_tokens} tokens, this group has room for the "
            f"embeddings of {max_image_tokens}: send fewer or smaller ones"
        )
    whole = num_tokens[0] + (prompt.stopping.max_tokens or 0)
    return (
        f"{whole} tokens, prompt and answer together, do not fit into the {max_tokens} of this "
        "group"
        if whole > max_tokens
        else ""
    )


@dataclass(slots=True, eq=False)
class Request:
    """`num_computed_tokens` catches up with `num_tokens`; a preempted request starts again from 0
    and keeps its output."""

    prompt: Prompt
    salt: bytes = b""
    """Whatever else the keys and values of equal tokens depend on, such as an adapter, or must not
    be shared across: a tenant."""
    arrived: float = field(default_factory=time.monotonic)
    token_ids: np.ndarray = field(init=False)
    positions: np.ndarray = field(init=False)
    placeholders: list[tuple[int, int]] = field(init=False)
    embeddings: dict[int, Any] = field(default_factory=dict)
    """By image index: [length, hidden_size]."""
    image_timings: dict[int, dict[str, Any]] = field(default_factory=dict)
    output_token_ids: list[int] = field(default_factory=list)
    block_table: "array[int]" = field(default_factory=lambda: array("q"))
    """Empty exactly while the request waits."""
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    """Tokens that the prefix cache had when the request was first scheduled."""
    first_scheduled: float | None = None
    first_token: float | None = None
    _block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = self.prompt.token_ids.numpy()
        if self.prompt.output_token_ids:
            self.output_token_ids += self.prompt.output_token_ids.numpy().tolist()
        self.positions = self.prompt.positions.numpy()
        self.placeholders = [
            (int(offset), int(length)) for offset, length in self.prompt.placeholders.numpy()
        ]

    @property
    def key(self) -> Key:
        return self.prompt.request_id, self.prompt.attempt

    @property
    def num_resumed_tokens(self) -> int:
        """Output tokens of earlier attempts."""
        return self.prompt.output_token_ids.shape[0] if self.prompt.output_token_ids else 0

    @property
    def deadline(self) -> float:
        return self.arrived + self.prompt.timeout

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + len(self.output_token_ids)

    @property
    def num_image_tokens(self) -> int:
        return sum(length for _, length in self.placeholders)

    @property
    def num_wanted(self) -> int:
        """Tokens that can be computed now; none while the next one is an image's that is not
        there."""
        return self.num_computable(self.num_computed_tokens) - self.num_computed_tokens

    def num_computable(self, num_computed: int) -> int:
        """How far the request can be computed from `num_computed` on: to its end, or to the first
        image that is missing.

        An image whose placeholders are all computed (the prefix cache had them) is not missed.
        """
        if len(self.embeddings) == len(self.placeholders):
            return self.num_tokens
        ranges = (
            (offset, offset + length)
            for i, (offset, length) in enumerate(self.placeholders)
            if i not in self.embeddings
        )
        return min(
            (max(begin, num_computed) for begin, end in ranges if end > num_computed),
            default=self.num_tokens,
        )

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Token ids of [begin, end), prompt and output."""
        n = self.num_prompt_tokens
        if end <= n:
            return self.token_ids[begin:end]
        output = np.array(self.output_token_ids[max(0, begin - n) : end - n], np.int64)
        return output if begin >= n else np.concatenate([self.token_ids[begin:], output])

    def positions_of(self, begin: int, end: int) -> np.ndarray:
        """int64 [3, end - begin]."""
        n = self.num_prompt_tokens
        generated = np.arange(max(begin, n), max(end, n), dtype=np.int64) + self.prompt.rope_delta
        return np.concatenate(
            [self.positions[:, begin:end], np.broadcast_to(generated, (3, len(generated)))], axis=1
        )

    def block_hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """A name for each of the first blocks, which must be full: equal names mean equal keys and
        values.

            hash[i] = H(hash[i - 1] + token ids + positions
                        + (mm_hash, offset in the item) of each item in block i)

        The salt is the root. An image's tokens are all alike, so its content must be named; the
        positions hold its grid.
        """
        hashes = self._block_hashes
        begin = len(self._block_hashes) * block_size
        if num_blocks > len(hashes):
            end = num_blocks * block_size
            rows = np.concatenate([self.tokens(begin, end)[None], self.positions_of(begin, end)])
            contents = rows.reshape(4, -1, block_size).swapaxes(0, 1).tobytes()
            size = 4 * 8 * block_size
            images = self._images_by_block(len(hashes), num_blocks, block_size)
            parent = hashes[-1] if hashes else blake2b(self.salt, digest_size=HASH_BYTES).digest()
            for block, start in enumerate(range(0, len(contents), size), len(hashes)):
                data = parent + contents[start : start + size] + images.get(block, b"")
                parent = blake2b(data, digest_size=HASH_BYTES).digest()
                hashes.append(parent)
        return hashes[:num_blocks]

    def _images_by_block(self, begin: int, end: int, block_size: int) -> dict[int, bytes]:
        """What lies of which images in each of the blocks [begin, end) that hold image tokens."""
        found: dict[int, bytes] = {}
        for (offset, length), mm_hash in zip(
            self.placeholders, self.prompt.mm_hashes.numpy(), strict=True
        ):
            for block in range(
                max(begin, offset // block_size), min(end, -(-(offset + length) // block_size))
            ):
                found[block] = (
                    found.get(block, b"")
                    + mm_hash.tobytes()
                    + (block * block_size - offset).to_bytes(8, "little", signed=True)
                )
        return found
