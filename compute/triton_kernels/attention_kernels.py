"""The attention kernels: decodes with split contexts, and tiles of queries of any length.

A tile holds queries as rows, those of all heads that share a key head among them, and passes over
the keys of its sequence with a softmax that is corrected as larger scores appear. A head is read in
two parts, `MAIN` and `REST` columns wide: 80 columns are 64 and 16, where one power of two would be
128.
"""

import triton
import triton.language as tl


@triton.jit
def load_heads(
    pointer, rows, row_mask, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr
):
    """Return columns `FIRST` to `FIRST + WIDTH` of the heads at `rows`, zeros past the end.

    `rows` are the offsets of the heads [N], `row_mask` is None if all of them exist.
    """
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = pointer + rows[:, None] + columns[None, :]
    inside = columns[None, :] < HEAD_DIM
    if row_mask is None:
        if FIRST + WIDTH > HEAD_DIM:
            heads = tl.load(pointers, mask=inside, other=0.0)
        else:
            heads = tl.load(pointers)
    else:
        if FIRST + WIDTH > HEAD_DIM:
            heads = tl.load(pointers, mask=row_mask[:, None] & inside, other=0.0)
        else:
            heads = tl.load(pointers, mask=row_mask[:, None], other=0.0)
    return heads


@triton.jit
def store_heads(
    pointer,
    rows,
    row_mask,
    values,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write columns `FIRST` to `FIRST + WIDTH` of the heads at `rows`, as far as they exist."""
    columns = FIRST + tl.arange(0, WIDTH)
    tl.store(
        pointer + rows[:, None] + columns[None, :],
        values.to(pointer.dtype.element_ty),
        mask=row_mask[:, None] & (columns[None, :] < HEAD_DIM),
    )


@triton.jit
def load_blocks(table_ptr, first, stop, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Return the blocks of `KEYS` keys from `first` on: one for all if that is enough.

    Keys from `stop` on get the block of the last key.
    """
    if BLOCK_SIZE == 0:
        blocks = 0
    else:
        positions = first
        if BLOCK_SIZE % KEYS != 0:
            positions = first + tl.arange(0, KEYS)
        last = tl.maximum(stop - 1, 0)
        blocks = tl.load(table_ptr + tl.minimum(positions, last) // BLOCK_SIZE)
    return blocks


@triton.jit
def attend_keys(
    acc,
    acc_rest,
    top,
    total,
    q,
    q_rest,
    scale,
    num_visible,
    k_ptr,
    v_ptr,
    table_ptr,
    start,
    stop,
    KEY_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass over keys `start` to `stop`, `KEYS` at a time.

    `acc`, `top` and `total` are the weighted sum of values, the largest score and the sum of
    weights of each row until here. Scores are multiplied by `scale` [ROWS], which includes log2(e).
    If `MASKED`, rows see only keys below `num_visible` [ROWS], and no key from `stop` on is read.
    """
    # Block ids are read one tile ahead. Otherwise the compiler would spend its stages on them.
    blocks = load_blocks(table_ptr, start, stop, BLOCK_SIZE, KEYS)
    for first in range(start, stop, KEYS):
        keys = tl.arange(0, KEYS)
        exists = None
        if MASKED:
            exists = first + keys < stop
        if BLOCK_SIZE == 0:
            base = tl.cast(first, tl.int64) * KEY_STRIDE
            rows = keys * KEY_STRIDE
        elif BLOCK_SIZE % KEYS == 0:
            base = (blocks.to(tl.int64) * BLOCK_SIZE + first % BLOCK_SIZE) * KEY_STRIDE
            rows = keys * KEY_STRIDE
        else:
            base = 0
            rows = (blocks.to(tl.int64) * BLOCK_SIZE + (first + keys) % BLOCK_SIZE) * KEY_STRIDE
        blocks = load_blocks(table_ptr, first + KEYS, stop, BLOCK_SIZE, KEYS)

        k = load_heads(k_ptr + base, rows, exists, HEAD_DIM, 0, MAIN)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if REST > 0:
            k_rest = load_heads(k_ptr + base, rows, exists, HEAD_DIM, MAIN, REST)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
        if MASKED:
            scores = tl.where((first + keys)[None, :] < num_visible[:, None], scores, -float("inf"))

        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row whose scores are all minus infinity must not subtract infinities.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top * scale)
        weights = tl.exp2(scores * scale[:, None] - shift[:, None])
        correction = tl.exp2(top * scale - shift)
        total = total * correction + tl.sum(weights, 1)
        top = new_top

        v = load_heads(v_ptr + base, rows, exists, HEAD_DIM, 0, MAIN)
        weights = weights.to(v.dtype)
        acc = tl.dot(weights, v, acc * correction[:, None], input_precision=PRECISION)
        if REST > 0:
            v_rest = load_heads(v_ptr + base, rows, exists, HEAD_DIM, MAIN, REST)
            acc_rest = tl.dot(
                weights, v_rest, acc_rest * correction[:, None], input_precision=PRECISION
            )
    return acc, acc_rest, top, total


@triton.jit
def attend_all_keys(
    q_ptr,
    q_rows,
    q_exists,
    scale,
    num_visible,
    k_ptr,
    v_ptr,
    table_ptr,
    start,
    unmasked,
    stop,
    KEY_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend to keys `start` to `stop`, where every row sees all whole tiles before `unmasked`.

    Returns what `attend_keys` does.
    """
    # The second part is a dummy that costs nothing if there is none.
    WIDTH: tl.constexpr = REST if REST > 0 else 16
    q = load_heads(q_ptr, q_rows, q_exists, HEAD_DIM, 0, MAIN)
    q_rest = q
    if REST > 0:
        q_rest = load_heads(q_ptr, q_rows, q_exists, HEAD_DIM, MAIN, REST)
    acc = tl.zeros([ROWS, MAIN], tl.float32)
    acc_rest = tl.zeros([ROWS, WIDTH], tl.float32)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    between = start + tl.maximum(unmasked - start, 0) // KEYS * KEYS
    acc, acc_rest, top, total = attend_keys(
        acc,
        acc_rest,
        top,
        total,
        q,
        q_rest,
        scale,
        num_visible,
        k_ptr,
        v_ptr,
        table_ptr,
        start,
        between,
        KEY_STRIDE,
        BLOCK_SIZE,
        HEAD_DIM,
        MAIN,
        REST,
        KEYS,
        False,
        PRECISION,
    )
    return attend_keys(
        acc,
        acc_rest,
        top,
        total,
        q,
        q_rest,
        scale,
        num_visible,
        k_ptr,
        v_ptr,
        table_ptr,
        between,
        stop,
        KEY_STRIDE,
        BLOCK_SIZE,
        HEAD_DIM,
        MAIN,
        REST,
        KEYS,
        True,
        PRECISION,
    )


# Tables are as wide as the longest context of a step needs. While serving, the kernel would be
# compiled again for the first width that is 1, and for the first multiple of 16.
@triton.jit(do_not_specialize=["table_stride"])
def attend_tiles(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    scale_ptr,
    query_starts_ptr,
    query_lens_ptr,
    context_lens_ptr,
    tables_ptr,
    softmax_scale,
    table_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend with `ROWS` queries of a sequence, over a grid (tiles, key heads, sequences).

    Row r of a sequence is head r % GROUP of its token r // GROUP. If `BLOCK_SIZE` is 0, keys and
    values are rows like the queries, `query_starts_ptr` has one more element, and the pointers of
    lengths and tables are None.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    # The last tiles of a causal sequence see the most keys, so they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    query_start = tl.load(query_starts_ptr + sequence).to(tl.int64)
    if BLOCK_SIZE == 0:
        query_len = (tl.load(query_starts_ptr + sequence + 1) - query_start).to(tl.int32)
        context_len = query_len
        k_ptr += query_start * KEY_STRIDE
        v_ptr += query_start * KEY_STRIDE
    else:
        query_len = tl.load(query_lens_ptr + sequence)
        context_len = tl.load(context_lens_ptr + sequence)
        tables_ptr += sequence.to(tl.int64) * table_stride
    if tile * ROWS >= query_len * GROUP:
        return

    rows = tile * ROWS + tl.arange(0, ROWS)
    tokens = rows // GROUP
    exists = rows < query_len * GROUP
    heads = kv_head * GROUP + rows % GROUP
    scale = tl.full([ROWS], softmax_scale, tl.float32)
    if scale_ptr is not None:
        factors = tl.load(scale_ptr + query_start + tokens, mask=exists, other=1.0)
        scale = scale * factors.to(tl.float32)

    unmasked = context_len
    stop = context_len
    num_visible = tl.zeros([ROWS], tl.int32) + context_len
    if CAUSAL:
        before = context_len - query_len
        num_visible = before + tokens + 1
        unmasked = before + tile * ROWS // GROUP + 1
        stop = tl.minimum(before + (tile * ROWS + ROWS - 1) // GROUP + 1, context_len)

    acc, acc_rest, _, total = attend_all_keys(
        q_ptr + query_start * Q_STRIDE,
        tokens * Q_STRIDE + heads * HEAD_DIM,
        exists,
        scale,
        num_visible,
        k_ptr + kv_head * HEAD_DIM,
        v_ptr + kv_head * HEAD_DIM,
        tables_ptr,
        0,
        unmasked,
        stop,
        KEY_STRIDE,
        BLOCK_SIZE,
        HEAD_DIM,
        MAIN,
        REST,
        ROWS,
        KEYS,
        PRECISION,
    )
    out_ptr += query_start * OUT_STRIDE
    out_rows = tokens * OUT_STRIDE + heads * HEAD_DIM
    store_heads(out_ptr, out_rows, exists, acc / total[:, None], HEAD_DIM, 0, MAIN)
    if REST > 0:
        store_heads(out_ptr, out_rows, exists, acc_rest / total[:, None], HEAD_DIM, MAIN, REST)


@triton.jit
def split_length(context_len, num_splits, KEYS: tl.constexpr):
    """Return the keys of each split of a context: whole tiles, so that late splits may be empty."""
    return tl.cdiv(tl.cdiv(context_len, num_splits), KEYS) * KEYS


@triton.jit(do_not_specialize=["table_stride", "num_splits"])
def attend_splits(
    q_ptr,
    cache_ptr,
    out_ptr,
    sums_ptr,
    tops_ptr,
    totals_ptr,
    scale_ptr,
    query_starts_ptr,
    context_lens_ptr,
    tables_ptr,
    softmax_scale,
    values_stride,
    table_stride,
    num_splits,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend with one token to a split of its context, over a grid (key heads, sequences, splits).

    If `SPLIT`, writes the sums [num_seqs, H, num_splits, D] and the largest score and the sum of
    weights [num_seqs, H, num_splits] of each split for `merge_splits`. Otherwise writes the result.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    KEY_STRIDE: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    context_len = tl.load(context_lens_ptr + sequence)
    length = split_length(context_len, num_splits, KEYS)
    start = split * length
    stop = tl.minimum(start + length, context_len)
    if SPLIT and start >= context_len:
        return

    token = tl.load(query_starts_ptr + sequence).to(tl.int64)
    group = tl.arange(0, ROWS)
    exists = group < GROUP
    heads = kv_head * GROUP + group
    scale = tl.full([ROWS], softmax_scale, tl.float32)
    if scale_ptr is not None:
        scale = scale * tl.load(scale_ptr + token).to(tl.float32)
    k_ptr = cache_ptr + kv_head * HEAD_DIM
    acc, acc_rest, top, total = attend_all_keys(
        q_ptr + token * Q_STRIDE,
        heads * HEAD_DIM,
        exists,
        scale,
        tl.zeros([ROWS], tl.int32) + stop,
        k_ptr,
        k_ptr + values_stride,
        tables_ptr + sequence.to(tl.int64) * table_stride,
        start,
        stop,
        stop,
        KEY_STRIDE,
        BLOCK_SIZE,
        HEAD_DIM,
        MAIN,
        REST,
        ROWS,
        KEYS,
        PRECISION,
    )
    if SPLIT:
        parts = (sequence.to(tl.int64) * NUM_HEADS + heads) * num_splits + split
        tl.store(tops_ptr + parts, top * scale, mask=exists)
        tl.store(totals_ptr + parts, total, mask=exists)
        store_heads(sums_ptr, parts * HEAD_DIM, exists, acc, HEAD_DIM, 0, MAIN)
        if REST > 0:
            store_heads(sums_ptr, parts * HEAD_DIM, exists, acc_rest, HEAD_DIM, MAIN, REST)
    else:
        out_ptr += token * OUT_STRIDE
        rows = heads * HEAD_DIM
        store_heads(out_ptr, rows, exists, acc / total[:, None], HEAD_DIM, 0, MAIN)
        if REST > 0:
            store_heads(out_ptr, rows, exists, acc_rest / total[:, None], HEAD_DIM, MAIN, REST)


@triton.jit(do_not_specialize=["num_splits"])
def merge_splits(
    out_ptr,
    sums_ptr,
    tops_ptr,
    totals_ptr,
    query_starts_ptr,
    context_lens_ptr,
    num_splits,
    NUM_HEADS: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Join the splits of `attend_splits`, over a grid (heads, sequences).

    Splits past the end of a context were never written, and are not read.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    token = tl.load(query_starts_ptr + sequence).to(tl.int64)
    context_len = tl.load(context_lens_ptr + sequence)
    splits = tl.arange(0, MAX_SPLITS)
    exists = splits * split_length(context_len, num_splits, KEYS) < context_len
    columns = tl.arange(0, WIDTH)
    parts = (sequence.to(tl.int64) * NUM_HEADS + head) * num_splits + splits

    tops = tl.load(tops_ptr + parts, mask=exists, other=-float("inf"))
    totals = tl.load(totals_ptr + parts, mask=exists, other=0.0)
    sums = tl.load(
        sums_ptr + parts[:, None] * HEAD_DIM + columns[None, :],
        mask=exists[:, None] & (columns[None, :] < HEAD_DIM),
        other=0.0,
    )
    weights = tl.exp2(tops - tl.max(tops, 0))
    merged = tl.sum(sums * weights[:, None], 0) / tl.sum(totals * weights, 0)
    tl.store(
        out_ptr + token * OUT_STRIDE + head * HEAD_DIM + columns,
        merged.to(out_ptr.dtype.element_ty),
        mask=columns < HEAD_DIM,
    )
