"""The kernels of products with packed weights.

Weights lie in words of 32 bits. A word holds the inputs that one lane of a matrix instruction
takes, in pairs whose entries are 16 bits apart. So a shift and a mask unpack two weights at once,
in the registers of the lane that multiplies them:

    8 bits: word c holds inputs 4c + 2b and 4c + 2b + 1 at bits 8b and 16 + 8b
    4 bits: word c of a unit of 32 inputs holds inputs 16a + 4c + 2b and 16a + 4c + 2b + 1 at bits
            8a + 4b and 16 + 8a + 4b
"""

import triton
import triton.language as tl


# Otherwise Triton compiles again for one row, and for a multiple of 16.
@triton.jit(do_not_specialize=["num_rows"])
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
    factor,
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
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    stop = tl.minimum(start + tiles_per_split, num_tiles)
    scales += output
    scale = tl.load(scales + group_of(tile_groups, start, first, TILES_PER_GROUP) * scale_stride)
    for tile in range(start, stop):
        # Scales are too small for a load that Triton starts ahead.
        following = tl.minimum(tile + 1, stop - 1)
        group = group_of(tile_groups, following, first, TILES_PER_GROUP)
        next_scale = tl.load(scales + group * scale_stride)
        bits = unpacked(tl.load(words + tile * WORDS), TILE, BITS, dtype)
        exists = (row < num_rows)[None, :]
        if MASKED:
            exists = exists & (tile * TILE + entry < num_inputs)[:, None]
        inputs = tl.load(x + tile * TILE, mask=exists, other=0.0)
        part = tl.dot(numbers(bits, BITS, dtype), inputs, input_precision=PRECISION)
        if BITS == 4:
            sums = tl.dot(ones_like(bits, dtype), inputs, input_precision=PRECISION)
            acc += half(scale)[:, None] * (part - half(scale >> 16)[:, None] * sums)
        else:
            acc += scale[:, None] * part
        scale = next_scale
    acc *= factor
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
    """Return the weights in these words as the bits of `dtype`, or of float16, [outputs, TILE]."""
    OUTPUTS: tl.constexpr = words.shape[0]
    if BITS == 4:
        planes = tl.join(
            tl.join(sixteen_and(words, 0, dtype), sixteen_and(words, 8, dtype)),
            tl.join(sixteen_and(words, 4, dtype), sixteen_and(words, 12, dtype)),
        )
        # From [output, unit, word, bit 3 of the place, bit 2, lane] to the order of inputs.
        bits = tl.join(planes.to(tl.int16), (planes >> 16).to(tl.int16))
        bits = tl.reshape(bits, [OUTPUTS, TILE // 32, 4, 2, 2, 2])
        bits = tl.permute(bits, 0, 1, 3, 2, 4, 5)
    else:
        planes = tl.join(widened_eight(words, 0, dtype), widened_eight(words, 8, dtype))
        bits = tl.join(planes.to(tl.int16), (planes >> 16).to(tl.int16))
    return tl.reshape(bits, [OUTPUTS, TILE])


@triton.jit
def numbers(bits, BITS: tl.constexpr, dtype: tl.constexpr):
    """Return the weights of these bits: 16 + value if they are of four bits."""
    weights = from_bits(bits, dtype)
    if BITS == 8:
        # The exponent of eight bits counts from another number.
        if dtype == tl.bfloat16:
            weights = weights * 2.0**120
        else:
            weights = weights * 2.0**8
    return weights


@triton.jit
def ones_like(bits, dtype: tl.constexpr):
    """Return ones, of the shape of bits that are those of positive numbers."""
    # Made of the bits, so that the compiler lays ones out as it does weights, and both products can
    # read the same inputs. In the end it finds out that they are constant.
    if dtype == tl.bfloat16:
        return from_bits((bits >> 15) | 0x3F80, dtype)
    return from_bits((bits >> 15) | 0x3C00, dtype)


@triton.jit
def from_bits(bits, dtype: tl.constexpr):
    """Return numbers of these bits, which are those of float16 if `dtype` has more than 16."""
    if dtype == tl.float32:
        found = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        found = bits.to(dtype, bitcast=True)
    return found


@triton.jit
def sixteen_and(words, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """Return two numbers 16 + value in each word, of the four bits at `SHIFT` and 16 above."""
    # The mantissa of 16 begins with four bits that count whole numbers.
    if dtype == tl.bfloat16:
        return (shifted(words, 3 - SHIFT) & 0x00780078) | 0x41804180
    return (shifted(words, 6 - SHIFT) & 0x03C003C0) | 0x4C004C00


@triton.jit
def widened_eight(words, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """Return two numbers in each word, of the eight bits at `SHIFT` and 16 above, too small by the
    difference of exponents."""
    sign = shifted(words, 8 - SHIFT) & -0x7FFF8000
    if dtype == tl.bfloat16:
        return sign | (shifted(words, 4 - SHIFT) & 0x07F007F0)
    return sign | (shifted(words, 7 - SHIFT) & 0x3F803F80)


@triton.jit
def shifted(words, LEFT: tl.constexpr):
    """Return the words, shifted left, or right if `LEFT` is negative."""
    if LEFT >= 0:
        return words << LEFT
    return words >> -LEFT


@triton.jit
def half(bits):
    """Return the lower 16 bits of int32, which are a float16, in float32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["num_entries"])
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
    factor,
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
    bits = unpacked(tl.load(words + tl.arange(0, WORDS)[None, :]), TILE, BITS, dtype)
    weights = numbers(bits, BITS, dtype).to(tl.float32)
    group = tl.load(tile_groups + tile)
    pair = tl.load(scales + group * scale_stride + output)
    if BITS == 4:
        wide = (weights - half(pair >> 16)[:, None]) * (half(pair) * factor)[:, None]
    else:
        wide = weights * (pair * factor)[:, None]
    place = output[:, None].to(tl.int64) * out_stride + tile * TILE + tl.arange(0, TILE)[None, :]
    tl.store(out + place, wide.to(dtype), (output < num_outputs)[:, None])
