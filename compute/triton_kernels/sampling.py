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
from torch import Tensor

from compute.triton_kernels.sampling_kernels import choice_kernel, maxima_kernel, noise_kernel
from compute.triton_kernels.threshold_kernels import (
    candidates_kernel,
    tally_kernel,
    threshold_kernel,
)
from compute.triton_kernels.variant import Variant

PART = 4096
"""The tokens of a part of a row."""
NUM_LEVELS = 32
"""The levels above which scores are counted. They lie as far apart as noise reaches, together."""
TALLY_CHUNK = 128
"""The tokens that are tallied at once."""
NUM_PIVOTS = 16
"""The values that are tried in one pass of a search."""
CHUNK = 1024
"""The scores that a search looks at at once."""


def pack_parameters(
    temperatures: np.ndarray, top_ks: np.ndarray, top_ps: np.ndarray, margins: np.ndarray
) -> np.ndarray:
    """Return what `choose` needs of each row in one array, int64 [5, num_rows].

    The last row is left to the keys of the noise, which change from step to step.

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
    """
    keys = np.zeros_like(top_ks)
    return np.stack([bits_of(temperatures), top_ks, bits_of(top_ps), bits_of(margins), keys])


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
        are those of `pack_parameters`, with keys, on the device of the scores.
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
    # Maxima without noise, then those with it. A kernel gets the whole, because Triton would
    # compile it again for a part that is not aligned.
    values = torch.empty(2, num_rows, num_parts, device=device)
    indices = torch.empty(2, num_rows, num_parts, dtype=torch.int32, device=device)
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    grid = (num_rows, num_parts)
    maxima_kernel[grid](scores, values, indices, vocab_size, PART, num_warps=4)
    if draws:
        thresholds = values  # not read without filters
        if filters:
            thresholds = find_thresholds(scores, values[0], parameters)
        noise_kernel[grid](
            scores,
            parameters,
            thresholds,
            values,
            indices,
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
