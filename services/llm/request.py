"""A request as the language group sees it: its tokens, its items, and how far it is computed.

Imports no torch.
"""

import time
from array import array
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from common.address import objection_to_peer
from common.families.family import PromptForm
from common.messages import Prompt, RequestKey, Sampling
from common.timings import ItemTimings, read_timings
from common.wire import Tensor
from services.llm.lora_registry import Resident
from services.llm.prompt_scores import PromptScores, objection_to_scores
from services.llm.repetition import LoopGuard, guard_of
from services.llm.token_rules import objection_to_rules

HASH_BYTES = 16
MM_HASH_BYTES = 32
MAX_POSITION = 2**24
"""Positions are below it. Rotary tables are computed from them in float32, which holds no larger
ones exactly. Those of a long video may be far beyond its number of tokens."""
MAX_GRAMMAR_BYTES = 256 * 1024
"""A larger grammar would hold up those of other requests. This much compiles in 4 s at most."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request of this group may have at most."""

    num_position_components: int
    max_tokens: int
    """Tokens of the context, which the KV cache holds."""
    max_item_tokens: int
    """Tokens of items for whose embeddings there is room."""
    max_whole_tokens: int
    """Tokens of one step."""
    vocab_size: int
    pools: bool = False
    """Whether the model computes one vector of each prompt, and no text."""
    prompt_forms: frozenset[PromptForm] | None = None
    """The only forms that prompts have; None if they may have any."""


def objection_to(prompt: Prompt, limits: Limits) -> str:
    """Return why a prompt cannot be served; "" if it can.

    Its tensors may not fit each other, it may lack values or have impossible ones, or it can never
    fit into the KV cache, into the room for embeddings, or into one step if it must be computed
    whole.
    """
    return (
        malformation_of(prompt, limits)
        or objection_to_task(prompt, limits)
        or incompleteness_of(prompt)
        or excess_of(prompt, limits)
        or outlier_of(prompt, limits)
        or objection_to_siblings(prompt)
        or objection_to_texts(prompt)
        or objection_to_scores(prompt)
        or objection_to_rules(prompt.token_rules, limits.vocab_size)
        or ("" if limits.pools else objection_to_peer(prompt.detokenizer))
    )


def objection_to_task(prompt: Prompt, limits: Limits) -> str:
    """Return why the model cannot do what a prompt asks for; "" if it can."""
    if (prompt.task == "generate") == limits.pools:
        return f"this model cannot {prompt.task}"
    placeholders = tuple(
        (offset, length) for offset, length in prompt.placeholders.numpy().tolist()
    )
    form = (prompt.token_ids.shape[0], placeholders)
    if limits.prompt_forms is not None and form not in limits.prompt_forms:
        return f"the model takes no prompt of {form[0]} tokens with items at {form[1]}"
    return ""


def malformation_of(prompt: Prompt, limits: Limits) -> str:
    """Return which tensor of a prompt does not fit the others; "" if all fit."""
    num_tokens = prompt.token_ids.shape[-1:]
    num_items = prompt.placeholders.shape[:1]
    wanted = {
        "token_ids": num_tokens,
        "positions": (limits.num_position_components, *num_tokens),
        "placeholders": (*num_items, 2),
        "mm_hashes": (*num_items, MM_HASH_BYTES),
    }
    for name, shape in wanted.items():
        tensor = getattr(prompt, name)
        dtype = "uint8" if name == "mm_hashes" else "int64"
        if tensor.shape != shape or tensor.dtype != dtype:
            return f"{name} is {tensor}, {dtype} {shape} is wanted"
    if num_tokens == (0,):
        return "token_ids is empty"
    resumed = prompt.output_token_ids
    if resumed and (resumed.dtype != "int64" or len(resumed.shape) != 1):
        return f"output_token_ids is {resumed}, int64 [n] is wanted"
    end = 0
    for offset, length in prompt.placeholders.numpy().tolist():
        if not end <= offset < offset + length <= num_tokens[0]:
            return (
                f"the placeholder range {offset} + {length} lies outside the prompt or in another"
            )
        end = offset + length
    return ""


MAY_BE_NONE = {"num_logprobs", "num_prompt_logprobs"}
"""The fields of a Sampling that have no default."""


def incompleteness_of(prompt: Prompt) -> str:
    """Return which value preprocess should have filled in or refused; "" if it did that."""
    if prompt.stopping.max_tokens is None:
        return "stopping.max_tokens is missing"
    repetition = prompt.stopping.repetition
    if repetition is not None and repetition.objection:
        return f"stopping.repetition: {repetition.objection}"
    missing = [
        name
        for name in Sampling.__struct_fields__
        if getattr(prompt.sampling, name) is None and name not in MAY_BE_NONE
    ]
    return f"sampling.{missing[0]} is missing" if missing else ""


def outlier_of(prompt: Prompt, limits: Limits) -> str:
    """Return which number of a prompt is outside the model's range; "" if none is."""
    num_tokens = prompt.token_ids.shape[0]
    stop_ids = np.array(prompt.stopping.stop_token_ids, np.int64)
    resumed = prompt.output_token_ids.numpy() if prompt.output_token_ids else stop_ids[:0]
    delta = prompt.rope_delta
    # No token may stand for an item, so its placeholders may lie outside the vocabulary.
    is_item = np.zeros(num_tokens, dtype=bool)
    for offset, length in prompt.placeholders.numpy().tolist():
        is_item[offset : offset + length] = True
    most = limits.max_tokens
    ranges = {
        "token_ids": (prompt.token_ids.numpy()[~is_item], 0, limits.vocab_size),
        "output_token_ids": (resumed, 0, limits.vocab_size),
        "stop_token_ids": (stop_ids, 0, limits.vocab_size),
        "positions": (prompt.positions.numpy(), 0, MAX_POSITION),
    }
    for name, (values, low, high) in ranges.items():
        if values.size and not low <= values.min() <= values.max() < high:
            return f"{name} has a value outside [{low}, {high})"
    highest = MAX_POSITION - num_tokens - answer_tokens_of(prompt)
    if not -num_tokens <= delta <= highest:
        return f"rope_delta is {delta}, outside [{-num_tokens}, {highest}]"
    if prompt.rope_parameter > most:
        return f"rope_parameter is {prompt.rope_parameter}, at most {most} is possible"
    return ""


def objection_to_siblings(prompt: Prompt) -> str:
    """Return why a prompt cannot have several answers; "" if it can."""
    if not prompt.siblings:
        return ""
    if prompt.task != "generate" or prompt.output_token_ids:
        return "only an answer that has not begun can have siblings"
    ids = {prompt.request_id, *(sibling.request_id for sibling in prompt.siblings)}
    return "" if len(ids) > len(prompt.siblings) else "two siblings have the same request id"


def objection_to_texts(prompt: Prompt) -> str:
    """Return which text of a prompt cannot be read; "" if all can."""
    try:
        images = read_timings(prompt.timings).get("images", [])
    except ValueError as e:
        return str(e)
    if len(images) != prompt.placeholders.shape[0]:
        return f"timings has {len(images)} images for {prompt.placeholders.shape[0]}"
    return ""


def objection_to_grammar(grammar: Tensor) -> str:
    """Return why a grammar cannot be read; "" if it can."""
    if grammar.dtype != "uint8" or grammar.nbytes > MAX_GRAMMAR_BYTES:
        return f"grammar is {grammar}, at most {MAX_GRAMMAR_BYTES} bytes of UTF-8 are taken"
    try:
        grammar.text()
    except UnicodeDecodeError:
        return "grammar is not UTF-8"
    return ""


def answer_tokens_of(prompt: Prompt) -> int:
    """Return how many tokens the answer may have; 0 if the prompt asks for no text."""
    return (prompt.stopping.max_tokens or 0) if prompt.task == "generate" else 0


def excess_of(prompt: Prompt, limits: Limits) -> str:
    """Return why a prompt can never fit; "" if it can."""
    item_tokens = int(prompt.placeholders.numpy()[:, 1].sum())
    if item_tokens > limits.max_item_tokens:
        return (
            f"its images become {item_tokens} tokens, this group has room for the embeddings of "
            f"{limits.max_item_tokens}: send fewer or smaller ones"
        )
    max_tokens = answer_tokens_of(prompt)
    num_resumed = prompt.output_token_ids.shape[0] if prompt.output_token_ids else 0
    if num_resumed >= max_tokens and not limits.pools:
        return f"{num_resumed} tokens were delivered already, max_tokens is {max_tokens}"
    num_tokens = prompt.token_ids.shape[0] + max_tokens
    if num_tokens > limits.max_tokens:
        return (
            f"{num_tokens} tokens, prompt and answer together, do not fit into the "
            f"{limits.max_tokens} of this group"
        )
    if prompt.whole and num_tokens > limits.max_whole_tokens:
        return (
            f"{num_tokens} tokens must be computed in one step, which has room for "
            f"{limits.max_whole_tokens}: give --max-num-batched-tokens {num_tokens} or more"
        )
    return ""


@dataclass(slots=True, eq=False)
class Request:
    """A request in the group: its `num_computed_tokens` catches up with its `num_tokens`.

    A preempted request starts again from 0 computed tokens, and keeps its output.
    """

    prompt: Prompt
    preprocess_id: str = ""
    """The peer that brought the prompt. It owns the request, together with its gateway."""
    adapter: Resident | None = None
    """What `prompt.adapter` meant when the request came; None for the model itself."""
    arrived: float = field(default_factory=time.monotonic)
    token_ids: np.ndarray = field(init=False)
    positions: np.ndarray = field(init=False)
    placeholders: list[tuple[int, int]] = field(init=False)
    embeddings: dict[int, Any] = field(default_factory=dict)
    """By item: [length, input width of the model]. Missing until the item arrives."""
    item_timings: dict[int, ItemTimings] = field(default_factory=dict)
    output_token_ids: list[int] = field(default_factory=list)
    block_table: "array[int]" = field(default_factory=lambda: array("q"))
    """The blocks of the request, in order. It is empty exactly while the request waits."""
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    """Tokens that the prefix cache had when the request was first scheduled."""
    first_scheduled: float | None = None
    first_token: float | None = None
    is_held: bool = False
    """Whether it waits until the prompt is computed for another answer (`siblings.py`)."""
    is_apart: bool = field(init=False)
    """Whether it must be computed in steps of its own."""
    is_looping: bool = False
    """Whether the answer is caught in a loop that ends it."""
    prompt_scores: PromptScores | None = field(init=False)
    """The log-probabilities of the prompt's tokens; None if nobody asked for them."""
    _loop_guard: LoopGuard | None = field(init=False)
    _block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = self.prompt.token_ids.numpy()
        self.is_apart = self.prompt.apart
        if self.prompt.output_token_ids:
            self.output_token_ids += self.prompt.output_token_ids.numpy().tolist()
        self._loop_guard = guard_of(self.prompt.stopping.repetition, self.output_token_ids)
        self.prompt_scores = PromptScores.of(self.prompt)
        self.positions = self.prompt.positions.numpy()
        self.placeholders = [
            (int(offset), int(length)) for offset, length in self.prompt.placeholders.numpy()
        ]

    @property
    def key(self) -> RequestKey:
        return self.prompt.key

    @property
    def needs_scores(self) -> bool:
        """Whether log-probabilities of its prompt must still be computed."""
        return self.prompt_scores is not None and not self.prompt_scores.is_complete

    def append(self, token_id: int) -> None:
        """Add a token to the answer."""
        self.output_token_ids.append(token_id)
        if self._loop_guard is not None:
            self.is_looping = self._loop_guard.add(token_id)

    def mm_hash(self, item: int) -> str | None:
        """Return the name of an item's content in hex digits; None if there is no such item."""
        hashes = self.prompt.mm_hashes.numpy()
        return hashes[item].tobytes().hex() if item < len(hashes) else None

    @property
    def priority(self) -> int:
        """Requests with lower values come first."""
        return self.prompt.priority

    @property
    def num_resumed_tokens(self) -> int:
        """The number of output tokens that earlier attempts delivered."""
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
    def num_item_tokens(self) -> int:
        return sum(length for _, length in self.placeholders)

    @property
    def depends_on_preprocess(self) -> bool:
        """Whether the loss of preprocess loses the request, because it still holds items of it."""
        return self.first_token is None and len(self.embeddings) < len(self.placeholders)

    @property
    def num_wanted(self) -> int:
        """The number of tokens that can be computed now; 0 if the next one is of a missing item."""
        return self.num_computable(self.num_computed_tokens) - self.num_computed_tokens

    def num_computable(self, num_computed: int) -> int:
        """Return how far the request can be computed from `num_computed` on.

        That is its end, or the first missing item. An item whose placeholders are all computed,
        because the prefix cache had them, is not missed.
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
        """Return the token ids of [begin, end), of prompt and output together."""
        n = self.num_prompt_tokens
        if end <= n:
            return self.token_ids[begin:end]
        output = np.array(self.output_token_ids[max(0, begin - n) : end - n], np.int64)
        return output if begin >= n else np.concatenate([self.token_ids[begin:], output])

    def positions_of(self, begin: int, end: int) -> np.ndarray:
        """Return the positions of [begin, end), int64 [num_components, end - begin]."""
        n = self.num_prompt_tokens
        generated = np.arange(max(begin, n), max(end, n), dtype=np.int64) + self.prompt.rope_delta
        own = self.positions[:, begin:end]
        return np.concatenate([own, np.broadcast_to(generated, (len(own), len(generated)))], axis=1)

    def block_hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Return a name for each of the first blocks, which must be full.

        Equal names mean equal keys and values.

            hash[-1] = H(cache salt), or with an adapter H(H(cache salt) + hash of its files)
            hash[i] = H(hash[i - 1] + token ids + positions
                        + (mm_hash, offset in the item) of each item in block i)

        The tokens of an item are all alike, so its content must be named. Its positions tell its
        grid.
        """
        hashes = self._block_hashes
        if num_blocks > len(hashes):
            items = self._items_by_block(len(hashes), num_blocks, block_size)
            contents = self._block_contents(len(hashes), num_blocks, block_size)
            parent = hashes[-1] if hashes else self._root_hash()
            for block, content in enumerate(contents, len(hashes)):
                parent = digest(parent + content + items.get(block, b""))
                hashes.append(parent)
        return hashes[:num_blocks]

    def _root_hash(self) -> bytes:
        root = digest(self.prompt.cache_salt)
        return digest(root + self.adapter.identity) if self.adapter else root

    def _block_contents(self, first: int, last: int, block_size: int) -> list[bytes]:
        """Return the token ids and positions of each of the blocks [first, last)."""
        begin = first * block_size
        end = last * block_size
        rows = np.concatenate([self.tokens(begin, end)[None], self.positions_of(begin, end)])
        blocks = rows.reshape(len(rows), -1, block_size).swapaxes(0, 1)
        return [block.tobytes() for block in blocks]

    def _items_by_block(self, begin: int, end: int, block_size: int) -> dict[int, bytes]:
        """Return which part of which items lies in each of the blocks [begin, end)."""
        found: dict[int, bytes] = {}
        mm_hashes = self.prompt.mm_hashes.numpy()
        for (offset, length), mm_hash in zip(self.placeholders, mm_hashes, strict=True):
            first = max(begin, offset // block_size)
            last = min(end, -(-(offset + length) // block_size))
            for block in range(first, last):
                start = (block * block_size - offset).to_bytes(8, "little", signed=True)
                found[block] = found.get(block, b"") + mm_hash.tobytes() + start
        return found


def digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=HASH_BYTES).digest()
