"""Draws tokens from scores, by temperature and filters.

On a CUDA card kernels do it. They return what is written out here for other devices.
"""

import numpy as np
import torch
from torch import Tensor

from common.messages import Sampling
from compute.noise import NOISE_RANGE, gumbel_noise, keys_of, states_of
from compute.triton_kernels import serve
from services.llm.packing import upload_tensor

# A nucleus (top_p) is searched among this number of best tokens before all tokens are sorted.
FIRST_NUCLEUS_WIDTH = 1024


def choose(
    scores: Tensor, samplings: list[Sampling], are_greedy: list[bool], positions: list[int]
) -> Tensor:
    """Choose a token for each row, int64 [num_rows]; -1 if none can be drawn.

    That is the case if a row of the scores, float32 [num_rows, vocab_size], holds a NaN, +inf, or
    nothing finite. A greedy row takes the first maximum.
    """
    best, choice = greatest(scores)
    if drawn_rows := [row for row, is_greedy in enumerate(are_greedy) if not is_greedy]:
        rows = torch.tensor(drawn_rows, device=scores.device)
        choice[rows] = draw(
            scores[rows],
            [samplings[row] for row in drawn_rows],
            [positions[row] for row in drawn_rows],
        )
    # A NaN or +inf is the maximum of its row. A row of -inf has no other maximum.
    return torch.where(best.isfinite(), choice, -1)


class CardDraws:
    """Chooses tokens with the kernels of a card, for the same requests in one step after another.

    The host waits for nothing. What does not change between steps is computed once.
    """

    def __init__(self, samplings: list[Sampling], are_greedy: list[bool], vocab_size: int) -> None:
        from compute.triton_kernels import sampling as kernels  # only here is Triton needed

        draws = ~np.array(are_greedy)
        temperatures = np.array([s.temperature for s in samplings], np.float32)
        top_ks = np.array([s.top_k or vocab_size for s in samplings])
        top_ps = np.array([s.top_p for s in samplings], np.float32)
        # numpy's logarithm may differ from torch's in the last bit.
        margins = torch.tensor([s.min_p for s in samplings], dtype=torch.float32).log()
        self._states = states_of([s.seed for s in samplings])
        self._parameters: Tensor | None = None
        self._draws = bool(draws.any())
        self._filters = bool((draws & ((top_ks < vocab_size) | (top_ps < 1))).any())
        self._kernels = kernels
        self._packed = kernels.pack_parameters(
            np.where(draws, temperatures, 0).astype(np.float32),
            top_ks,
            top_ps,
            margins.clamp(min=-NOISE_RANGE).numpy(),
        )

    def choose(self, scores: Tensor, positions: list[int]) -> Tensor:
        """Choose a token for each row, as the function `choose` does."""
        # Without draws nothing depends on the positions.
        if self._parameters is None or self._draws:
            self._packed[-1] = keys_of(self._states, positions)
            self._parameters = upload_tensor(torch.from_numpy(self._packed), scores.device)
        return self._kernels.choose(scores, self._parameters, self._draws, self._filters)


def compile_kernels(vocab_size: int, device: torch.device) -> None:
    """Compile what draws tokens on a card, so that no request waits for it."""
    if serve(device):
        filtered = Sampling(temperature=1.0, top_k=2, top_p=0.5, min_p=0.0)
        drawn = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
        scores = torch.zeros(1, vocab_size, device=device)
        for sampling in (filtered, drawn):
            CardDraws([sampling], [False], vocab_size).choose(scores, [0])


def greatest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum of each row and its first index. A NaN counts as maximum."""
    if scores.device.type != "cpu":
        return scores.max(-1)
    # torch's maximum with its index takes eight times as long as numpy's.
    choice = torch.from_numpy(scores.numpy().argmax(-1))
    return scores.gather(1, choice[:, None])[:, 0], choice


def draw(scores: Tensor, samplings: list[Sampling], positions: list[int]) -> Tensor:
    """Draw a token for each row, int64 [num_rows], by its temperature and filters.

    The token with the largest sum of score and Gumbel noise is a draw from softmax(scores).
    """
    scaled = scores / column(samplings, "temperature", scores)
    # Noise is costly, and most tokens of a large vocabulary cannot win with any.
    kept = (scaled >= threshold(scaled, samplings)).flatten().nonzero()[:, 0]
    row = kept // scores.shape[1]
    token = kept % scores.shape[1]
    seeds = [s.seed for s in samplings]
    keys = torch.from_numpy(keys_of(states_of(seeds), positions)).to(scores.device)
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
