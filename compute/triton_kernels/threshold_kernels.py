"""Kernels that find the least score that top_k and top_p leave. See `sampling.py`."""

import triton
import triton.language as tl

from compute.noise import NOISE_RANGE
from compute.triton_kernels.sampling_kernels import (
    INFINITY,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    float_parameter,
    lowest_score,
    maximum_of_row,
    parameter,
)

RANGE = tl.constexpr(NOISE_RANGE)


@triton.jit
def has_filter(parameters, maximum, vocab_size, row, num_rows):
    """Whether the search of a threshold is needed and can be made."""
    is_drawn = float_parameter(parameters, TEMPERATURE, row, num_rows) > 0
    has_top_k = parameter(parameters, TOP_K, row, num_rows) < vocab_size
    has_top_p = float_parameter(parameters, TOP_P, row, num_rows) < 1
    is_finite = (maximum > -INFINITY) & (maximum < INFINITY)
    return is_drawn & (has_top_k | has_top_p) & is_finite


@triton.jit
def level(best, number, NUM_LEVELS: tl.constexpr):
    """Return the level of each number from 0 to NUM_LEVELS - 1: the larger, the lower.

    Scores below the last one win with no noise, and have no probability that counts. The distance
    is exact, so that all kernels get the same levels.
    """
    return best - (number + 1).to(tl.float32) * (RANGE / NUM_LEVELS)


@triton.jit
def tally_kernel(
    scores,
    maxima,
    parameters,
    counts,
    masses,
    vocab_size,
    num_parts,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
):
    """Write the number of scores of one part of one row above each level, and their probability in
    units of that of the best score."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    num_rows = tl.num_programs(0)
    maximum = maximum_of_row(maxima, row, num_parts, WIDTH)
    if has_filter(parameters, maximum, vocab_size, row, num_rows):
        temperature = float_parameter(parameters, TEMPERATURE, row, num_rows)
        best = tl.div_rn(maximum, temperature)
        number = tl.arange(0, NUM_LEVELS)
        limits = level(best, number, NUM_LEVELS)[:, None]
        scores += row.to(tl.int64) * vocab_size
        count = tl.zeros([NUM_LEVELS, CHUNK], tl.int32)
        mass = tl.zeros([NUM_LEVELS, CHUNK], tl.float32)
        for start in range(part * PART, (part + 1) * PART, CHUNK):
            token = start + tl.arange(0, CHUNK)
            x = tl.load(scores + token, token < vocab_size, other=-INFINITY)
            scaled = tl.div_rn(x, temperature)
            is_above = scaled[None, :] > limits
            count += is_above.to(tl.int32)
            mass += tl.where(is_above, tl.exp(scaled - best)[None, :], 0.0)
        at = (row * num_parts + part) * NUM_LEVELS + number
        tl.store(counts + at, tl.sum(count, 1))
        tl.store(masses + at, tl.sum(mass, 1))


@triton.jit
def candidates_kernel(
    scores,
    maxima,
    parameters,
    counts,
    masses,
    candidates,
    num_candidates,
    bounds,
    vocab_size,
    num_parts,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
):
    """List the scaled scores of one part of one row that are above the level that suffices.

    That is the highest level above which there are the top_k best, or else a probability of top_p.
    The order of the list is that of the tokens, so that sums over it are always the same.
    """
    row = tl.program_id(0)
    part = tl.program_id(1)
    num_rows = tl.num_programs(0)
    maximum = maximum_of_row(maxima, row, num_parts, WIDTH)
    if has_filter(parameters, maximum, vocab_size, row, num_rows):
        temperature = float_parameter(parameters, TEMPERATURE, row, num_rows)
        best = tl.div_rn(maximum, temperature)
        other_part = tl.arange(0, WIDTH)[:, None]
        number = tl.arange(0, NUM_LEVELS)
        at = (row * num_parts + other_part) * NUM_LEVELS + number[None, :]
        counts_of_parts = tl.load(counts + at, other_part < num_parts, other=0)
        mass = tl.sum(tl.load(masses + at, other_part < num_parts, other=0.0), 0)
        total = tl.max(mass, 0)
        top_k = parameter(parameters, TOP_K, row, num_rows)
        top_p = float_parameter(parameters, TOP_P, row, num_rows)
        if top_k < vocab_size:
            suffices = tl.sum(counts_of_parts, 0) >= top_k
        else:
            suffices = mass >= top_p * total
        chosen = tl.minimum(NUM_LEVELS - tl.sum(suffices.to(tl.int32), 0), NUM_LEVELS - 1)
        limit = level(best, chosen, NUM_LEVELS)
        of_level = tl.sum(tl.where(number[None, :] == chosen, counts_of_parts, 0), 1)[:, None]
        if part == 0:
            tl.store(num_candidates + row, tl.sum(tl.sum(of_level, 1), 0))
            tl.store(bounds + row, limit)
            tl.store(bounds + num_rows + row, total)
        num_before = tl.sum(tl.sum(tl.where(other_part < part, of_level, 0), 1), 0)
        token = part * PART + tl.arange(0, PART)
        x = tl.load(
            scores + row.to(tl.int64) * vocab_size + token, token < vocab_size, other=-INFINITY
        )
        scaled = tl.div_rn(x, temperature)
        is_above = scaled > limit
        place = num_before + tl.cumsum(is_above.to(tl.int32), 0) - 1
        tl.store(candidates + row.to(tl.int64) * vocab_size + place, scaled, is_above)


@triton.jit
def threshold_kernel(
    candidates,
    num_candidates,
    bounds,
    maxima,
    parameters,
    thresholds,
    vocab_size,
    num_parts,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
):
    """Write the least scaled score of one row that can be drawn.

    Let a score be kept if fewer than top_k are above it, and if the probability above it, among the
    top_k best, is less than top_p. The least kept score is found among all float32 numbers: several
    are tried in each pass over the candidates. Equal scores are kept or dropped together.
    """
    row = tl.program_id(0)
    num_rows = tl.num_programs(0)
    temperature = float_parameter(parameters, TEMPERATURE, row, num_rows)
    maximum = maximum_of_row(maxima, row, num_parts, WIDTH)
    if temperature > 0:
        best = tl.div_rn(maximum, temperature)
        threshold = lowest_score(best, parameters, row, num_rows)
        if has_filter(parameters, maximum, vocab_size, row, num_rows):
            size = tl.load(num_candidates + row)
            candidates += row.to(tl.int64) * vocab_size
            low = rank_of(tl.load(bounds + row)).to(tl.int64)
            highest = rank_of(best).to(tl.int64)
            top_k = parameter(parameters, TOP_K, row, num_rows)
            top_p = float_parameter(parameters, TOP_P, row, num_rows)
            enough = top_p * tl.load(bounds + num_rows + row)
            if top_k < vocab_size:
                high = highest
                while low < high:
                    pivots = pivots_between(low, high, NUM_PIVOTS)
                    counts, _ = above_pivots(
                        candidates, size, pivots, best, CHUNK, NUM_PIVOTS, False
                    )
                    low, high = narrowed(low, high, pivots, counts < top_k, NUM_PIVOTS)
                pivots = low + tl.zeros([NUM_PIVOTS], tl.int64)
                counts, masses = above_pivots(
                    candidates, size, pivots, best, CHUNK, NUM_PIVOTS, True
                )
                # Of scores that equal the last of the top_k best, only as many count as are needed.
                num_last = (top_k - tl.max(counts, 0)).to(tl.float32)
                last = tl.exp(score_of(low.to(tl.int32)) - best)
                enough = top_p * (tl.max(masses, 0) + num_last * last)
            if top_p < 1:
                high = highest
                while low < high:
                    pivots = pivots_between(low, high, NUM_PIVOTS)
                    _, masses = above_pivots(
                        candidates, size, pivots, best, CHUNK, NUM_PIVOTS, True
                    )
                    low, high = narrowed(low, high, pivots, masses < enough, NUM_PIVOTS)
            threshold = tl.maximum(threshold, score_of(low.to(tl.int32)))
        tl.store(thresholds + row, threshold)


@triton.jit
def rank_of(x):
    """Return int32 numbers in the order of these float32 numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of(rank):
    """Return the float32 number of a rank."""
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pivots_between(low, high, NUM_PIVOTS: tl.constexpr):
    """Return evenly spaced ranks, int64 [NUM_PIVOTS], the first one `low`, all below `high`."""
    return low + (high - low) * tl.arange(0, NUM_PIVOTS) // NUM_PIVOTS


@triton.jit
def narrowed(low, high, pivots, is_kept, NUM_PIVOTS: tl.constexpr):
    """Return the bounds between which the least kept rank must be.

    `high` is kept, and whatever is above a kept rank.
    """
    return (
        tl.maximum(low, tl.max(tl.where(is_kept, low - 1, pivots), 0) + 1),
        tl.minimum(high, tl.min(tl.where(is_kept, pivots, high), 0)),
    )


@triton.jit
def above_pivots(
    candidates,
    size,
    pivots,
    best,
    CHUNK: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Return the number of candidates above each pivot, and their probability, in units of that of
    the best score; 0 for the latter unless it is wanted."""
    counts = tl.zeros([NUM_PIVOTS, CHUNK], tl.int32)
    masses = tl.zeros([NUM_PIVOTS, CHUNK], tl.float32)
    limits = pivots.to(tl.int32)[:, None]
    for start in range(0, size, CHUNK):
        place = start + tl.arange(0, CHUNK)
        scaled = tl.load(candidates + place, place < size, other=-INFINITY)
        is_above = rank_of(scaled)[None, :] > limits
        counts += is_above.to(tl.int32)
        if WEIGHTED:
            masses += tl.where(is_above, tl.exp(scaled - best)[None, :], 0.0)
    return tl.sum(counts, 1), tl.sum(masses, 1)
