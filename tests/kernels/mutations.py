"""What `tests.kernels.mutate` changes in the kernels, one line at a time."""

from tests.kernels.mutate import Mutation

POINTWISE = "compute/triton_kernels/pointwise.py"
POINTWISE_TESTS = ("tests/kernels/test_pointwise.py",)

ATTENTION = "compute/triton_kernels/attention_kernels.py"
ATTENTION_TESTS = (
    "tests/kernels/test_paged_attention.py",
    "tests/kernels/test_dense_attention.py",
)
SAMPLING = "compute/triton_kernels/sampling_kernels.py"
THRESHOLDS = "compute/triton_kernels/threshold_kernels.py"
PACKED = "compute/triton_kernels/packed_kernels.py"
PACKED_TESTS = ("tests/kernels/test_packed_product.py",)
SAMPLING_TESTS = ("tests/kernels/test_sampling.py",)


def in_pointwise(kernel: str, *changes: tuple[str, str]) -> list[Mutation]:
    return [Mutation(POINTWISE, kernel, old, new, POINTWISE_TESTS) for old, new in changes]


def in_attention(kernel: str, *changes: tuple[str, str]) -> list[Mutation]:
    return [Mutation(ATTENTION, kernel, old, new, ATTENTION_TESTS) for old, new in changes]


def in_packed(kernel: str, *changes: tuple[str, str]) -> list[Mutation]:
    return [Mutation(PACKED, kernel, old, new, PACKED_TESTS) for old, new in changes]


def in_sampling(kernel: str, *changes: tuple[str, str]) -> list[Mutation]:
    return [Mutation(SAMPLING, kernel, old, new, SAMPLING_TESTS) for old, new in changes]


def in_thresholds(kernel: str, *changes: tuple[str, str]) -> list[Mutation]:
    return [Mutation(THRESHOLDS, kernel, old, new, SAMPLING_TESTS) for old, new in changes]


MUTATIONS = [
    *in_pointwise(
        "add_rms_norm_kernel",
        ("x_ptr + row * x_stride", "x_ptr + row * width"),
        ("delta_ptr + row * delta_stride", "delta_ptr + row * x_stride"),
        ("tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
        (
            "tl.load(x_ptr + row * x_stride + entries, mask=exists, other=0.0)",
            "tl.load(x_ptr + row * x_stride + entries)",
        ),
        (
            "tl.load(delta_ptr + row * delta_stride + entries, mask=exists, other=0.0)",
            "tl.load(delta_ptr + row * delta_stride + entries)",
        ),
        (".to(total_ptr.dtype.element_ty)", ""),
        ("total, mask=exists)", "total)"),
        ("x = total.to(tl.float32)", "pass"),
        ("/ width", "/ BLOCK"),
        (" + eps", ""),
        ("tl.sum(x * x)", "tl.sum(x)"),
        ("tl.rsqrt(", "1.0 / ("),
        ("x * scale * weight, mask=exists)", "x * scale * weight)"),
        ("x * scale * weight,", "x * scale,"),
    ),
    *in_pointwise(
        "silu_mul_kernel",
        ("tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
        ("tl.program_id(1) * BLOCK", "0 * BLOCK"),
        ("row * stride", "row * width * 2"),
        ("gates + width", "gates + BLOCK"),
        ("tl.exp(-gate)", "tl.exp(gate)"),
        ("gate / (1.0", "1.0 / (1.0"),
        ("silu * up,", "silu,"),
        ("silu * up, mask=exists)", "silu * up)"),
    ),
    *in_pointwise(
        "rotate_kernel",
        ("tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
        ("is_entry = entries < HALF", "is_entry = entries < BLOCK"),
        ("row * (2 * HALF)", "row * HALF"),
        ("cos_ptr + table + HALF", "cos_ptr + table"),
        ("signed_sin_ptr + table + HALF", "signed_sin_ptr + table"),
        ("tl.program_id(1) * HEADS", "0 * HEADS"),
        ("(head < num_heads)[:, None] &", ""),
        ("head < num_turning", "head <= num_turning"),
        ("row * row_stride", "row * num_heads * head_stride"),
        ("head[:, None] * head_stride", "head[:, None] * (2 * HALF)"),
        ("y = tl.load(places + HALF", "y = tl.load(places"),
        ("x * cos + y * sin, x)", "x * cos - y * sin, x)"),
        ("y * cos_behind + x * sin_behind", "y * cos_behind + turned_x * sin_behind"),
        ("tl.where(turns, x * cos + y * sin, x)", "x * cos + y * sin"),
        ("tl.where(turns, y * cos_behind + x * sin_behind, y)", "y * cos_behind + x * sin_behind"),
        ("tl.store(places, turned_x, mask=exists & turns)", "pass"),
        ("tl.store(places + HALF, turned_y, mask=exists & turns)", "pass"),
        ("tl.load(slots_ptr + row)", "tl.load(slots_ptr + row).to(tl.int32)"),
        ("slots_ptr + row", "slots_ptr"),
        ("kv_head >= num_kv_heads", "kv_head > num_kv_heads"),
        ("kv_head -= kind.to(tl.int32) * num_kv_heads", "pass"),
        ("slot // block_size * block_stride", "(slot + 1) // block_size * block_stride"),
        ("slot % block_size", "(slot + 1) % block_size"),
        ("kind * kind_stride", "0 * kind_stride"),
        ("kv_head * kv_head_stride", "kv_head * (2 * HALF)"),
        ("exists & (head >= num_queries)[:, None]", "exists"),
        ("tl.store(cached, turned_x, mask=is_kept)", "tl.store(cached, x, mask=is_kept)"),
        ("tl.store(cached + HALF, turned_y, mask=is_kept)", "pass"),
    ),
    *in_attention(
        "load_heads",
        ("columns[None, :] < HEAD_DIM", "columns[None, :] <= HEAD_DIM"),
        ("FIRST + tl.arange(0, WIDTH)", "tl.arange(0, WIDTH)"),
        ("mask=row_mask[:, None], other=0.0", ""),
        ("mask=row_mask[:, None] & inside", "mask=inside"),
    ),
    *in_attention(
        "store_heads",
        ("row_mask[:, None] & (columns[None, :] < HEAD_DIM)", "row_mask[:, None]"),
        ("row_mask[:, None] & (columns[None, :] < HEAD_DIM)", "columns[None, :] < HEAD_DIM"),
        ("FIRST + tl.arange(0, WIDTH)", "tl.arange(0, WIDTH)"),
    ),
    *in_attention(
        "load_blocks",
        ("tl.minimum(positions, last) // BLOCK_SIZE", "tl.minimum(positions, last) % BLOCK_SIZE"),
        ("positions = first + tl.arange(0, KEYS)", "positions = first"),
    ),
    *in_attention(
        "attend_keys",
        ("first + keys < stop", "first + keys <= stop"),
        ("first % BLOCK_SIZE) * KEY_STRIDE", "0) * KEY_STRIDE"),
        ("base = (blocks.to(tl.int64)", "base = (blocks"),
        ("rows = (blocks.to(tl.int64)", "rows = (blocks"),
        ("(first + keys) % BLOCK_SIZE", "keys % BLOCK_SIZE"),
        ("tl.cast(first, tl.int64)", "tl.cast(0, tl.int64)"),
        ("first + KEYS, stop", "first, stop"),
        ("(first + keys)[None, :] < num_visible", "(first + keys)[None, :] <= num_visible"),
        ('tl.where(new_top == -float("inf"), 0.0, new_top * scale)', "new_top * scale"),
        ("total * correction", "total"),
        ("acc * correction[:, None]", "acc"),
        ("acc_rest * correction[:, None]", "acc_rest"),
        ("tl.trans(k_rest), scores,", "tl.trans(k_rest),"),
        ("top = new_top", "pass"),
    ),
    *in_attention(
        "attend_all_keys",
        ("tl.maximum(unmasked - start, 0) // KEYS", "tl.cdiv(unmasked - start, KEYS)"),
        ("True,", "False,"),
    ),
    *in_attention(
        "attend_tiles",
        ("rows = tile * ROWS + tl.arange(0, ROWS)", "rows = tl.arange(0, ROWS)"),
        ("tokens = rows // GROUP", "tokens = rows"),
        ("rows % GROUP", "0"),
        ("exists = rows < query_len * GROUP", "exists = rows <= query_len * GROUP"),
        ("tables_ptr += sequence.to(tl.int64) * table_stride", "pass"),
        ("scale = scale * factors.to(tl.float32)", "pass"),
        ("scale_ptr + query_start + tokens", "scale_ptr + tokens"),
        ("before + tokens + 1", "before + tokens"),
        ("before + tile * ROWS // GROUP + 1", "context_len"),
        ("(tile * ROWS + ROWS - 1) // GROUP", "tile * ROWS // GROUP"),
        ("k_ptr += query_start * KEY_STRIDE", "pass"),
        ("v_ptr += query_start * KEY_STRIDE", "pass"),
        ("k_ptr + kv_head * HEAD_DIM", "k_ptr"),
        ("out_ptr += query_start * OUT_STRIDE", "pass"),
        ("acc / total[:, None]", "acc"),
        ("acc_rest / total[:, None]", "acc_rest"),
    ),
    *in_attention(
        "split_length",
        (
            "tl.cdiv(tl.cdiv(context_len, num_splits), KEYS)",
            "tl.cdiv(context_len // num_splits, KEYS)",
        ),
        (
            "tl.cdiv(tl.cdiv(context_len, num_splits), KEYS)",
            "(tl.cdiv(context_len, num_splits) // KEYS)",
        ),
    ),
    *in_attention(
        "attend_splits",
        ("start = split * length", "start = 0 * length"),
        ("tl.minimum(start + length, context_len)", "start + length"),
        ("group < GROUP", "group <= GROUP"),
        ("kv_head * GROUP + group", "group"),
        ("tl.load(scale_ptr + token)", "tl.load(scale_ptr)"),
        ("k_ptr + values_stride", "k_ptr"),
        ("cache_ptr + kv_head * HEAD_DIM", "cache_ptr"),
        ("top * scale", "top"),
        ("query_starts_ptr + sequence", "query_starts_ptr"),
        ("sequence.to(tl.int64) * table_stride", "0 * table_stride"),
        ("acc / total[:, None]", "acc"),
    ),
    *in_attention(
        "merge_splits",
        ("sums * weights[:, None]", "sums"),
        ("totals * weights", "totals"),
        ("head * HEAD_DIM + columns,", "columns,"),
        ("mask=columns < HEAD_DIM", "mask=columns < WIDTH"),
        ("+ head) * num_splits", ") * num_splits"),
    ),
    *in_sampling(
        "maxima_kernel",
        ("tl.where(x == x, x, INFINITY)", "x"),
        ("other=-INFINITY", "other=INFINITY"),
        ("row.to(tl.int64) * vocab_size", "0 * vocab_size"),
    ),
    *in_sampling(
        "write_maximum",
        ("part * x.shape[0] + place", "place"),
        ("row * tl.num_programs(1) + part", "part"),
    ),
    *in_sampling(
        "maximum_of_row",
        ("other=-INFINITY", "other=INFINITY"),
        ("values + row * num_parts", "values"),
    ),
    *in_sampling("parameter", ("NAME * num_rows + row", "NAME * num_rows")),
    *in_sampling("lowest_score", ("float_parameter(parameters, MARGIN, row, num_rows)", "0.0")),
    *in_sampling(
        "noise_kernel",
        ("scaled >= threshold", "scaled > threshold"),
        ("scaled + gumbel_noise(key, token)", "scaled"),
        ("tl.div_rn(x, temperature)", "x"),
        ("token < vocab_size, other=-INFINITY", "token < vocab_size, other=INFINITY"),
    ),
    *in_sampling(
        "choice_kernel",
        ("row_of_choice = num_rows + row", "row_of_choice = row"),
        ("(best > -INFINITY) &", ""),
        ("& (best < INFINITY)", ""),
        ("row_of_choice * num_parts + place", "row * num_parts + place"),
    ),
    *in_sampling(
        "gumbel_noise",
        ("token.to(tl.uint64) + 1", "token.to(tl.uint64)"),
        ("bits >> 32", "bits >> 31"),
        (" + lost / rest", ""),
    ),
    *in_sampling("mixed", ("x >> 30", "x >> 31"), ("x >> 27", "x >> 28")),
    *in_sampling(
        "log_of", ("1 / 7 + square * (1 / 9)", "1 / 7"), (" - SQRT_HALF_BITS", " - 0x3F800000")
    ),
    *in_thresholds("has_filter", ("has_top_k | has_top_p", "has_top_k")),
    *in_thresholds("level", ("number + 1", "number")),
    *in_thresholds(
        "tally_kernel",
        ("count += is_above.to(tl.int32)", "count = is_above.to(tl.int32)"),
        ("tl.exp(scaled - best)", "tl.exp(scaled)"),
        ("row * num_parts + part", "part"),
        ("start + tl.arange(0, CHUNK)", "tl.arange(0, CHUNK)"),
    ),
    *in_thresholds(
        "candidates_kernel",
        ("mass >= top_p * total", "mass >= 0.0 * total"),
        ("num_before + tl.cumsum", "tl.cumsum"),
        ("other_part < part,", "other_part <= part,"),
        ("tl.div_rn(x, temperature)", "x"),
        ("bounds + row, limit", "bounds, limit"),
    ),
    *in_thresholds(
        "threshold_kernel",
        ("counts < top_k", "counts <= top_k"),
        (" + num_last * last", ""),
        ("tl.maximum(threshold, score_of(low.to(tl.int32)))", "score_of(low.to(tl.int32))"),
        ("bounds + num_rows + row", "bounds + row"),
        ("row.to(tl.int64) * vocab_size", "0 * vocab_size"),
    ),
    *in_thresholds("rank_of", ("bits ^ ((bits >> 31) & 0x7FFFFFFF)", "bits")),
    *in_thresholds("score_of", ("rank ^ ((rank >> 31) & 0x7FFFFFFF)", "rank")),
    *in_thresholds("narrowed", ("tl.where(is_kept, pivots, high)", "pivots")),
    *in_thresholds(
        "above_pivots",
        ("> limits", ">= limits"),
        ("start + tl.arange(0, CHUNK)", "tl.arange(0, CHUNK)"),
        ("tl.exp(scaled - best)", "tl.exp(scaled)"),
    ),
    *in_packed(
        "product_kernel",
        ("tl.program_id(1) * OUTPUTS", "0 * OUTPUTS"),
        ("tl.program_id(0) * ROWS", "0 * ROWS"),
        ("row[None, :] * x_stride", "row[None, :] * num_inputs"),
        ("start = split * tiles_per_split", "start = 0 * tiles_per_split"),
        ("exists & (tile * TILE + entry < num_inputs)[:, None]", "exists"),
        (" - half(scale >> 16)[:, None] * sums", ""),
        ("half(scale)[:, None] * (part", "(part"),
        ("scale[:, None] * part", "part"),
        ("scale = next_scale", "pass"),
        ("tile + 1, stop - 1", "tile, stop - 1"),
        ("acc *= factor", "pass"),
        ("out += split.to(tl.int64) * num_rows * num_outputs", "pass"),
        ("bias + output,", "bias + 0 * output,"),
        ("residual + place", "residual + output[:, None]"),
        ("& (output < num_outputs)[:, None]", ""),
    ),
    *in_packed(
        "group_of",
        ("(tile + first) // TILES_PER_GROUP", "tile // TILES_PER_GROUP"),
        ("tile_groups + tile", "tile_groups"),
    ),
    *in_packed(
        "unpacked",
        ("0, 1, 3, 2, 4, 5", "0, 1, 2, 3, 4, 5"),
        ("sixteen_and(words, 8, dtype)", "sixteen_and(words, 0, dtype)"),
        ("sixteen_and(words, 12, dtype)", "sixteen_and(words, 8, dtype)"),
        ("widened_eight(words, 8, dtype)", "widened_eight(words, 0, dtype)"),
    ),
    *in_packed("numbers", ("weights * 2.0**8", "weights * 2.0**7")),
    *in_packed("ones_like", ("(bits >> 15) | 0x3C00", "bits | 0x3C00")),
    *in_packed("from_bits", ("dtype == tl.float32", "dtype == tl.float64")),
    *in_packed(
        "sixteen_and",
        ("shifted(words, 6 - SHIFT) & 0x03C003C0", "shifted(words, 6 - SHIFT) & 0x01C001C0"),
        ("shifted(words, 6 - SHIFT)", "shifted(words, 5 - SHIFT)"),
        ("0x4C004C00", "0x4C004D00"),
        ("shifted(words, 3 - SHIFT)", "shifted(words, 2 - SHIFT)"),
        ("0x41804180", "0x41804190"),
    ),
    *in_packed(
        "widened_eight",
        ("return sign | (shifted(words, 7 - SHIFT)", "return (shifted(words, 7 - SHIFT)"),
        ("0x3F803F80", "0x3F801F80"),
        ("return sign | (shifted(words, 4 - SHIFT)", "return (shifted(words, 4 - SHIFT)"),
        ("0x07F007F0", "0x07F003F0"),
    ),
    *in_packed("shifted", ("words >> -LEFT", "words")),
    *in_packed("half", ("bits.to(tl.int16)", "(bits + 1).to(tl.int16)")),
    *in_packed(
        "sum_kernel",
        ("sums += num_entries", "pass"),
        ("tl.program_id(0) * BLOCK", "0 * BLOCK"),
        ("place % num_outputs", "0 * place"),
        ("residual + place", "residual"),
    ),
    *in_packed(
        "widen_kernel",
        ("tl.program_id(0) * OUTPUTS", "0 * OUTPUTS"),
        ("tile * WORDS", "0 * WORDS"),
        ("tile_groups + tile", "tile_groups"),
        ("group * scale_stride", "0 * scale_stride"),
        (" - half(pair >> 16)[:, None]", ""),
        ("half(pair) * factor", "half(pair)"),
        ("weights * (pair * factor)[:, None]", "weights"),
        ("* out_stride", "* TILE"),
    ),
]
