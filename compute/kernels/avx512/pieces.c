/* Products of rows with a piece of int4 or int8 weights.
 *
 * Such integers are exact in bfloat16. They are widened to it in registers, for up to twelve rows
 * at a time. int8 weights lie as [outputs / 64][inputs / 2][64][2]. */

#include "quantized_linear.h"

enum {
    MAX_ROWS = 12,     /* of a tile; it keeps 24 sums in registers */
    AHEAD_BYTES = 4096 /* how far ahead weights are prefetched */
};
_Static_assert(INT4_PANEL == PANEL, "both kinds have the same panels");

typedef __m512 Sums[MAX_ROWS][4];
typedef int32_t Pair __attribute__((aligned(2), may_alias));

/* Packs int8 weights [num_outputs, num_inputs], filled up with zeros to whole panels and octets. */
void pack_int8(const int8_t *weights, int8_t *packed, long num_outputs, long num_inputs)
{
    for (long first = 0; first < num_outputs; first += PANEL)
        for (long k = 0; k < (num_inputs + OCTET - 1) / OCTET * OCTET; k += 2)
            for (long n = first; n < first + PANEL; n++)
                for (long i = k; i < k + 2; i++)
                    *packed++ = n < num_outputs && i < num_inputs ? weights[n * num_inputs + i] : 0;
}

float total_of(const bf16 *x, long count)
{
    __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    __m512 sum = _mm512_setzero_ps();
    for (long k = 0; k < count; k += 2 * LANES) {
        __mmask32 mask = count - k >= 2 * LANES ? ~0u : (1u << (count - k)) - 1;
        __m512i some = _mm512_maskz_loadu_epi16(mask, x + k);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)some, ones);
    }
    return _mm512_reduce_add_ps(sum);
}

/* The values from 0 to 15, less INT4_MIDDLE, as bfloat16. A lookup uses the lowest five bits of
 * each word, of which the fifth belongs to the next value. So the table repeats itself. */
INLINE __m512i int4_table(void)
{
    return _mm512_setr_epi32(0xc0e0c100, 0xc0a0c0c0, 0xc040c080, 0xbf80c000, 0x3f800000, 0x40404000,
                             0x40a04080, 0x40e040c0, 0xc0e0c100, 0xc0a0c0c0, 0xc040c080, 0xbf80c000,
                             0x3f800000, 0x40404000, 0x40a04080, 0x40e040c0);
}

INLINE __m512 widen_bytes(const void *x)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x)));
}

/* One input pair of 16 outputs. */
INLINE __m512bh widen_int8(const char *w)
{
    return _mm512_cvtne2ps_pbh(widen_bytes(w + LANES), widen_bytes(w));
}

/* The input pair stays in memory, because a tile leaves hardly a register for it. */
INLINE __m512 add_product(__m512 c, __m512bh b, const bf16 *x)
{
    touch(x);
    touch(x + 1);
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*(const Pair *)x));
    return c;
}

INLINE void add_products(const int rows, const int j, Sums c, __m512bh b, const bf16 *x,
                         long x_stride)
{
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) c[i][j] = add_product(c[i][j], b, x + i * x_stride);
}

INLINE void add_int4_octet(const int rows, const int vectors, Sums c, const char *w, const bf16 *x,
                           long x_stride)
{
    __m512i packed[4];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) {
        packed[j] = _mm512_loadu_si512(w + j * 64);
        _mm_prefetch(w + j * 64 + AHEAD_BYTES, _MM_HINT_T0);
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < OCTET / 2; pair++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) {
            __m512bh b = (__m512bh)_mm512_permutexvar_epi16(packed[j], int4_table());
            add_products(rows, j, c, b, x + 2 * pair, x_stride);
            packed[j] = _mm512_srli_epi16(packed[j], 4);
        }
}

INLINE void add_int8_octet(const int rows, const int vectors, Sums c, const char *w, const bf16 *x,
                           long x_stride)
{
#pragma GCC unroll 4
    for (int pair = 0; pair < OCTET / 2; pair++, w += 2 * PANEL) {
        for (int line = 0; line < vectors / 2; line++)
            _mm_prefetch(w + line * 64 + AHEAD_BYTES, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            add_products(rows, j, c, widen_int8(w + j * 2 * LANES), x + 2 * pair, x_stride);
    }
}

/* Adds the sums of a piece of int4 weights, c, to those of the pieces before. */
INLINE void scale_sums(const int rows, const int vectors, int first, Sums c, const char *header,
                       const float *totals, long totals_stride, float *sums)
{
    const __m256i *scales = (const __m256i *)header + first;
    const char *offsets = header + 2 * PANEL + first * LANES;
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) {
        __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(scales + j));
        __m512 offset = widen_bytes(offsets + j * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            float *sum = sums + i * PANEL + j * LANES;
            __m512 total = _mm512_set1_ps(totals[i * totals_stride]);
            __m512 share = _mm512_fmadd_ps(offset, total, c[i][j]);
            _mm512_store_ps(sum, _mm512_fmadd_ps(scale, share, _mm512_load_ps(sum)));
        }
    }
}

/* Multiplies by the vectors of outputs from `first` on. */
INLINE void multiply_vectors(const int rows, const int vectors, const int is_int4, int first,
                             const Piece *piece, const Block *block, float *sums)
{
    Sums c;
    const bf16 *x = block->x;
    sums += first * LANES;
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            c[i][j] = is_int4 ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * PANEL + j * LANES);
    const char *w = piece->w + first * (is_int4 ? 64 : 2 * LANES);
    for (long k = 0; k < piece->num_octets; k++, x += OCTET) {
        if (is_int4)
            add_int4_octet(rows, vectors, c, w, x, block->x_stride);
        else
            add_int8_octet(rows, vectors, c, w, x, block->x_stride);
        w += is_int4 ? INT4_OCTET_BYTES : INT8_OCTET_BYTES;
    }
    if (is_int4) {
        scale_sums(rows, vectors, first, c, piece->header, block->totals, block->totals_stride,
                   sums);
        return;
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) _mm512_store_ps(sums + i * PANEL + j * LANES, c[i][j]);
}

/* Each size of tile is a function of its own, because together in one function they spill. */
typedef void Tile(const Piece *piece, const Block *block, float *sums);

#define TILE(rows, vectors, is_int4, name)                                                         \
    __attribute__((noinline)) static void name(const Piece *piece, const Block *block, float *sums) \
    {                                                                                              \
        for (int first = 0; first < 4; first += vectors)                                           \
            multiply_vectors(rows, vectors, is_int4, first, piece, block, sums);                   \
    }

/* A table of the tiles for one to twelve rows. */
#define TILES(is_int4, name)       \
    TILE(1, 4, is_int4, name##_1)   \
    TILE(2, 4, is_int4, name##_2)   \
    TILE(3, 4, is_int4, name##_3)   \
    TILE(4, 4, is_int4, name##_4)   \
    TILE(5, 4, is_int4, name##_5)   \
    TILE(6, 4, is_int4, name##_6)   \
    TILE(7, 2, is_int4, name##_7)   \
    TILE(8, 2, is_int4, name##_8)   \
    TILE(9, 2, is_int4, name##_9)   \
    TILE(10, 2, is_int4, name##_10) \
    TILE(11, 2, is_int4, name##_11) \
    TILE(12, 2, is_int4, name##_12) \
    static Tile *const name[] = {name##_1, name##_2, name##_3, name##_4,  name##_5,  name##_6, \
                                 name##_7, name##_8, name##_9, name##_10, name##_11, name##_12};

TILES(1, int4_tiles)
TILES(0, int8_tiles)

/* In tiles of nearly equal size. */
void multiply_piece(Kind kind, const Piece *piece, const Block *block, float *sums)
{
    Tile *const *tiles = kind == INT4 ? int4_tiles : int8_tiles;
    long num_tiles = (block->num_rows + MAX_ROWS - 1) / MAX_ROWS;
    for (long t = 0, row = 0; t < num_tiles; t++) {
        long rows = (block->num_rows - row + num_tiles - t - 1) / (num_tiles - t);
        Block tile = {block->x + row * block->x_stride, block->x_stride,
                      block->totals + row * block->totals_stride, block->totals_stride, rows};
        tiles[rows - 1](piece, &tile, sums + row * PANEL);
        row += rows;
    }
}
