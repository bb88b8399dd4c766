/* bfloat16 by the arithmetic of float32, for CPUs that have AVX2 and no instructions for bfloat16:
 * what the kernels share.
 *
 * A bfloat16 is the upper half of a float32. Sums are float32 and rounded once. A matrix of
 * weights lies in panels of 16 outputs, in each of them the inputs in pairs: [outputs / 16][inputs
 * / 2][16][2]. So a shift or a mask turns eight pairs into eight float32. A matrix of int8 lies as
 * [outputs / 16][inputs][16], and each output has a scale. */

#pragma once

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels.h"

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(32), aligned(4), may_alias));
#define LOG2_E 1.44269504f

typedef float Factor; /* as products with int4 weights keep x */
#define factor_of(x) widen(x)

enum {
    LANES = 8,
    PANEL = 16,
    INT4_PANEL = 32,
    INT4_MIDDLE = 0,     /* is subtracted from int4 weights */
    BLOCK_INPUTS = 1088, /* of 48 rows that are multiplied by int4 weights at a time */
    TILE_ROWS = 6,
    AHEAD_BYTES = 2048 /* how far ahead weights of the same panel are prefetched */
};

/* 2^x, nearly as exact as float32 itself: a polynomial for the fraction, the exponent for the
 * rest. Adding 1.5 * 2^23 leaves the integer in the lowest bits. */
INLINE float power_of_two(float x)
{
    x = x < -126 ? -126 : x;
    x = x > 128 ? 128 : x;
    float shifted = x + 12582912.0f;
    float r = x - (shifted - 12582912.0f);
    float p = 1.540353e-4f;
    p = p * r + 1.3333558e-3f;
    p = p * r + 9.6181291e-3f;
    p = p * r + 5.5504109e-2f;
    p = p * r + 2.4022651e-1f;
    p = p * r + 6.9314718e-1f;
    return float_of(bits_of(p * r + 1) + (bits_of(shifted) << 23));
}

/* Eight outputs' weights of one input. `w` points to a pair of inputs, and `odd` chooses one of
 * them. */
INLINE vec weights_of(const char *w, const int odd, const int is_int8)
{
    if (is_int8) {
        __m128i bytes = _mm_loadl_epi64((const __m128i *)(w + odd * PANEL));
        return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
    words pairs = *(const words *)w;
    if (odd) return (vec)(pairs & 0xffff0000u);
    return (vec)(pairs << 16);
}

/* Twelve sums leave four registers. The compiler's own choice of instructions overwrites factors,
 * which costs moves and spills in this case. */
INLINE vec add_product(vec c, vec a, vec b)
{
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
    return c;
}

INLINE void accumulate(const int rows, const int vectors, vec c[TILE_ROWS][4], const vec *b,
                       const float *x, long x_stride)
{
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
        touch(x + i * x_stride);
        vec a = _mm256_broadcast_ss(x + i * x_stride);
        /* Keeps the compiler from moving the loads of other rows here: there are no registers left
         * for them. */
        __asm__ volatile("" : "+x"(a));
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) c[i][j] = add_product(c[i][j], a, b[j]);
    }
}

/* Adds `count` input pairs to the sums of a tile of rows by panels of outputs, or begins the sums
 * if `first`. A pair of a panel has 64 bytes, or 32 of int8. Meanwhile the weights `ahead` bytes
 * further on are prefetched. The sum of a row does not depend on the size of the tile. */
INLINE void tile(const int rows, const int panels, const int is_int8, const float *x, long x_stride,
                 const char *w, long panel_bytes, long ahead, long count, float *sums,
                 long sums_stride, int first)
{
    const int vectors = 2 * panels;
    const int vector_bytes = is_int8 ? 8 : 32;
    vec c[TILE_ROWS][4];
    vec b[4];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            c[i][j] = first ? (vec){} : *(const vec *)(sums + i * sums_stride + j * LANES);
    for (long k = 0; k < count; k++, w += is_int8 ? 32 : 64, x += 2) {
        for (int p = 0; p < panels; p++) __builtin_prefetch(w + p * panel_bytes + ahead);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            b[j] = weights_of(w + j / 2 * panel_bytes + j % 2 * vector_bytes, 0, is_int8);
        accumulate(rows, vectors, c, b, x, x_stride);
        /* Makes the compiler load the weights again instead of keeping them in registers. */
        __asm__("" : "+r"(w));
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            b[j] = weights_of(w + j / 2 * panel_bytes + j % 2 * vector_bytes, 1, is_int8);
        accumulate(rows, vectors, c, b, x + 1, x_stride);
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) *(vec *)(sums + i * sums_stride + j * LANES) = c[i][j];
}

/* Each size of tile is a function of its own, because together in one function they spill. */
typedef void Tile(const float *x, long x_stride, const char *w, long panel_bytes, long ahead,
                  long count, float *sums, long sums_stride, int first);

#define TILE(rows, panels, is_int8, name)                                                         \
    __attribute__((noinline, unused)) static void name(                                           \
        const float *x, long x_stride, const char *w, long panel_bytes, long ahead, long count,   \
        float *sums, long sums_stride, int first)                                                 \
    {                                                                                             \
        tile(rows, panels, is_int8, x, x_stride, w, panel_bytes, ahead, count, sums, sums_stride, \
             first);                                                                              \
    }

/* A table of the tiles of one panel, for one to six rows. */
#define TILES(is_int8, name)      \
    TILE(1, 1, is_int8, name##_1) \
    TILE(2, 1, is_int8, name##_2) \
    TILE(3, 1, is_int8, name##_3) \
    TILE(4, 1, is_int8, name##_4) \
    TILE(5, 1, is_int8, name##_5) \
    TILE(6, 1, is_int8, name##_6) \
    static Tile *const name[] = {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6};

TILES(0, tiles)

/* Any number of rows by one panel, in tiles of nearly equal size. */
INLINE void all_rows(Tile *const *tiles_of_rows, int num_rows, const float *x, long x_stride,
                     const void *w, long ahead, long count, float *sums, long sums_stride,
                     int first)
{
    int num_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int t = 0, row = 0; t < num_tiles; t++) {
        int rows = (num_rows - row + num_tiles - t - 1) / (num_tiles - t);
        tiles_of_rows[rows - 1](x + row * x_stride, x_stride, w, 0, ahead, count,
                                sums + row * sums_stride, sums_stride, first);
        row += rows;
    }
}
