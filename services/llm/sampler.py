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
from compute.triton_kernels import serve
from services.llm.draws import CardDraws, choose
from services.llm.packing import upload, upload_tensor
from services.llm.token_rules import RulesInForce

GREEDY_BELOW = 1e-5


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
            upload_tensor(torch.from_numpy(np.concatenate(parts)), device)
            for parts in (self.places, self.values)
        )
        return places, values


class Sampler:
    """Draws the next tokens of many requests at once, and keeps what their penalties need."""

    def __init__(self) -> None:
        self._requests: dict[Hashable, SamplingState] = {}
        self._card_draws: tuple[list[Hashable], CardDraws] | None = None
        """What the last step on a card prepared, for requests of these keys."""

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
        self._card_draws = None
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
        chosen = self._choose(scores, keys, requests, positions)
        token_ids, logprobs = fetched(logits, [r.sampling.num_logprobs for r in requests], chosen)
        undrawn = [row for row, token_id in enumerate(token_ids) if token_id < 0]
        # Only a row without a token waits for the device again.
        ruled_out = [row for row in undrawn if is_ruled_out(logits[row], scores[row])]
        for request, token_id in zip(requests, token_ids, strict=True):
            if token_id >= 0:
                request.record(token_id)
        bad_rows = [row for row in undrawn if row not in ruled_out]
        return SampledTokens(token_ids, logprobs, bad_rows, ruled_out)

    def _choose(
        self,
        scores: Tensor,
        keys: list[Hashable],
        requests: list[SamplingState],
        positions: list[int],
    ) -> Tensor:
        """Choose a token for each row, int64 [num_rows] on the device; -1 if none can be drawn."""
        if serve(scores.device) and self._card_draws and self._card_draws[0] == keys:
            return self._card_draws[1].choose(scores, positions)
        samplings = [request.sampling for request in requests]
        are_greedy = [request.is_greedy for request in requests]
        if not serve(scores.device):
            return choose(scores, samplings, are_greedy, positions)
        draws = CardDraws(samplings, are_greedy, scores.shape[1])
        self._card_draws = keys, draws
        return draws.choose(scores, positions)

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


def fetched(
    logits: Tensor, nums_logprobs: list[int | None], chosen: Tensor
) -> tuple[list[int], dict[int, Logprobs]]:
    """Return the chosen tokens, int64 [num_rows] on the device, and the log-probabilities of the
    rows that want some and have a token.

    All of them come with one transfer.
    """
    wanted = {row: n for row, n in enumerate(nums_logprobs) if n is not None}
    if not wanted:
        return chosen.cpu().tolist(), {}
    (rows,) = upload([np.array(list(wanted))], logits.device)
    logprobs = logits[rows].log_softmax(-1)
    of_chosen = logprobs.gather(1, chosen[rows].clamp(min=0)[:, None])
    top = logprobs.topk(min(max(wanted.values()), logits.shape[1]))
    values = torch.cat((of_chosen, top.values), 1)
    packed = torch.cat(
        (chosen, top.indices.flatten(), values.view(torch.int32).flatten().long())
    ).cpu()
    ids, top_ids, bits = packed.split((len(chosen), top.indices.numel(), values.numel()))
    token_ids = ids.tolist()
    found_ids = top_ids.view(top.indices.shape).numpy()
    found = bits.int().view(torch.float32).view(values.shape).numpy()
    return token_ids, {
        row: Logprobs(float(found[i, 0]), found_ids[i, :n], found[i, 1 : n + 1])
        for i, (row, n) in enumerate(wanted.items())
        if token_ids[row] >= 0
    }


def masked(scores: Tensor, masks: Mapping[int, np.ndarray]) -> Tensor:
    if not masks:
        return scores
    ruled_out = torch.from_numpy(~np.stack(list(masks.values())))
    rows = upload_tensor(torch.tensor(list(masks)), scores.device)
    narrowed = scores[rows].masked_fill(upload_tensor(ruled_out, scores.device), -torch.inf)
    return scores.index_copy(0, rows, narrowed)


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
    ids = upload_tensor(torch.from_numpy(token_ids), scores.device)
    kept = scores[ids]
    if if_possible:
        scores.masked_fill_(kept.isfinite().any(), -torch.inf)
    else:
        scores.fill_(-torch.inf)
    scores[ids] = kept


def is_ruled_out(logits: Tensor, scores: Tensor) -> bool:
    """Whether all scores of one row are -inf, and its logits hold no NaN and no +inf, and something
    finite."""
    return bool(scores.isneginf().all()) and bool(logits.max().isfinite())
