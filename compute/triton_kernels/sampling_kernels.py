"""Kernels that choose tokens: maxima, noise, and the joining of both. See `sampling.py`."""

import triton
import triton.language as tl

from compute.noise import INCREMENT, MULTIPLIER_1, MULTIPLIER_2

LN_2 = tl.constexpr(0.6931471805599453)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
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

    They follow those of all rows without noise. Rows without a temperature are left out.
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
            best = tl.div_rn(maximum_of_row(values, row, num_parts, WIDTH), temperature)
            threshold = lowest_score(best, parameters, row, num_rows)
        key = parameter(parameters, KEY, row, num_rows).to(tl.uint64, bitcast=True)
        noisy = tl.where(scaled >= threshold, scaled + gumbel_noise(key, token), -INFINITY)
        write_maximum(noisy, token, values, indices, num_rows + row, part)


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
