"""From logits to tokens.

A draw is counter-based: its noise is a hash of (seed, position of the token in the output, token
id). Whatever device or batch computes it, and however often a request is resumed, the same logits
give the same token.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from common.messages import Sampling, Stopping, TokenRules
from services.llm.noise import gumbel_noise, mix, signed
from services.llm.token_rules import RulesInForce

GREEDY_BELOW = 1e-5
# The noise lies between -2.9 and 22.9, so a token further behind the best cannot win.
NOISE_RANGE = 26.0
# A nucleus (top_p) is searched among this number of best tokens before all tokens are sorted.
FIRST_NUCLEUS_WIDTH = 1024


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities under the model's own distribution, before rules, penalties and
    temperature."""

    logprob: float
    """The log-probability of the drawn token."""
    top_token_ids: np.ndarray
    """int64 [num_logprobs], most probable first."""
    top_logprobs: np.ndarray
    """float32 [num_logprobs]."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """The tokens drawn in one step."""

    token_ids: list[int]
    """One per row; meaningless in a bad row."""
    logprobs: dict[int, Logprobs]
    """By row, for rows that asked for log-probabilities and are not bad."""
    bad_rows: list[int]
    """Rows whose logits hold a NaN, +inf, or nothing finite: no token can be drawn."""
    ruled_out_rows: list[int]
    """Rows whose request rules every token out, by its own rules and its grammar together."""


class TokenCounts:
    """How often each token occurred, in arrays that grow by an entry for each new token."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        ids, counts = np.unique(np.fromiter(token_ids, np.int64), return_counts=True)
        self._size = len(ids)
        self._ids = ids
        self._counts = counts
        self._entry = {token_id: entry for entry, token_id in enumerate(ids.tolist())}

    def add(self, token_id: int) -> None:
        entry = self._entry.setdefault(token_id, self._size)
        if entry == len(self._ids):
            self._ids, self._counts = (
                np.concatenate((a, np.zeros(len(a) + 64, np.int64)))
                for a in (self._ids, self._counts)
            )
        if entry == self._size:
            self._ids[entry] = token_id
            self._size += 1
        self._counts[entry] += 1

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: self._size]

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: self._size]


@dataclass(slots=True)
class SamplingState:
    """What is remembered of a request between its tokens."""

    sampling: Sampling
    is_greedy: bool
    min_tokens: int
    ending_ids: np.ndarray
    """int64: tokens that end the answer. They are not drawn before `min_tokens` others."""
    seen: TokenCounts | None
    """Tokens of prompt and output, for the repetition penalty; None if there is none."""
    drawn: TokenCounts | None
    """Tokens of the output, for presence and frequency penalty; None if there is none."""
    rules: RulesInForce | None
    """None if the request has none."""

    def record(self, token_id: int) -> None:
        for counts in (self.seen, self.drawn):
            if counts is not None:
                counts.add(token_id)
        if self.rules is not None:
            self.rules.record(token_id)


@dataclass(slots=True)
class LogitEdits:
    """Single entries of the logits, each with a value to apply to it."""

    places: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)

    def add(
        self, row: int, vocab_size: int, token_ids: np.ndarray, values: np.ndarray | float
    ) -> None:
        known = (token_ids >= 0) & (token_ids < vocab_size)
        self.places.append(row * vocab_size + token_ids[known])
        self.values.append(np.broadcast_to(np.asarray(values, np.float32), token_ids.shape)[known])

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        places, values = (
            torch.from_numpy(np.concatenate(parts)).to(device)
            for parts in (self.places, self.values)
        )
        return places, values


class Sampler:
    """Draws the next tokens of many requests at once, and keeps what their penalties need."""

    def __init__(self) -> None:
        self._requests: dict[Hashable, SamplingState] = {}

    def add(
        self,
        key: Hashable,
        sampling: Sampling,
        stopping: Stopping,
        prompt_token_ids: np.ndarray,
        output_token_ids: list[int],
        eos_token_ids: tuple[int, ...],
        rules: TokenRules | None = None,
    ) -> None:
        """Begin a request, or resume one that has `output_token_ids` already.

        No field of `sampling` may be None but `num_logprobs`.
        """
        assert sampling.temperature is not None and sampling.repetition_penalty is not None
        assert (
            sampling.top_p is not None and sampling.top_k is not None and sampling.min_p is not None
        )
        penalises_repetition = sampling.repetition_penalty != 1
        penalises_output = bool(sampling.presence_penalty or sampling.frequency_penalty)
        ending_ids = stopping.stop_token_ids + (() if stopping.ignore_eos else eos_token_ids)
        self._requests[key] = SamplingState(
            sampling,
            sampling.temperature < GREEDY_BELOW,
            stopping.min_tokens,
            np.array(ending_ids, np.int64),
            TokenCounts([*prompt_token_ids.tolist(), *output_token_ids])
            if penalises_repetition
            else None,
            TokenCounts(output_token_ids) if penalises_output else None,
            RulesInForce(rules, output_token_ids) if rules else None,
        )

    def remove(self, key: Hashable) -> None:
        self._requests.pop(key, None)

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,
        keys: list[Hashable],
        positions: list[int],
        masks: Mapping[int, np.ndarray] = MappingProxyType({}),
    ) -> SampledTokens:
        """Draw one token for each row of `logits`, float32 [num_rows, vocab_size].

        `positions` are the indices that the tokens will have in the outputs of their requests,
        counted over all attempts. `masks` hold, by row, bool [vocab_size]: the only tokens that may
        be drawn.
        """
        requests = [self._requests[key] for key in keys]
        scores = masked(self._penalised(logits, requests, positions), masks)
        scores = restricted(scores, requests)
        best, choice = greatest(scores)
        if drawn_rows := [row for row, request in enumerate(requests) if not request.is_greedy]:
            rows = torch.tensor(drawn_rows, device=logits.device)
            choice[rows] = draw(
                scores[rows],
                [requests[row].sampling for row in drawn_rows],
                [positions[row] for row in drawn_rows],
            )
        # A NaN or +inf is the maximum of its row. A row of -inf has no other maximum.
        token_ids = torch.where(best.isfinite(), choice, -1).tolist()
        undrawn = [row for row, token_id in enumerate(token_ids) if token_id < 0]
        ruled_out = [
            row for row in undrawn if scores[row].isneginf().all() and is_sound(logits[row])
        ]
        logprobs = self._logprobs(logits, requests, token_ids)
        for request, token_id in zip(requests, token_ids, strict=True):
            if token_id >= 0:
                request.record(token_id)
        bad_rows = [row for row in undrawn if row not in ruled_out]
        return SampledTokens(token_ids, logprobs, bad_rows, ruled_out)

    def _penalised(
        self, logits: Tensor, requests: list[SamplingState], positions: list[int]
    ) -> Tensor:
        """Return the logits with all penalties and biases applied; the same tensor if there are
        none."""
        banned = LogitEdits()
        factors = LogitEdits()
        terms = LogitEdits()
        biases = LogitEdits()
        vocab_size = logits.shape[1]
        for row, (request, position) in enumerate(zip(requests, positions, strict=True)):
            sampling = request.sampling
            if position < request.min_tokens:
                banned.add(row, vocab_size, request.ending_ids, -torch.inf)
            if request.seen is not None:
                assert sampling.repetition_penalty is not None
                factors.add(row, vocab_size, request.seen.ids, sampling.repetition_penalty)
            if request.drawn is not None:
                counts = request.drawn.counts
                terms.add(
                    row,
                    vocab_size,
                    request.drawn.ids,
                    -sampling.presence_penalty - sampling.frequency_penalty * counts,
                )
            if (rules := request.rules) is not None:
                biases.add(row, vocab_size, rules.bias_ids, rules.bias_values)
                banned.add(row, vocab_size, rules.banned_ids(), -torch.inf)
        if not (banned.places or factors.places or terms.places or biases.places):
            return logits
        flat = logits.flatten().clone()
        if factors.places:
            places, factor = factors.tensors(logits.device)
            given = flat[places]
            flat[places] = torch.where(given > 0, given / factor, given * factor)
        if terms.places:
            places, term = terms.tensors(logits.device)
            flat[places] += term
        if biases.places:  # a place may have a term, too, and each place is set once
            places, bias = biases.tensors(logits.device)
            flat[places] += bias
        if banned.places:
            places, values = banned.tensors(logits.device)
            flat[places] = values
        return flat.view_as(logits)

    def _logprobs(
        self, logits: Tensor, requests: list[SamplingState], token_ids: list[int]
    ) -> dict[int, Logprobs]:
        wanted = {
            row: n
            for row, r in enumerate(requests)
            if (n := r.sampling.num_logprobs) is not None and token_ids[row] >= 0
        }
        if not wanted:
            return {}
        logprobs = logits[torch.tensor(list(wanted), device=logits.device)].log_softmax(-1)
        chosen = logprobs.gather(
            1, torch.tensor([[token_ids[row]] for row in wanted], device=logits.device)
        )[:, 0].tolist()
        top = logprobs.topk(min(max(wanted.values()), logits.shape[1]))
        top_ids = top.indices.cpu().numpy()
        top_values = top.values.cpu().numpy()
        return {
            row: Logprobs(chosen[i], top_ids[i, :n], top_values[i, :n])
            for i, (row, n) in enumerate(wanted.items())
        }


def greatest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum of each row and its first index. A NaN counts as maximum."""
    if scores.device.type != "cpu":
        return scores.max(-1)
    # torch's maximum with its index takes eight times as long as numpy's.
    choice = torch.from_numpy(scores.numpy().argmax(-1))
    return scores.gather(1, choice[:, None])[:, 0], choice


def masked(scores: Tensor, masks: Mapping[int, np.ndarray]) -> Tensor:
    if not masks:
        return scores
    allowed = torch.ones(scores.shape, dtype=torch.bool)
    for row, mask in masks.items():
        allowed[row] = torch.from_numpy(mask)
    return scores.masked_fill(~allowed.to(scores.device), -torch.inf)


def restricted(scores: Tensor, requests: list[SamplingState]) -> Tensor:
    """Return the scores with -inf for the tokens that the rules of each request leave out: those
    that are not allowed, and the rivals of those that are forced if one of these can be drawn."""
    narrowed = [
        (row, request.rules)
        for row, request in enumerate(requests)
        if request.rules is not None and request.rules.narrows
    ]
    if narrowed:
        scores = scores.clone()  # it may be the logits, which must not change
    for row, rules in narrowed:
        if rules.allowed_ids is not None:
            keep_only(scores[row], rules.allowed_ids)
        if rules.forced_ids.size:
            keep_only(scores[row], rules.forced_ids, if_possible=True)
    return scores


def keep_only(scores: Tensor, token_ids: np.ndarray, if_possible: bool = False) -> None:
    """Set the scores of one row, [vocab_size], to -inf for all tokens but these.

    With `if_possible` nothing is changed if none of these can be drawn.
    """
    ids = torch.from_numpy(token_ids).to(scores.device)
    kept = scores[ids]
    if not if_possible or kept.isfinite().any():
        scores.fill_(-torch.inf)
        scores[ids] = kept


def is_sound(logits: Tensor) -> bool:
    """Whether the logits of one row hold no NaN and no +inf, and something finite."""
    return bool(logits.max().isfinite())


def draw(scores: Tensor, samplings: list[Sampling], positions: list[int]) -> Tensor:
    """Draw a token for each row, int64 [num_rows], by its temperature and filters.

    The token with the largest sum of score and Gumbel noise is a draw from softmax(scores).
    """
    scaled = scores / column(samplings, "temperature", scores)
    # Noise is costly, and most tokens of a large vocabulary cannot win with any.
    kept = (scaled >= threshold(scaled, samplings)).flatten().nonzero()[:, 0]
    row = kept // scores.shape[1]
    token = kept % scores.shape[1]
    keys = torch.tensor(
        [
            signed(mix(mix(s.seed) + position))
            for s, position in zip(samplings, positions, strict=True)
        ],
        device=scores.device,
    )
    noisy = torch.full_like(scaled, -torch.inf).flatten()
    noisy[kept] = scaled.flatten()[kept] + gumbel_noise(keys[row], token)
    return noisy.view_as(scaled).argmax(-1)


def threshold(scaled: Tensor, samplings: list[Sampling]) -> Tensor:
    """Return the smallest scaled logit of each row that can be drawn, [num_rows, 1].

    Tokens of equal logits are kept or dropped together.
    """
    best = scaled.amax(-1, keepdim=True)
    vocab_size = scaled.shape[1]
    lowest = torch.maximum(best - NOISE_RANGE, best + column(samplings, "min_p", scaled).log())
    if all(not s.top_k and s.top_p == 1 for s in samplings):
        return lowest
    top_ks = [min(s.top_k or vocab_size, vocab_size) for s in samplings]
    width = max([FIRST_NUCLEUS_WIDTH, *(k for k in top_ks if k < vocab_size)])
    top_k = torch.tensor(top_ks, device=scaled.device)[:, None]
    return torch.maximum(
        lowest,
        top_threshold(scaled, top_k, column(samplings, "top_p", scaled), min(width, vocab_size)),
    )


def top_threshold(scaled: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> Tensor:
    """Return the threshold that top_k sets, and top_p among the tokens that top_k keeps.

    Only the `width` best tokens are looked at, if these suffice.
    """
    vocab_size = scaled.shape[1]
    ordered = scaled.topk(width).values
    within = torch.arange(width, device=scaled.device) < top_k
    total = torch.where(
        top_k < vocab_size,
        ordered.where(within, -torch.inf).logsumexp(-1, True),
        scaled.logsumexp(-1, True),
    )
    probabilities = (ordered - total).exp()
    # A token stays if those before it do not reach top_p, so the first always stays. Rounding must
    # not cut the tail of a row without top_p.
    kept = within & ((probabilities.cumsum(-1) - probabilities < top_p) | (top_p == 1))
    unfiltered = (top_k == vocab_size) & (top_p == 1)
    if width < vocab_size and (kept[:, -1:] & (top_k > width) & ~unfiltered).any():
        return top_threshold(scaled, top_k, top_p, vocab_size)
    smallest = ordered.gather(1, kept.sum(-1, keepdim=True).clamp(min=1) - 1)
    return smallest.masked_fill(unfiltered, -torch.inf)


def column(samplings: list[Sampling], name: str, like: Tensor) -> Tensor:
    """Return one field of the sampling of each row, [num_rows, 1]."""
    return torch.tensor(
        [[getattr(s, name)] for s in samplings], dtype=like.dtype, device=like.device
    )
