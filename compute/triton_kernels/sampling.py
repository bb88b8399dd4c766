"""Draws on the card: from scores to token ids, so that only ids leave it.

No row is sorted. A row is split into parts, each with a program of its own, whose results a last
kernel joins. So a single row keeps many multiprocessors busy. Untried: no CUDA device was at hand
when this was written.

    kernel             grid            what it finds
    maxima_kernel      [rows, parts]   the maximum of each part, and its first index
    noise_kernel       [rows, parts]   the same of the scores with noise
    choice_kernel      [rows]          the token ids

The least score that top_k and top_p leave is found between the last two of these kernels, if a row
has such a filter. It is searched among the best scores only, which are few in most rows.

    tally_kernel       [rows, parts]   how many scores are above each of some levels
    candidates_kernel  [rows, parts]   a list of the scores above the level that suffices
    threshold_kernel   [rows]          the least score, by a search over the bits of those listed
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from compute.noise import INCREMENT, MULTIPLIER_1, MULTIPLIER_2, NOISE_RANGE
from compute.triton_kernels.variant import Variant

PART = 4096
"""The tokens of a part of a row."""
NUM_LEVELS = 32
"""The levels above which scores are counted. They lie as far apart as noise reaches, together."""
TALLY_CHUNK = 256
"""The tokens that are tallied at once."""
NUM_PIVOTS = 16
"""The values that are tried in one pass of a search."""
CHUNK = 1024
"""The scores that a search looks at at once."""
LN_2 = tl.constexpr(0.6931471805599453)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
RANGE = tl.constexpr(NOISE_RANGE)
STEP = tl.constexpr(INCREMENT)
FIRST_FACTOR = tl.constexpr(MULTIPLIER_1)
SECOND_FACTOR = tl.constexpr(MULTIPLIER_2)
# Rows of the parameters.
TEMPERATURE = tl.constexpr(0)
TOP_K = tl.constexpr(1)
TOP_P = tl.constexpr(2)
MARGIN = tl.constexpr(3)
KEY = tl.constexpr(4)
INFINITY = tl.constexpr(float("inf"))


def pack_parameters(
    temperatures: np.ndarray,
    top_ks: np.ndarray,
    top_ps: np.ndarray,
    margins: np.ndarray,
    keys: np.ndarray,
) -> np.ndarray:
    """Return what `choose` needs of each row in one array, int64 [5, num_rows].

    Parameters
    ----------
    temperatures
        are float32; 0 if the maximum is taken.
    top_ks
        are int64, at least 1; not below vocab_size if there is no such filter.
    top_ps
        are float32; 1 if there is no such filter.
    margins
        are float32: what is added to the best scaled score, so that no lower one can be drawn.
    keys
        are int64: the keys of the noise.
    """
    return np.stack(
        [
            bits_of(temperatures),
            top_ks,
            bits_of(top_ps),
            bits_of(margins),
            keys,
        ]
    )


def bits_of(values: np.ndarray) -> np.ndarray:
    """Return the bits of float32 values as int64."""
    return values.view(np.int32).astype(np.int64)


def choose(scores: Tensor, parameters: Tensor, draws: bool, filters: bool) -> Tensor:
    """Return the drawn token of each row, int64 [num_rows]; -1 if none can be drawn.

    That is the case if a row holds a NaN, +inf, or nothing finite.

    Parameters
    ----------
    scores
        are float32 [num_rows, vocab_size].
    parameters
        are what `pack_parameters` returns, on the device of the scores.
    draws
        says whether a row has a temperature.
    filters
        says whether such a row has top_k or top_p.
    """
    num_rows, vocab_size = scores.shape
    scores = scores.contiguous()
    num_parts = triton.cdiv(vocab_size, PART)
    width = triton.next_power_of_2(num_parts)
    device = scores.device
    values = torch.empty(2, num_rows, num_parts, device=device)
    indices = torch.empty(2, num_rows, num_parts, dtype=torch.int32, device=device)
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    grid = (num_rows, num_parts)
    maxima_kernel[grid](scores, values[0], indices[0], vocab_size, PART, num_warps=4)
    if draws:
        thresholds = values[0]  # not read without filters
        if filters:
            thresholds = find_thresholds(scores, values[0], parameters)
        noise_kernel[grid](
            scores,
            values[0],
            parameters,
            thresholds,
            values[1],
            indices[1],
            vocab_size,
            num_parts,
            width,
            PART,
            filters,
            num_warps=4,
        )
    choice_kernel[(num_rows,)](
        values, indices, parameters, token_ids, num_parts, width, num_warps=1
    )
    return token_ids


def find_thresholds(scores: Tensor, maxima: Tensor, parameters: Tensor) -> Tensor:
    """Return the least scaled score of each row that can be drawn, float32 [num_rows].

    `maxima` are those of the parts of each row, [num_rows, num_parts].
    """
    num_rows, vocab_size = scores.shape
    num_parts = maxima.shape[1]
    width = triton.next_power_of_2(num_parts)
    device = scores.device
    counts = torch.empty(num_rows, num_parts, NUM_LEVELS, dtype=torch.int32, device=device)
    masses = torch.empty(num_rows, num_parts, NUM_LEVELS, device=device)
    candidates = torch.empty(num_rows, vocab_size, device=device)
    num_candidates = torch.empty(num_rows, dtype=torch.int32, device=device)
    bounds = torch.empty(2, num_rows, device=device)
    thresholds = torch.empty(num_rows, device=device)
    sizes = (vocab_size, num_parts, width)
    grid = (num_rows, num_parts)
    tally_kernel[grid](
        scores, maxima, parameters, counts, masses, *sizes, PART, TALLY_CHUNK, NUM_LEVELS
    )
    candidates_kernel[grid](
        scores,
        maxima,
        parameters,
        counts,
        masses,
        candidates,
        num_candidates,
        bounds,
        *sizes,
        PART,
        NUM_LEVELS,
    )
    threshold_kernel[(num_rows,)](
        candidates,
        num_candidates,
        bounds,
        maxima,
        parameters,
        thresholds,
        *sizes,
        CHUNK,
        NUM_PIVOTS,
        num_warps=16,
    )
    return thresholds


@triton.jit
def maxima_kernel(scores, values, indices, vocab_size, PART: tl.constexpr):
    """Write the maximum of one part of one row, and its first index. A NaN counts as +inf."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    token = part * PART + tl.arange(0, PART)
    x = tl.load(scores + row.to(tl.int64) * vocab_size + token, token < vocab_size, other=-INFINITY)
    write_maximum(tl.where(x == x, x, INFINITY), token, values, indices, row, part)


@triton.jit
def write_maximum(x, token, values, indices, row, part):
    best, place = tl.max(x, 0, return_indices=True)
    at = row * tl.num_programs(1) + part
    tl.store(values + at, best)
    tl.store(indices + at, part * x.shape[0] + place)


@triton.jit
def maximum_of_row(values, row, num_parts, WIDTH: tl.constexpr):
    """Return the maximum of one row."""
    part = tl.arange(0, WIDTH)
    return tl.max(tl.load(values + row * num_parts + part, part < num_parts, other=-INFINITY), 0)


@triton.jit
def parameter(parameters, NAME: tl.constexpr, row, num_rows):
    return tl.load(parameters + NAME * num_rows + row)


@triton.jit
def float_parameter(parameters, NAME: tl.constexpr, row, num_rows):
    return parameter(parameters, NAME, row, num_rows).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def lowest_score(best, parameters, row, num_rows):
    """Return the least scaled score that can win with any noise and that min_p keeps."""
    return best + float_parameter(parameters, MARGIN, row, num_rows)


@triton.jit
def noise_kernel(
    scores,
    maxima,
    parameters,
    thresholds,
    values,
    indices,
    vocab_size,
    num_parts,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    FILTERS: tl.constexpr,
):
    """Write the maximum of one part of one row with noise, and its first index.

    Rows without a temperature are left out.
    """
    row = tl.program_id(0)
    part = tl.program_id(1)
    num_rows = tl.num_programs(0)
    temperature = float_parameter(parameters, TEMPERATURE, row, num_rows)
    if temperature > 0:
        token = part * PART + tl.arange(0, PART)
        x = tl.load(
            scores + row.to(tl.int64) * vocab_size + token, token < vocab_size, other=-INFINITY
        )
        scaled = tl.div_rn(x, temperature)
        if FILTERS:
            threshold = tl.load(thresholds + row)
        else:
            best = tl.div_rn(maximum_of_row(maxima, row, num_parts, WIDTH), temperature)
            threshold = lowest_score(best, parameters, row, num_rows)
        key = parameter(parameters, KEY, row, num_rows).to(tl.uint64, bitcast=True)
        noisy = tl.where(scaled >= threshold, scaled + gumbel_noise(key, token), -INFINITY)
        write_maximum(noisy, token, values, indices, row, part)


@triton.jit
def choice_kernel(values, indices, parameters, token_ids, num_parts, WIDTH: tl.constexpr):
    """Join the parts of one row."""
    row = tl.program_id(0)
    num_rows = tl.num_programs(0)
    part = tl.arange(0, WIDTH)
    is_part = part < num_parts
    best, place = tl.max(
        tl.load(values + row * num_parts + part, is_part, other=-INFINITY),
        0,
        return_indices=True,
    )
    row_of_choice = row
    if float_parameter(parameters, TEMPERATURE, row, num_rows) > 0:
        row_of_choice = num_rows + row
        place = tl.argmax(
            tl.load(values + row_of_choice * num_parts + part, is_part, other=-INFINITY), 0
        )
    token_id = tl.load(indices + row_of_choice * num_parts + place).to(tl.int64)
    is_finite = (best > -INFINITY) & (best < INFINITY)
    tl.store(token_ids + row, tl.where(is_finite, token_id, -1))


@triton.jit
def gumbel_noise(key, token):
    """Return what `compute.noise.gumbel_noise` returns, but for rounding."""
    bits = mixed(key + (token.to(tl.uint64) + 1) * STEP)
    complement = ((bits >> 32).to(tl.float32) + 0.5) * (2.0**-32)
    complement = tl.minimum(complement, 1 - 2.0**-24)
    # log1p of a small number is the logarithm of the rounded sum, and what rounding took away.
    rest = 1 - complement
    lost = (1 - rest) - complement
    return -log_of(-(log_of(rest) + lost / rest))


@triton.jit
def mixed(x):
    """Return the outputs of splitmix64 for uint64 states that are incremented already."""
    x = (x ^ (x >> 30)) * FIRST_FACTOR
    x = (x ^ (x >> 27)) * SECOND_FACTOR
    return x ^ (x >> 31)


@triton.jit
def log_of(x):
    """Return the logarithm of positive, normal float32 numbers.

    The instruction of CUDA cards is imprecise next to 1, where noise needs it most. This is the
    series of the inverse hyperbolic tangent, for a mantissa between the square roots of 1/2 and 2.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    above = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1
    s = above / (above + 2)
    square = s * s
    series = 1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9)))
    return exponent.to(tl.float32) * LN_2 + (2 * s + 2 * s * square * series)


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

    The last one is -inf.
    """
    below = (number + 1).to(tl.float32) * (RANGE / NUM_LEVELS)
    return tl.where(number < NUM_LEVELS - 1, best - below, -INFINITY)


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


def variants() -> Sequence[Variant]:
    """Return the specialisations of several requests and a vocabulary of 152,064 tokens."""
    names = {
        "floats": "scores maxima values thresholds candidates masses bounds",
        "ints": "indices counts num_candidates",
        "longs": "parameters token_ids",
        "numbers": "vocab_size num_parts",
    }
    types = {"floats": "*fp32", "ints": "*i32", "longs": "*i64", "numbers": "i32"}
    type_of = {name: types[kind] for kind, listed in names.items() for name in listed.split()}
    parts = {"WIDTH": 64, "PART": PART}
    search = {"WIDTH": 64, "CHUNK": CHUNK, "NUM_PIVOTS": NUM_PIVOTS}
    found = []
    for name, kernel, constexprs, num_warps in (
        ("maxima", maxima_kernel, {"PART": PART}, 4),
        ("tally", tally_kernel, {**parts, "CHUNK": TALLY_CHUNK, "NUM_LEVELS": NUM_LEVELS}, 4),
        ("candidates", candidates_kernel, {**parts, "NUM_LEVELS": NUM_LEVELS}, 4),
        ("threshold", threshold_kernel, search, 16),
        ("noise", noise_kernel, {**parts, "FILTERS": False}, 4),
        ("noise above thresholds", noise_kernel, {**parts, "FILTERS": True}, 4),
        ("choice", choice_kernel, {"WIDTH": 64}, 1),
    ):
        signature = {argument: type_of.get(argument, "constexpr") for argument in kernel.arg_names}
        found.append(Variant(f"sampling: {name}", kernel, signature, constexprs, num_warps))
    return found
