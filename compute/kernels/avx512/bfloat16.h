/* What the kernels share on CPUs that have the bfloat16 dot product (AVX512_BF16).
 *
 * Sums are float32 and rounded once. A matrix of weights lies in panels of 64 outputs, in each of
 * them the inputs in pairs: [outputs / 64][inputs / 2][64][2]. This is oneDNN's packing. */

#pragma once

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels.h"

#ifndef __AVX512BF16__
#error "no bfloat16 dot product"
#endif

#define LOG2_E 1.44269504f

typedef bf16 Factor; /* as products with integers keep x */
#define factor_of(x) (x)

enum {
    LANES = 16,
    PANEL = 64,
    INT4_PANEL = 64,
    INT4_MIDDLE = 8,     /* is subtracted from int4 weights */
    BLOCK_INPUTS = 4096, /* of 48 rows that are multiplied by integers at a time */
    TILE_ROWS = 6,
    TILE_PAIRS = 32, /* input pairs that stay in the first-level cache while all rows use them */
    AHEAD = 2        /* how many times TILE_PAIRS pairs ahead weights are prefetched */
};

INLINE __mmask16 mask_of(long left)
{
    return left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
}

/* Touches the lanes that a masked instruction accesses; they lie `stride` bytes apart. */
INLINE void touch_lanes(const void *x, long stride, __mmask16 mask)
{
    for (int i = 0; i < LANES; i++)
        if (mask >> i & 1) touch((const char *)x + i * stride);
}

INLINE __m512 widen_all(__m256i x)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

INLINE __m512 load(const bf16 *x, __mmask16 mask)
{
    touch_lanes(x, sizeof *x, mask);
    return widen_all(_mm256_maskz_loadu_epi16(mask, x));
}

INLINE __m512 load_floats(const float *x, __mmask16 mask)
{
    touch_lanes(x, sizeof *x, mask);
    return _mm512_maskz_loadu_ps(mask, x);
}

INLINE void store(bf16 *y, __mmask16 mask, __m512 x)
{
    touch_lanes(y, sizeof *y, mask);
    _mm256_mask_storeu_epi16(y, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

/* One pair of entries, in every lane. */
INLINE __m512bh pair_of(const bf16 *x)
{
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* 2^x, nearly as exact as float32 itself: a polynomial for the fraction, the exponent for the
 * rest. In this order of the arguments of max a NaN stays a NaN. */
INLINE __m512 power_of_two(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-127), x);
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.540353e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1)), n);
}

/* Adds `count` input pairs to the sums of a tile of rows by vectors of outputs, or begins the sums
 * if `first`.
 *
 * Each pair of inputs has four cache lines of weights. The tile prefetches the lines `from` up to
 * `to` of the pairs that come some steps later. Several tiles that work on the same weights
 * each prefetch a share of the next ones. */
INLINE void tile(const int rows, const int vectors, const bf16 *x, long x_stride, const bf16 *w,
                 long w_stride, long count, float *sums, long sums_stride, int first, int from,
                 int to)
{
    __m512 c[TILE_ROWS][4];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            c[i][j] =
                first ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * sums_stride + j * LANES);
    for (long k = 0; k < count; k++, w += w_stride, x += 2) {
        __m512bh b[4];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) b[j] = (__m512bh)_mm512_loadu_si512(w + j * 2 * LANES);
        for (int line = from; line < to; line++)
            _mm_prefetch((const char *)(w + AHEAD * TILE_PAIRS * w_stride) + line * 64,
                         _MM_HINT_T0);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            __m512bh a = pair_of(x + i * x_stride);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) c[i][j] = _mm512_dpbf16_ps(c[i][j], b[j], a);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            _mm512_store_ps(sums + i * sums_stride + j * LANES, c[i][j]);
}

/* `tile` for any number of rows up to six. */
INLINE void any_tile(int rows, const int vectors, const bf16 *x, long x_stride, const bf16 *w,
                     long w_stride, long count, float *sums, long sums_stride, int first, int from,
                     int to)
{
#define TILE(rows) \
    tile(rows, vectors, x, x_stride, w, w_stride, count, sums, sums_stride, first, from, to)
    switch (rows) {
    case 1: TILE(1); break;
    case 2: TILE(2); break;
    case 3: TILE(3); break;
    case 4: TILE(4); break;
    case 5: TILE(5); break;
    default: TILE(6);
    }
#undef TILE
}
