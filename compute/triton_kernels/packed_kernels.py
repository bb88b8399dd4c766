"""The kernels of products with packed weights.

Weights lie in words of 32 bits. A word holds the inputs that one lane of a matrix instruction
takes, in pairs whose entries are 16 bits apart. So a shift and a mask unpack two weights at once,
in the registers of the lane that multiplies them:

    4 bits: word c of a unit of 32 inputs; bits 4i and 16 + 4i are inputs 8i + 2c and 8i + 2c + 1
    8 bits: word c of a unit of 16 inputs; bits 8i and 16 + 8i are inputs 8i + 2c and 8i + 2c + 1
"""

import triton
import triton.language as tl


@triton.jit
def product_kernel(
    x,
    words,
    scales,
    tile_groups,
    bias,
    residual,
    out,
    num_rows,
    num_outputs,
    num_inputs,
    x_stride,
    word_stride,
    scale_stride,
    num_tiles,
    tiles_per_split,
    first,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TILES_PER_GROUP: tl.constexpr,
    BITS: tl.constexpr,
    MASKED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the product of `ROWS` rows with `OUTPUTS` outputs, or the sums over a split of inputs.

    Weights are multiplied as the whole numbers that they are, and a tile's sum by its scale. With
    four bits they are 16 too large, and as much as their zero. That times the sum of inputs, which
    a product with ones computes where it is needed, is subtracted.
    """
    WORDS: tl.constexpr = TILE * BITS // 32
    dtype: tl.constexpr = x.dtype.element_ty
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entry = tl.arange(0, TILE)
    split = tl.program_id(2)
    start = split * tiles_per_split
    words += output[:, None].to(tl.int64) * word_stride + tl.arange(0, WORDS)[None, :]
    x += row[None, :] * x_stride + entry[:, None]
    ones = tl.full([OUTPUTS, TILE], 1.0, dtype)
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    stop = tl.minimum(start + tiles_per_split, num_tiles)
    scales += output
    scale = tl.load(scales + group_of(tile_groups, start, first, TILES_PER_GROUP) * scale_stride)
    for tile in range(start, stop):
        # Scales are too small for a load that Triton starts ahead.
        following = tl.minimum(tile + 1, stop - 1)
        group = group_of(tile_groups, following, first, TILES_PER_GROUP)
        next_scale = tl.load(scales + group * scale_stride)
        weights = unpacked(tl.load(words + tile * WORDS), TILE, BITS, dtype)
        exists = (row < num_rows)[None, :]
        if MASKED:
            exists = exists & (tile * TILE + entry < num_inputs)[:, None]
        inputs = tl.load(x + tile * TILE, mask=exists, other=0.0)
        part = tl.dot(weights, inputs, input_precision=PRECISION)
        if BITS == 4:
            sums = tl.dot(ones, inputs, input_precision=PRECISION)
            acc += half(scale)[:, None] * (part - half(scale >> 16)[:, None] * sums)
        else:
            acc += scale[:, None] * part
        scale = next_scale
    place = row[None, :] * num_outputs + output[:, None]
    exists = (row < num_rows)[None, :] & (output < num_outputs)[:, None]
    if IS_SPLIT:
        out += split.to(tl.int64) * num_rows * num_outputs
    else:
        if bias is not None:
            acc += tl.load(bias + output, output < num_outputs, other=0.0).to(tl.float32)[:, None]
        if residual is not None:
            acc += tl.load(residual + place, exists, other=0.0).to(tl.float32)
    tl.store(out + place, acc.to(out.dtype.element_ty), exists)


@triton.jit
def group_of(tile_groups, tile, first, TILES_PER_GROUP: tl.constexpr):
    """Return the group of a tile."""
    if TILES_PER_GROUP > 0:
        return (tile + first) // TILES_PER_GROUP
    return tl.load(tile_groups + tile)


@triton.jit
def unpacked(words, TILE: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Return the weights in these words, `dtype` [outputs, TILE]: 16 + value if of four bits."""
    OUTPUTS: tl.constexpr = words.shape[0]
    PLANES: tl.constexpr = 16 // BITS
    # [output, unit, plane, word, lane]
    units = tl.reshape(words, [OUTPUTS, TILE // (8 * PLANES), 1, 4, 1])
    shift = tl.reshape(tl.arange(0, PLANES) * BITS, [1, 1, PLANES, 1, 1])
    if BITS == 4:
        planes = sixteen_and(units >> shift, dtype)
    else:
        planes = widened_eight(units >> shift, dtype)
    lane = tl.reshape(tl.arange(0, 2) * 16, [1, 1, 1, 1, 2])
    bits = (planes >> lane).to(tl.int16)
    bits = tl.reshape(bits, [OUTPUTS, TILE])
    if dtype == tl.float32:
        weights = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        weights = bits.to(dtype, bitcast=True)
    if BITS == 8:
        # The exponent of eight bits counts from another number.
        if dtype == tl.bfloat16:
            weights = weights * 2.0**120
        else:
            weights = weights * 2.0**8
    return weights


@triton.jit
def sixteen_and(words, dtype: tl.constexpr):
    """Return two numbers 16 + value in each word, of the bits 0 to 3 and 16 to 19."""
    # The mantissa of 16 begins with four bits that count whole numbers.
    if dtype == tl.bfloat16:
        return ((words & 0x000F000F) << 3) | 0x41804180
    return ((words & 0x000F000F) << 6) | 0x4C004C00


@triton.jit
def widened_eight(words, dtype: tl.constexpr):
    """Return two numbers in each word, of the bits 0 to 7 and 16 to 23, too small by the
    difference of exponents."""
    sign = (words & 0x00800080) << 8
    if dtype == tl.bfloat16:
        return sign | ((words & 0x007F007F) << 4)
    return sign | ((words & 0x007F007F) << 7)


@triton.jit
def half(bits):
    """Return the lower 16 bits of int32, which are a float16, in float32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def sum_kernel(
    sums, bias, residual, out, num_entries, num_outputs, num_splits, BLOCK: tl.constexpr
):
    """Add up the sums of splits, in their order, with bias and residual."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = place < num_entries
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(num_splits):
        acc += tl.load(sums + place, exists, other=0.0)
        sums += num_entries
    if bias is not None:
        acc += tl.load(bias + place % num_outputs, exists, other=0.0).to(tl.float32)
    if residual is not None:
        acc += tl.load(residual + place, exists, other=0.0).to(tl.float32)
    tl.store(out + place, acc.to(out.dtype.element_ty), exists)


@triton.jit
def widen_kernel(
    words,
    scales,
    tile_groups,
    out,
    num_outputs,
    word_stride,
    scale_stride,
    out_stride,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
):
    """Write the weights of one tile of `OUTPUTS` outputs."""
    WORDS: tl.constexpr = TILE * BITS // 32
    dtype: tl.constexpr = out.dtype.element_ty
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    tile = tl.program_id(1)
    words += output[:, None].to(tl.int64) * word_stride + tile * WORDS
    weights = unpacked(tl.load(words + tl.arange(0, WORDS)[None, :]), TILE, BITS, dtype)
    group = tl.load(tile_groups + tile)
    pair = tl.load(scales + group * scale_stride + output)
    if BITS == 4:
        wide = (weights.to(tl.float32) - half(pair >> 16)[:, None]) * half(pair)[:, None]
    else:
        wide = weights.to(tl.float32) * pair[:, None]
    place = output[:, None].to(tl.int64) * out_stride + tile * TILE + tl.arange(0, TILE)[None, :]
    tl.store(out + place, wide.to(dtype), (output < num_outputs)[:, None])
